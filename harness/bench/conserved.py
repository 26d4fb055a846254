"""Conservation: what each rank received in every timed call, against what its system plans and against what no system
can do without. A token that is computed elsewhere has to get there, once at least, and something of it must come home.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

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
    bounds: list[Any] = [_bounds(system, experiment, cases) if job.rank == 0 else None]
    dist.broadcast_object_list(bounds, 0)
    worst: tuple[float, str] = (0.0, "")
    for sample in samples:
        least, planned = (None if of is None else float(of[job.rank]) for of in bounds[0][sample.direction])
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
    system: type[System], experiment: Experiment, cases: Sequence[Case]
) -> dict[str, tuple[np.ndarray | None, np.ndarray | None]]:
    """By direction, bytes that each rank receives at least, and those that are planned (None: cannot be told),
    [num_ranks] each."""
    rows: list[Any] = []
    parts: list[Any] = []
    for case in cases:
        told = case.model.takes_routing and case.model.capacity_factor is None
        rows.append(least_rows(case.routing, np.asarray(system.planned_shares(case)) > 0).sum(0) if told else None)
        plan = system.planned_bytes(case) if experiment.exactly_planned else None
        # Gradients of dense parts are all-reduced, and sums are not counted.
        parts.append(None if plan is None else {name: of for name, of in plan.items() if name != "gradients"})
    row_bytes = cases[0].model.hidden * DTYPE_BYTES[cases[0].dtype]
    found: dict[str, tuple[np.ndarray | None, np.ndarray | None]] = {}
    for direction, ways in _DIRECTIONS.items():
        forward_only = direction == "total" and not experiment.backward
        least = planned = None
        if all(each is not None for each in rows):
            least = np.sum(rows, axis=0) * row_bytes * (1 if forward_only else ways)
        if all(each is not None for each in parts):
            way = "forward" if forward_only else direction
            planned = np.sum([direction_bytes(each, way).sum(0) for each in parts], axis=0)
        found[direction] = least, planned
    return found
