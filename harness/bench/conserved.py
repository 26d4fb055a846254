"""Conservation: what each rank received in every timed call, against what its system plans and against what no system
can do without. A token that is computed elsewhere has to get there, once at least, and something of it must come home.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.bench.timing import Sample
from harness.bench.witness import Verdict, settled
from harness.comm.arrivals import least_rows
from harness.comm.job import Job
from harness.specs import DTYPE_BYTES, Experiment
from harness.system import Case, System
from harness.traffic import direction_bytes

#: of the plan; what is counted is payload, without headers
SLACK, SLACK_BYTES = 0.01, 4096
_DIRECTIONS = {"forward": 1, "backward": 1, "total": 2}  # ways there and back


def check(
    job: Job, system: type[System], experiment: Experiment, cases: Sequence[Case], samples: Sequence[Sample]
) -> Verdict:
    """Collective. ``cases``: one per MoE layer, whose routing is what ran. Nothing is found wrong where bytes cannot be
    told: a package on a GPU may send by a transport of its own."""
    if job.num_ranks == 1 or not cases or (job.device.type == "cuda" and system.kind == "package"):
        return Verdict()
    directions = {sample.direction for sample in samples}
    forward_only = not experiment.backward
    bounds = {direction: _bounds(system, experiment, cases, direction, forward_only) for direction in directions}
    worst: tuple[float, str] = (0.0, "")
    for sample in samples:
        least, planned = (None if of is None else float(of[job.rank]) for of in bounds[sample.direction])
        found, where = sample.received_bytes, f"rank {job.rank} in {sample.direction} of repetition {sample.rep}"
        for wanted, why, above in (
            (least, "by the routing it needs at least", False),
            (planned, "planned are", system.kind == "native" and not experiment.model_parallel),
        ):
            if wanted is None:
                continue
            too_little = wanted * (1 - SLACK) - SLACK_BYTES - found
            too_much = found - wanted * (1 + SLACK) - SLACK_BYTES if above else 0.0
            excess = max(too_little, too_much) / max(wanted, 1.0)
            if excess > worst[0]:
                worst = excess, f"{where} received {found:,} bytes, {why} {wanted:,.0f}"
    return settled(job, worst)


def _bounds(
    system: type[System], experiment: Experiment, cases: Sequence[Case], direction: str, forward_only: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Bytes that each rank receives at least, and those that are planned (None: cannot be told), [num_ranks] each."""
    ways = 1 if forward_only else _DIRECTIONS[direction]
    least: np.ndarray | None = np.zeros(cases[0].topology.num_ranks)
    planned: np.ndarray | None = np.zeros(cases[0].topology.num_ranks)
    for case in cases:
        model = case.model
        if not model.takes_routing or model.capacity_factor is not None:
            least = None
        elif least is not None:
            rows = least_rows(case.routing, np.asarray(system.planned_shares(case)) > 0).sum(0)
            least = least + ways * rows * model.hidden * DTYPE_BYTES[case.dtype]
        parts = system.planned_bytes(case) if experiment.exactly_planned else None
        if parts is None:
            planned = None
        elif planned is not None:
            planned = planned + direction_bytes(parts, "forward" if forward_only else direction).sum(0)
    return least, planned
