"""What an experiment takes on a machine: its plan, priced and simulated, for every system, phase and cluster.

The plan is laid out by the code that lays out the executed one. A training goes through ``warm`` steps of which only
what the system learns counts, and then ``steps`` priced ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from harness.case import cases_of
from harness.errors import Unplanned, bad
from harness.plan.graph import Plan, Timeline
from harness.plan.machine import Machine
from harness.plan.passage import Direction, Passage, plan_alone
from harness.plan.priced_step import PricedServing, PricedTraining, gradient_bytes, own_experts
from harness.plan.simulate import simulate as schedule
from harness.registry import system as system_called
from harness.routing.certificate import expert_counts
from harness.specs import SERVING, Experiment
from harness.topology import Topology

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Simulation:
    """``samples``: by direction, seconds of each priced step; ``timelines``: of the last one, [num_tasks, W]."""

    samples: Mapping[str, tuple[float, ...]]
    timelines: Mapping[str, Timeline]
    basis: str
    notes: tuple[str, ...] = ()


def simulate(
    experiment: Experiment, machine: Machine, *, steps: int = 1, warm: int = 0, progress: Progress | None = None
) -> Simulation:
    """``UserError`` where the system refuses the case, or its bytes cannot be planned. ``steps`` and ``warm`` are of a
    training; all passes of other phases are alike."""
    if experiment.phase == "train_step":
        return _training(experiment, machine, steps, warm, progress)
    plans = layer_plans(experiment) if experiment.phase not in SERVING else {"pass": serving_plan(experiment)}
    topology = Topology(experiment.cluster.shape)
    timelines = {name: schedule(plan, machine, topology) for name, plan in plans.items()}
    seconds = {name: float(timeline.total_s.max()) for name, timeline in timelines.items()}
    if "pass" in seconds:
        seconds = {"total": seconds["pass"]}
    elif experiment.backward:
        seconds["total"] = sum(seconds.values())
    return Simulation({name: (value,) for name, value in seconds.items()}, timelines, machine.basis)


def layer_plans(experiment: Experiment, seen: int = 0) -> dict[str, Plan]:
    """Of phases ``exchange`` and ``layer``, by direction. ``seen``: batches of the same routing before."""
    (way,) = _passages(experiment, seen)
    way.turns = True
    directions: tuple[Direction, ...] = ("forward", "backward") if experiment.backward else ("forward",)
    return {direction: plan_alone(way, direction) for direction in directions}


def serving_plan(experiment: Experiment, seen: int = 0) -> Plan:
    """Of phases ``prefill`` and ``decode``; ``seen`` as above."""
    return PricedServing(experiment, _passages(experiment, seen)).lay_out()


def _passages(experiment: Experiment, seen: int) -> list[Passage]:
    cases = cases_of(experiment)
    course = system_called(experiment.system).course(cases)
    for step in range(seen):
        course.saw(step, [expert_counts(case.routing) for case in cases], [case.routing for case in cases])
    return _planned(experiment, course.passages(cases))


def training_plan(experiment: Experiment, seen: int = 0) -> Plan:
    """Of the first step; ``seen``: after so many batches of the same routing."""
    stream = gradient_bytes(experiment)
    cases, slices = system_called(experiment.system).settle(cases_of(experiment), stream.part_bytes, stream.scope)
    course = system_called(experiment.system).course(cases)
    for step in range(seen):
        course.saw(step, [expert_counts(case.routing) for case in cases], [case.routing for case in cases])
    passages = _planned(experiment, course.passages(cases))
    own = own_experts(course.cases(cases))
    return PricedTraining(experiment, passages, slices, own, has_moves=course.moves).lay_out()


def _training(experiment: Experiment, machine: Machine, steps: int, warm: int, progress: Progress | None) -> Simulation:
    system, topology = system_called(experiment.system), Topology(experiment.cluster.shape)
    stream = gradient_bytes(experiment)
    cases, slices = system.settle(cases_of(experiment), stream.part_bytes, stream.scope)
    course = system.course(cases)
    totals: list[float] = []
    for step in range(warm + steps):
        if step:
            fresh = cases_of(experiment, step)
            cases = [dataclasses.replace(old, routing=new.routing) for old, new in zip(cases, fresh, strict=True)]
        if step >= warm:
            now = course.cases(cases)
            passages = _planned(experiment, course.passages(cases))
        moved = course.saw(step, [expert_counts(case.routing) for case in cases], [case.routing for case in cases])
        if step < warm:
            continue
        priced = PricedTraining(experiment, passages, slices, own_experts(now), moved, has_moves=course.moves)
        timeline = schedule(priced.lay_out(), machine, topology)
        totals.append(float(timeline.total_s.max()))
        if progress is not None:
            progress(f"step {step + 1} of {warm + steps}")
    return Simulation({"total": tuple(totals)}, {"step": timeline}, machine.basis)


def _planned(experiment: Experiment, passages: list[Passage | None]) -> list[Passage]:
    if any(passage is None for passage in passages):
        remedy = "has bytes that nobody can plan for this model; it cannot be simulated"
        raise Unplanned(str(bad("system", experiment.system, remedy)))
    return [passage for passage in passages if passage is not None]


__all__ = ["Simulation", "layer_plans", "serving_plan", "simulate", "training_plan"]
