"""What one layer materialises: by the loads of the last w iterations, and after the gate by the true ones if they
pay."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from harness.comm.replicas import travel
from harness.comm.sparse import plan_sparse
from harness.layer.work import expert_macs
from harness.memory import expert_bytes
from harness.options import whole, yes
from harness.plan.replicated import Policy
from harness.specs import DTYPE_BYTES
from harness.system import Case
from harness.topology import Topology
from harness.traffic import port_load
from methods.hecate.materialise import materialise

WINDOW = 5  # w
RESHARD_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Options:
    """Of a case, checked. ``t`` and ``m`` None: to be found out."""

    t: int | None
    m: int | None
    window: int
    reshard_every: int  # 0: never
    rematerialise: bool
    calibrate: bool

    @classmethod
    def of(cls, case: Case, rematerialise: bool = False) -> Options:
        most = case.model.num_experts
        return cls(
            whole(case, "t", 0, most, 0) if "t" in case.options else None,
            whole(case, "m", 0, most, 0) if "m" in case.options else None,
            whole(case, "window", WINDOW, 10**6),
            whole(case, "reshard_every", RESHARD_EVERY, 10**9, 0),
            yes(case, "rematerialise", rematerialise),
            yes(case, "calibrate", False),
        )


class Hecate(Policy):
    """Algorithm 1 on the mean of the last w iterations' loads. ``t`` may be set between iterations."""

    def __init__(self, case: Case, options: Options, t: int, m: int):
        self.topology, self.t, self.m = case.topology, t, m
        self.rematerialises, self.revises = options.rematerialise, options.calibrate
        self.window: collections.deque[np.ndarray] = collections.deque(maxlen=options.window)
        self.latency = Latency.of(case) if options.calibrate else None
        self.owner = case.placement.owner  # in this iteration

    def forget(self) -> None:
        """No iteration has been yet."""
        self.window.clear()

    def know(self, window: Sequence[Sequence[int]], t: int) -> None:
        """``window``: loads [E] of the last iterations, oldest first."""
        self.t = t
        self.window.extend(np.asarray(load) for load in window)

    def load(self, num_experts: int) -> np.ndarray:
        """F, float64 [E]."""
        return np.mean(self.window, axis=0) if self.window else np.zeros(num_experts)

    def expect(self, owner: np.ndarray, num_ranks: int) -> np.ndarray:
        self.owner = owner
        return materialise(owner, self.load(len(owner)), self.t, self.m, self.topology)

    def saw(self, counts: np.ndarray) -> None:
        self.window.append(counts.sum(0))

    def revise(self, hosts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Calibration: Algorithm 1 again, with the true loads and the memory that is left; if it pays."""
        assert self.latency is not None
        own = self.owner
        left = min(self.m, self.t) - int((hosts.sum(0) - np.bincount(own, minlength=hosts.shape[1])).max())
        wanted = hosts | materialise(own, counts.sum(0), self.t, max(0, left), self.topology)
        if (wanted == hosts).all():
            return hosts
        extra = plan_sparse(own, (wanted & ~hosts) | (own[:, None] == np.arange(hosts.shape[1])), self.topology)
        with_it = self.latency.seconds(wanted, counts) + self.latency.transfer_s(extra.bytes(self.latency.expert_bytes))
        return wanted if with_it < self.latency.seconds(hosts, counts) else hosts


@dataclasses.dataclass
class Latency:
    """Predicted seconds of a layer, forward and backward: the busiest port of every link level, and the busiest rank's
    experts where the cluster's gemm costs are known."""

    topology: Topology
    row_bytes: float
    expert_bytes: float
    macs_per_row: float
    seconds_per_mac: float
    bandwidths: list[float | None]

    @classmethod
    def of(cls, case: Case) -> Latency:
        model, cluster = case.model, case.cluster
        levels = [] if cluster is None else [level.unit_bytes_per_s for level in cluster.levels]
        gemm = None if cluster is None else cluster.gemm
        return cls(
            case.topology,
            float(model.hidden * DTYPE_BYTES[case.dtype]),
            float(expert_bytes(model, case.dtype)),
            float(expert_macs(model)),
            gemm.beta_s_per_mac if gemm else 0.0,
            levels,
        )

    def transfer_s(self, matrix: np.ndarray) -> float:
        """Of bytes [num_ranks, num_ranks] there and of as many back."""
        known = [(level, width) for level, width in enumerate(self.bandwidths) if width]
        return sum(2 * float(port_load(matrix, self.topology, level).max()) / width for level, width in known)

    def seconds(self, hosts: np.ndarray, counts: np.ndarray) -> float:
        rows = travel(counts, hosts, self.topology).rows
        compute = 3 * float(rows.sum(0).max()) * self.macs_per_row * self.seconds_per_mac
        np.fill_diagonal(rows, 0)
        return 2 * self.transfer_s(rows * self.row_bytes) + compute
