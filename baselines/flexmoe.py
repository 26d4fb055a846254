"""FlexMoE's dynamic expert management (Nie et al., SIGMOD 2023): experts get more and fewer copies as loads change.

When the busiest rank has more than ``threshold`` times the mean load, a policy maker looks for operations on copies
("vExperts") and applies one after another, as long as the slowest rank's estimated time falls:

    Expand   one more copy of the hottest expert of the busiest rank
    Shrink   one copy less of an expert that has others, to make room
    Migrate  an expert goes elsewhere, in exchange for another one or for a new copy

    time = max over ranks of (tokens' computation and travel) + max over ranks of (all-reduces of copies' gradients)

There is no public code. Interpretations: an expert's tokens are shared out evenly over its copies; travel counts with
computation, by the tokens that arrive; single operations may gain nothing (several ranks may be equally busy), so a
run of them is judged, and must save more than moving the experts with their optimizer state costs, over the steps
until the next adjustment; every copy keeps optimizer state, as its gradient is all-reduced; a rank has a fixed number
of slots (the memory that is set aside), and at most one copy of an expert.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from harness.errors import bad
from harness.layer.work import expert_macs
from harness.memory import OPTIMIZER_STATES, expert_bytes
from harness.options import whole
from harness.placement import Placement
from harness.plan.copied import CopiedSystem, num_slots
from harness.plan.following import Planner
from harness.specs import DTYPE_BYTES
from harness.system import Case

EVERY = 25  # steps between adjustments; the paper does not state it
THRESHOLD = 1.1  # max over mean load of a rank above which it acts; nor this
NAMES = ("expand", "shrink", "migrate")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of one layer. ``token_s``: of one assignment on the busiest rank, computation and travel, forward and
    backward; ``reduce_s``: one expert's gradient through a port once; ``move_s``: one expert with its state."""

    token_s: float
    reduce_s: float
    move_s: float

    @classmethod
    def of(cls, case: Case) -> Costs:
        """By the cluster's port (a rank has its part of the node's) and its gemm costs; where it has no bandwidth,
        tokens alone count."""
        model, cluster = case.model, case.cluster
        width = cluster.levels[0].unit_bytes_per_s if cluster is not None else None
        if cluster is None or width is None:
            return cls(1.0, 0.0, 0.0)
        port = width * case.topology.shape[0] / case.topology.num_ranks
        compute_s = 3 * expert_macs(model) * cluster.gemm.beta_s_per_mac if cluster.gemm is not None else 0.0
        travel_s = 4 * model.hidden * DTYPE_BYTES[case.dtype] / port
        once_s = expert_bytes(model, case.dtype) / port
        return cls(compute_s + travel_s, once_s, (1 + OPTIMIZER_STATES[case.dtype]) * once_s)


@dataclasses.dataclass(frozen=True, eq=False)
class Adjusted:
    """``slots`` int [W, S] after ``operations`` (name, expert, rank); the estimated times without and with them."""

    slots: np.ndarray
    operations: tuple[tuple[str, int, int], ...]
    before_s: float
    after_s: float


def start(num_experts: int, num_ranks: int, num_slots: int) -> np.ndarray:
    """slots int [W, S], -1 where free: every expert once in index order; copies side by side where ranks are more."""
    if num_experts % num_ranks and num_ranks % num_experts:
        raise bad("num_experts", num_experts, f"must divide {num_ranks} ranks, or be divided by them")
    each = max(1, num_experts // num_ranks)
    if num_slots < each:
        raise bad("slots", num_slots, f"{num_experts} experts need at least {each} slots on each of {num_ranks} ranks")
    slots = np.full((num_ranks, num_slots), -1, dtype=np.int64)
    slots[:, :each] = (np.arange(num_ranks * each) * num_experts // (num_ranks * each)).reshape(num_ranks, each)
    return slots


def hosts_of(slots: np.ndarray, num_experts: int) -> np.ndarray:
    """slots int [W, S] -> hosts bool [E, W]."""
    hosts = np.zeros((num_experts, len(slots)), dtype=bool)
    rank, slot = np.nonzero(slots >= 0)
    hosts[slots[rank, slot], rank] = True
    return hosts


def adjust(
    load: np.ndarray,
    slots: np.ndarray,
    costs: Costs,
    *,
    steps: int = EVERY,
    threshold: float = THRESHOLD,
    most: int | None = None,
) -> Adjusted:
    """``load`` [E]: tokens of each expert in a step; ``slots`` int [W, S] as of ``start``, every expert in one or more.
    ``steps``: that the new placement serves; ``most`` rounds of operations (default: as many as there are experts).

    >>> slots = start(4, 2, 3)  # rank 0 holds 0 and 1, rank 1 holds 2 and 3; one slot free on each
    >>> found = adjust(np.array([60.0, 10, 10, 10]), slots, Costs(1.0, 1.0, 1.0))
    >>> found.slots.tolist(), found.operations
    ([[0, 1, -1], [2, 3, 0]], (('expand', 0, 1),))
    >>> found.before_s, found.after_s  # 70 tokens on rank 0; 50 on rank 1 and one gradient to reduce
    (70.0, 51.0)
    """
    if load.shape[0] <= slots.max(initial=-1):
        raise bad("slots", int(slots.max()), f"load has {load.shape[0]} experts only")
    from baselines.kernels import replication  # numba takes its time to import

    after = np.ascontiguousarray(slots, dtype=np.int64).copy()
    tokens = np.ascontiguousarray(load, dtype=np.float64)
    rounds = len(load) if most is None else most
    found, before_s, after_s = replication.adjust(
        tokens, after, float(costs.token_s), float(costs.reduce_s), costs.move_s / steps, float(threshold), rounds
    )
    operations = tuple((NAMES[kind], int(expert), int(rank)) for kind, expert, rank in found)
    return Adjusted(after, operations, float(before_s), float(after_s))


class FlexMoE(CopiedSystem):
    name = "flexmoe"
    title = "FlexMoE's copies of experts: expand, shrink, migrate by its cost model"
    source = "SIGMOD 2023 (Nie et al.), policy maker; no public code"
    every = EVERY
    preload = ("harness.compiled",)
    recipe: ClassVar[dict[str, str]] = {"state": "flexmoe"}

    @classmethod
    def planner(cls, case: Case) -> Planner:
        costs, wide = Costs.of(case), num_slots(case)
        every = whole(case, "rearrange_every", cls.every, 10**9)

        def plan(load: np.ndarray, placement: Placement) -> Placement:
            slots = np.full((case.topology.num_ranks, wide), -1, dtype=np.int64)
            for rank, own in enumerate(slots):
                own[: len(placement.local(rank))] = placement.local(rank)
            found = adjust(np.asarray(load, dtype=np.float64), slots, costs, steps=every)
            return Placement.of_hosts(hosts_of(found.slots, len(load)), placement) if found.operations else placement

        return plan


#: brought to recipes, by name
STATES = {"flexmoe": FlexMoE}
