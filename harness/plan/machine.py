"""What turns the tasks of a plan into seconds: links, device, and how much busy lanes slow each other.

published    the costs that come with a cluster's preset
profiled     those that ``moebench profile`` found on it
data_sheet   rates of links and device, of which computation reaches a stated share
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from harness.errors import bad
from harness.ledger import Calibration
from harness.plan.cost import Compute, Cost, Hold, InTurn, OnLinks, Timed, Transfer, leaves
from harness.plan.device import CURVE, Device, Fitted, Roofline, Shared, Tiled
from harness.plan.graph import Plan
from harness.plan.host import LINKS, SUMS, amount, of_task, summed
from harness.plan.links import AlphaBeta, Line, LinkModel, Ports, SharedPorts, lines_of
from harness.plan.profiled import Profiled
from harness.specs import Cluster
from harness.topology import Topology

#: how much a busy lane (inner key) slows another (outer key): at rate 1 / (1 + c) while both are busy
Contention = dict[str, dict[str, float]]
#: bytes from each rank to each are then 0.5 GB, of which a few are there at once
MOST_RANKS = 8192
BY_NAME: dict[str, type[Ports]] = {"ports": Ports, "shared-ports": SharedPorts}


@dataclasses.dataclass(frozen=True)
class Machine:
    """``basis``: what its seconds rest on, in words. ``host``: seconds of the processor in every task of that name,
    without its layer (``embedding``, ``forward.gate``), or of that kind, as ``harness.plan.host`` finds them; under
    ``LINKS`` the share by which whatever goes over links takes longer than profiled, under ``SUMS`` of each byte that
    is added up beside."""

    links: LinkModel
    device: Device
    basis: str
    contention: Contention = dataclasses.field(default_factory=dict)
    host: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, name = self.links.shape, "cluster.levels"
        if (num_ranks := math.prod(shape)) > MOST_RANKS:
            size = 8 * num_ranks**2 / 2**30
            remedy = (
                f"the bytes from each of {num_ranks} ranks to each take {size:.0f} GiB; give at most {MOST_RANKS} ranks"
            )
            raise bad(name, "x".join(map(str, shape)), remedy)

    @classmethod
    def published(cls, cluster: Cluster, num_ranks: int | None = None, contention: Contention | None = None) -> Machine:
        """By ``cluster.collectives`` and ``cluster.gemm``. ``num_ranks``: of the costs, where several sizes have their
        own."""
        return cls(AlphaBeta(cluster, num_ranks), Fitted(cluster), f"costs of {cluster.name}", contention or {})

    @classmethod
    def profiled(
        cls, cluster: Cluster, calibration: Calibration, compute: Literal["real", "stand-in"] = "real"
    ) -> Machine:
        """By what ``calibration`` found on ``cluster``: links, contention, and products where computation is real;
        stand-ins take what the cluster's own costs say. Products were timed on one rank; where all ranks are on one
        machine they share its cores."""
        basis = f"profile of {calibration.profiled.name}, {calibration.date[:10]}"
        device: Device = Fitted(cluster if compute == "stand-in" else calibration.cluster(["gemm"]))
        cores = calibration.provenance.get("num_cores")
        if compute == "real" and cluster.kind != "physical" and cores:
            device = Shared(device, cluster.num_ranks, int(cores))
        return cls(Profiled(calibration), device, basis, calibration.slowdown(compute))

    @classmethod
    def data_sheet(
        cls,
        cluster: Cluster,
        efficiency: float | None = None,
        start_s: float = 0.0,
        *,
        tensor_parallel: int = 1,
        links: Literal["ports", "shared-ports"] = "ports",
    ) -> Machine:
        """Computation at ``efficiency`` of the device's peak; None: at what tiles of rows let it reach.
        ``tensor_parallel``: neighbouring devices that make up a rank."""
        if cluster.device_flops_per_s is None:
            raise bad(f"cluster {cluster.name}.device_flops_per_s", None, "is not stated; state the device's peak")
        *outer, inner = cluster.shape
        topology = Topology((*outer, inner // tensor_parallel))
        lines = lines_of_ranks(cluster, topology, tensor_parallel)
        peak, memory = (
            tensor_parallel * rate if rate is not None else None
            for rate in (cluster.device_flops_per_s, cluster.device_bytes_per_s)
        )
        assert peak is not None
        device: Device = Tiled(peak, memory, CURVE) if efficiency is None else Roofline(peak, memory, efficiency)
        share = "by rows per expert" if efficiency is None else f"{efficiency:.0%} of the peak"
        basis = f"data sheet of {cluster.name}, computation {share}, {links.replace('-', ' ')}"
        return cls(BY_NAME[links](topology, lines, start_s), device, basis)

    def seconds(self, cost: Cost | None) -> Any:
        """Of one task, alone on its lane; shaped as the cost's amounts. Nothing to do costs nothing."""
        match cost:
            case None:
                return 0.0
            case Hold() | Timed():
                return np.asarray(cost.seconds, dtype=np.float64)
            case InTurn():
                return sum(np.asarray(self.seconds(part)) for part in cost.parts)
            case Compute():
                return self.device.seconds(cost)
            case OnLinks():
                return self.links.seconds(cost)
        raise AssertionError(cost)

    def priced(self, cost: Cost | None) -> Cost | None:
        """The same cost in seconds, without its byte matrix [W, W]. Where ranks do not meet, what they wait for is
        in the matrix, and it is kept in single precision."""
        match cost:
            case None | Hold() | Timed():
                return cost
            case InTurn():
                return InTurn(tuple(part for each in cost.parts if (part := self.priced(each)) is not None))
            case Transfer() if not self.links.meets:
                return dataclasses.replace(cost, matrix=cost.matrix.astype(np.float32, copy=False))
            case OnLinks():
                return Timed(cost.operation, cost.scope, self.seconds(cost), summed_bytes=cost.summed_bytes)
        return Hold(self.seconds(cost), amount(cost))

    def _on_links(self, cost: Cost | None) -> Any:
        """Seconds of what of a task goes over links."""
        return sum(np.asarray(self.seconds(each)) for each in leaves(cost) if isinstance(each, OnLinks))

    def durations(self, plan: Plan) -> np.ndarray:
        """Seconds of every task alone on its lane, the processor's part with it, float64 [num_tasks, ...] broadcast
        over all costs."""
        each = [
            np.asarray(self.seconds(task.cost))
            + of_task(self.host, task) * amount(task.cost)
            + self.host.get(SUMS, 0.0) * np.asarray(summed(task.cost))
            + self.host.get(LINKS, 0.0) * np.asarray(self._on_links(task.cost))
            for task in plan.tasks
        ]
        shape = np.broadcast_shapes(*(one.shape for one in each)) if each else ()
        return np.array([np.broadcast_to(one, shape) for one in each]).reshape(len(each), *shape)


def lines_of_ranks(cluster: Cluster, topology: Topology, tensor_parallel: int) -> tuple[Line, ...]:
    """Lines of ``topology``, whose ranks are each ``tensor_parallel`` neighbouring devices of ``cluster``."""
    return tuple(_wider(line, topology, tensor_parallel) for line in lines_of(cluster))


def _wider(line: Line, topology: Topology, tensor_parallel: int) -> Line:
    """``line`` of single devices as ranks of ``tensor_parallel`` devices have it: those of a rank's ports are one."""
    ranks = topology.num_ranks // topology.num_units(line.level)  # of a unit
    ports = math.gcd(line.ports, ranks)
    width = line.ports // ports * (tensor_parallel if line.level == topology.num_levels - 1 else 1)
    return dataclasses.replace(line, bytes_per_s=line.bytes_per_s * width, ports=ports)


__all__ = ["Contention", "Machine", "lines_of_ranks"]
