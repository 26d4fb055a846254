"""MoETuner and its rivals as planners of ``moebench place``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from harness.errors import bad
from harness.placing import Placed, Placer, Request
from methods.moetuner import joint, rivals, seconds
from methods.moetuner.balance import Stage
from methods.moetuner.objective import Problem, cost_of, score
from methods.moetuner.profile import Profile

EXFLOW_LIMIT_S = 60.0  # as ExFlow's own driver has it


@functools.lru_cache(maxsize=4)
def problem_of(request: Request) -> Problem:
    """``UserError`` for fewer experts than ranks, or an impossible bandwidth matrix."""
    num_experts, num_ranks = request.model.num_experts, request.topology.num_ranks
    if num_experts < num_ranks:
        raise bad(
            "expert-parallel ranks",
            num_ranks,
            f"a layer of {request.model.name} has {num_experts} experts, one for each rank at least is needed; raise "
            "--tensor-parallel or take a smaller cluster",
        )
    cost = cost_of(request.bandwidth, num_ranks)
    return Problem(Profile.of_ids(request.profile, num_experts), cost, request.topology.unit_of(0))


def _placed(request: Request, problem: Problem, owner: np.ndarray, facts: dict[str, Any], *notes: str) -> Placed:
    held = Profile.of_ids(request.held, request.model.num_experts)
    yardstick = {"balance": problem.yardstick[0], "communication": problem.yardstick[1]}
    scores = {
        "profile": dataclasses.asdict(score(problem, owner)),
        "held-out": dataclasses.asdict(score(problem, owner, held)),
        "random": {**yardstick, "objective": 2.0 if min(yardstick.values()) else float(max(yardstick.values()) > 0)},
    }
    unused = problem.profile.unused
    if unused:
        named = "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in unused.items())
        notes = (*notes, f"no profiled token uses these experts, so they lie where there was room: {named}")
    facts = {"objective": scores["profile"]["objective"], "bound": None, "gap": None, "ended": "rule", **facts}
    return Placed(owner, facts, scores, notes)


def _stage(stage: Stage) -> dict[str, Any]:
    return {name: getattr(stage, name) for name in ("value", "bound", "gap", "ended", "time_s", "slack")}


def _notes(first: Stage, second: Stage) -> list[str]:
    notes = []
    if second.slack:
        notes.append(f"no arrangement has as many experts on every rank; a rank is off by up to {second.slack}")
    for name, stage in (("ILP 1", first), ("ILP 2", second)):
        if stage.ended == "no solver":
            why = "HiGHS is not installed (pip install 'scipy>=1.14')"
            notes.append(f"{name}: {why}: the best placement of the searches was kept, gap {stage.gap:.3g}")
        elif stage.ended == "time limit":
            notes.append(f"{name} ran into its time limit: the best feasible solution was kept, gap {stage.gap:.3g}")
        elif stage.ended == "search":
            notes.append(f"{name} was searched, not solved: its gap of {stage.gap:.3g} is proven")
    return notes


def both(request: Request) -> Placed:
    problem = problem_of(request)
    rounds = joint.ROUNDS if request.rounds is None else request.rounds
    limit = request.time_limit_s / 4
    starts = _rivals(request, problem, limit)
    found = joint.solve(problem, request.gap, request.time_limit_s - limit, rounds, starts, request.say)
    facts = {
        "bound": found.bound,
        "gap": (found.after - found.bound) / found.after if found.after else 0.0,
        "ended": found.ended,
        "two_stages": found.before,
        "rounds": found.rounds,
        **dict(zip(("load_repeats", "flow_repeats"), problem.profile.repeats, strict=True)),
        "ilp1": _stage(found.first),
        "ilp2": _stage(found.second),
    }
    notes = _notes(found.first, found.second)
    if found.ended == "time limit":
        notes.append("the annealing was ended by its time limit; the best placement was kept")
    return _placed(request, problem, found.owner, facts, *notes)


def _rivals(request: Request, problem: Problem, time_limit_s: float) -> list[np.ndarray]:
    """Placements to start from beside the two stages'."""
    request.say("rivals' placements, to start from too")
    return [rivals.exflow(problem, request.gap, time_limit_s, proven=False).owner, rivals.greedy(problem)]


def in_seconds(request: Request) -> Placed:
    prices, problem = seconds.prices_of(request), problem_of(request)
    rounds = seconds.ROUNDS if request.rounds is None else request.rounds
    starts = _rivals(request, problem, request.time_limit_s / 4)
    request.say("ILP 1 and ILP 2")
    first, second = joint.two_stages(problem, request.gap, request.time_limit_s / 2)
    starts += [second.owner, rivals.contiguous(problem)]
    owner, ended = seconds.solve(request, prices, starts, rounds, request.time_limit_s / 4)
    rows = seconds.batches(request, prices, seconds.BATCHES, 1)  # others than were searched on
    named = {"": owner, "_two_stages": second.owner, "_contiguous": starts[-1]}
    predicted = {f"predicted{name}_s": seconds.predicted_s(prices, rows, each) for name, each in named.items()}
    notes = _notes(first, second)
    if ended == "time limit":
        notes.append("the annealing was ended by its time limit; the best placement was kept")
    return _placed(request, problem, owner, {"ended": ended, **predicted}, *notes)


def two_stage(request: Request) -> Placed:
    problem = problem_of(request)
    request.say("ILP 1 and ILP 2")
    first, second = joint.two_stages(problem, request.gap, request.time_limit_s)
    parts = zip((first, second), problem.yardstick, strict=True)
    bound = sum(stage.bound / scale if scale else 0.0 for stage, scale in parts)
    value = score(problem, second.owner).objective
    gap = (value - bound) / value if value else 0.0
    ended = next((s.ended for s in (first, second) if s.ended in ("no solver", "time limit")), second.ended)
    facts = {"bound": bound, "gap": gap, "ended": ended, "ilp1": _stage(first), "ilp2": _stage(second)}
    return _placed(request, problem, second.owner, facts, *_notes(first, second))


def exflow(request: Request) -> Placed:
    problem = problem_of(request)
    request.say("ExFlow's program")
    found = rivals.exflow(problem, request.gap, min(request.time_limit_s, EXFLOW_LIMIT_S))
    return _placed(request, problem, found.owner, {"ended": found.ended, "ilp": _stage(found)})


def _rule(request: Request, rule: Any) -> Placed:
    problem = problem_of(request)
    return _placed(request, problem, rule(problem), {})


PLACERS = {
    "joint": Placer("MoETuner's two programs, then both at once", both),
    "two-stage": Placer("MoETuner's ILP 1, then ILP 2, as in the paper", two_stage),
    "seconds": Placer(
        "fewest predicted seconds of a batch: ranks that share ports and do not wait for each other", in_seconds
    ),
    "exflow": Placer("ExFlow's program: fewest tokens change ranks between layers", exflow),
    "greedy": Placer(
        "largest expert first to the least loaded rank (EPLB without replicas)",
        functools.partial(_rule, rule=rivals.greedy),
    ),
    "contiguous": Placer("index order, as Megatron-LM", functools.partial(_rule, rule=rivals.contiguous)),
    "random": Placer("as many random experts on every rank", functools.partial(_rule, rule=rivals.chance)),
}
