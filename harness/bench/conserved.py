"""Conservation: what each rank received in timed calls, against what its system plans and against what no system
can do without. A token that is computed elsewhere has to get there, once at least, and something of it must come home.

Where a training step's system remembers the steps before it (copies of experts, experts that change places), its course
is followed (``harness.bench.foreseen``), as far as that can be done without a clock and on a prescribed routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from harness.bench import foreseen
from harness.bench.timing import Sample
from harness.bench.witness import Verdict, settled
from harness.comm.arrivals import least_rows
from harness.comm.job import Job
from harness.dtypes import row_bytes
from harness.routing import Routing
from harness.specs import Experiment
from harness.system import Case, System
from harness.traffic import direction_bytes

if TYPE_CHECKING:
    from harness.bench.race import Contender

#: of the plan; what is counted is payload, without headers
SLACK, SLACK_BYTES = 0.01, 4096
STEPS = 3  # of a training that are compared: the first, one in the middle, the last
#: parts of an exchange that bring to a rank what it cannot do without
_ARRIVING = {"forward": ("dispatch",), "backward": ("combine_grad",), "total": ("dispatch", "combine_grad")}
Bounds = dict[str, tuple[np.ndarray | None, np.ndarray | None]]


def check(
    job: Job, system: type[System], experiment: Experiment, contender: Contender, samples: Sequence[Sample]
) -> Verdict:
    """Collective. Nothing is found wrong where bytes cannot be told: a package on a GPU may send by a transport of its
    own."""
    if job.num_ranks == 1 or (job.device.type == "cuda" and system.kind == "package"):
        return Verdict()
    in_steps = experiment.phase == "train_step"
    every = sorted({sample.rep for sample in samples})
    if in_steps and (system.remembers or system.acts_between_steps()):
        told: list[Any] = [_followed(experiment, contender, every) if job.rank == 0 else None]
    else:
        reps = sorted({every[round(i * (len(every) - 1) / (STEPS - 1))] for i in range(STEPS)}) if in_steps else every
        told = [_told(system, experiment, contender, reps) if job.rank == 0 else None]
    dist.broadcast_object_list(told, 0)
    worst: tuple[float, str] = (0.0, "")
    for sample in samples:
        if sample.rep not in told[0]:
            continue
        bounds = told[0][sample.rep][sample.direction]
        least, planned = (None if of is None else float(of[job.rank]) for of in bounds)
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


def least_of(job: Job, system: type[System], case: Case, chosen: torch.Tensor) -> np.ndarray | None:
    """Collective: rows that each rank must receive in a forward pass of ``case`` at least, [num_ranks], where its gate
    has ``chosen`` (bool [T, E]) for those of this rank's tokens that leave no doubt; None where it is not known who
    computes them."""
    known = case.model.takes_routing and case.model.capacity_factor is None
    if job.num_ranks == 1 or system.remembers or not known:
        return None
    chosen = chosen[chosen.sum(1) == case.model.top_k]  # a weight may be so small that it is none
    ids = chosen.nonzero()[:, 1].reshape(-1, case.model.top_k).cpu().numpy()
    tokens = tuple(len(ids) if rank == job.rank else 0 for rank in range(job.num_ranks))
    own = least_rows(Routing(ids, tokens, case.model.num_experts), np.asarray(system.planned_shares(case)) > 0).sum(0)
    rows = torch.as_tensor(own, device=job.device)
    dist.all_reduce(rows)
    return rows.cpu().numpy()


def _told(system: type[System], experiment: Experiment, contender: Contender, reps: Sequence[int]) -> dict[int, Bounds]:
    """By repetition and direction, bytes that each rank receives at least, and those that are planned (None: cannot be
    told), [num_ranks] each."""
    found: dict[int, Bounds] = {}
    known: dict[tuple[Any, ...], Bounds] = {}
    for rep in reps:
        if cases := contender.known_cases(rep):
            key = tuple(case.routing.ids.tobytes() for case in cases)
            if key not in known:
                known[key] = _bounds(system, experiment, cases)
            found[rep] = known[key]
        elif (rows := contender.least_rows(rep)) is not None:
            way = "total" if experiment.backward else "forward"
            found[rep] = {"total": (rows * _least_bytes(experiment, way), None)}
    return found


def _followed(experiment: Experiment, contender: Contender, reps: Sequence[int]) -> dict[int, Bounds]:
    """Likewise, of a training step whose system remembers."""
    steps = {rep: contender.timed[rep] for rep in reps if contender.known_cases(rep)}  # type: ignore[attr-defined]
    received = foreseen.received_bytes(experiment, steps.values())
    return {rep: {"total": (None, received[step])} for rep, step in steps.items() if step in received}


def _bounds(system: type[System], experiment: Experiment, cases: Sequence[Case]) -> Bounds:
    rows: list[Any] = []
    parts: list[Any] = []
    for case in cases:
        told = case.model.takes_routing and case.model.capacity_factor is None
        rows.append(least_rows(case.routing, np.asarray(system.planned_shares(case)) > 0).sum(0) if told else None)
        plan = system.planned_bytes(case)
        if plan and experiment.phase == "train_step" and case is cases[-1]:
            plan = {name: of for name, of in plan.items() if name != "regather"}  # its copies are still there
        # Gradients of dense parts are all-reduced, and sums are not counted.
        parts.append(None if plan is None else {name: of for name, of in plan.items() if name != "gradients"})
    found: Bounds = {}
    for direction in _ARRIVING:
        way = "forward" if direction == "total" and not experiment.backward else direction
        least = planned = None
        if all(each is not None for each in rows):
            least = np.sum(rows, axis=0) * _least_bytes(experiment, way)
        if all(each is not None for each in parts):
            planned = np.sum([direction_bytes(each, way).sum(0) for each in parts], axis=0)
        found[direction] = least, planned
    return found


def _least_bytes(experiment: Experiment, way: str) -> int:
    """Of a row that must arrive, there and back."""
    return sum(row_bytes(experiment, part) for part in _ARRIVING[way])
