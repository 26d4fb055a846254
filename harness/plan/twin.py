"""Native twins: for any system whose bytes can be planned, a plan that moves the same bytes between the same ranks.

A real package runs as a black box and cannot be simulated; its twin can, at any number of ranks. What a package puts on
the wire is recorded by the tests and equals ``System.planned_bytes``, of which the twin is made.

A skewed all-to-all lasts as long as its busiest port. It is priced as the balanced one that loads every port as much,
because that is what costs are fitted to.
"""

from __future__ import annotations

import numpy as np

from harness.plan.graph import COMPUTE, INTER, INTRA, Cost, Plan
from harness.routing.certificate import expert_counts
from harness.specs import GEMMS
from harness.system import Case, System
from harness.topology import Topology
from harness.traffic import PARTS, port_load


def twin(system: type[System], case: Case) -> dict[str, Plan] | None:
    """Plans of one layer's ``forward`` and ``backward``; None where the system's bytes cannot be planned.

    A flat exchange is one all-to-all over all ranks (scope ``flat``). One of several ``stages`` goes over rails between
    the nodes, then inside them (or back)."""
    parts = system.planned_bytes(case)
    if parts is None:
        return None
    rows = expert_counts(case.routing).sum(0) @ system.planned_shares(case)
    gemms = 0 if case.identity_experts else GEMMS[case.model.ffn_type]
    macs = gemms * rows * case.model.hidden * case.model.ffn  # of every rank
    plans = {}
    for direction, times in (("forward", 1), ("backward", 2)):
        plan = Plan()
        last: list[str] = []
        for name in PARTS[direction]:
            if name in ("combine", "dispatch_grad") and gemms:
                last = [plan.add("experts", COMPUTE, last, Cost("gemm", amount=times * macs, count=times * gemms))]
            if name in parts:
                last = _exchange(plan, name, parts[name], case.topology, last, system.stages)
        plans[direction] = plan
    return plans


def _exchange(
    plan: Plan, name: str, matrix: np.ndarray, topology: Topology, after: list[str], stages: tuple[str, ...]
) -> list[str]:
    """One part [num_ranks, num_ranks] as one task a stage."""
    if stages == ("flat",):
        return [plan.add(name, INTER, after, Cost("a2a", "flat", balanced_bytes(matrix, topology, "flat")))]
    away = name in ("metadata", "dispatch", "combine_grad")  # outer stage first; the way home the other way round
    for stage in stages if away else reversed(stages):
        cost = Cost("a2a", stage, balanced_bytes(matrix, topology, stage))
        after = [plan.add(f"{name}.{stage}", INTER if stage == "inter" else INTRA, after, cost)]
    return after


def balanced_bytes(matrix: np.ndarray, topology: Topology, scope: str) -> float:
    """Buffer of one rank in the balanced all-to-all of ``scope`` that loads the busiest port as ``matrix`` does."""
    nodes, num_ranks = topology.shape[0], topology.num_ranks
    num_local = num_ranks // nodes
    if nodes > 1 and scope in ("flat", "inter"):
        return float(port_load(matrix, topology, 0).max()) / num_local * nodes / (nodes - 1)
    inside = np.where(topology.unit_of(0)[:, None] == topology.unit_of(0), matrix, 0)
    size = num_local if scope == "intra" else num_ranks
    return float(max(inside.sum(0).max(), inside.sum(1).max())) * size / max(1, size - 1)
