"""Native twins: for any system whose bytes can be planned, a plan that moves the same bytes between the same ranks.

A real package runs as a black box and cannot be simulated; its twin can, at any number of ranks. What a package puts on
the wire is recorded by the tests and equals ``System.planned_bytes``, of which the twin is made.
"""

from __future__ import annotations

import numpy as np

from harness.layer.work import expert_macs
from harness.plan.cost import Compute, Transfer
from harness.plan.graph import COMPUTE, INTER, INTRA, Plan
from harness.routing.certificate import expert_counts
from harness.specs import GEMMS
from harness.system import Case, System
from harness.traffic import PARTS


def twin(system: type[System], case: Case) -> dict[str, Plan] | None:
    """Plans of one layer's ``forward`` and ``backward``; None where the system's bytes cannot be planned.

    A flat exchange is one all-to-all over all ranks (scope ``flat``). One of several ``stages`` goes over rails between
    the nodes, then inside them (or back)."""
    parts = system.planned_bytes(case)
    if parts is None:
        return None
    rows = expert_counts(case.routing).sum(0) @ system.planned_shares(case)
    gemms = 0 if case.identity_experts else GEMMS[case.model.ffn_type]
    macs = rows * expert_macs(case.model)  # of every rank
    plans = {}
    for direction, times in (("forward", 1), ("backward", 2)):
        plan = Plan()
        last: list[str] = []
        for name in PARTS[direction]:
            if name in ("combine", "dispatch_grad") and gemms:
                last = [plan.add("experts", COMPUTE, last, Compute(times * macs, times * gemms))]
            if name in parts:
                last = _exchange(plan, name, parts[name], last, system.stages)
        plans[direction] = plan
    return plans


def _exchange(plan: Plan, name: str, matrix: np.ndarray, after: list[str], stages: tuple[str, ...]) -> list[str]:
    """One part [num_ranks, num_ranks] as one task a stage."""
    if stages == ("flat",):
        return [plan.add(name, INTER, after, Transfer("a2a", "flat", matrix))]
    away = name in ("metadata", "dispatch", "combine_grad")  # outer stage first; the way home the other way round
    for stage in stages if away else reversed(stages):
        lane = INTER if stage == "inter" else INTRA
        after = [plan.add(f"{name}.{stage}", lane, after, Transfer("a2a", stage, matrix))]
    return after
