"""What an experiment takes on a machine: its plan, priced and simulated, for every system, phase and cluster.

The plan is laid out by the code that lays out the executed one. A training goes through ``warm`` steps of which only
what the system learns counts, and then ``steps`` priced ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from harness.case import cases_of
from harness.errors import bad
from harness.plan.graph import Plan, Timeline
from harness.plan.machine import Machine
from harness.plan.passage import Passage, plan_alone
from harness.plan.priced_step import PricedServing, PricedTraining, gradient_bytes, own_experts
from harness.plan.simulate import simulate as schedule
from harness.registry import system as system_called
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


def layer_plans(experiment: Experiment) -> dict[str, Plan]:
    """Of phases ``exchange`` and ``layer``, by direction."""
    system = system_called(experiment.system)
    (case,) = cases_of(experiment)
    way = _planned(experiment, [system.layout(case)])[0]
    way.turns = True
    directions = ("forward", "backward") if experiment.backward else ("forward",)
    return {direction: plan_alone(way, direction) for direction in directions}  # type: ignore[arg-type]


def serving_plan(experiment: Experiment) -> Plan:
    """Of phases ``prefill`` and ``decode``."""
    system = system_called(experiment.system)
    passages = [system.layout(case) for case in cases_of(experiment)]
    return PricedServing(experiment, _planned(experiment, passages)).lay_out()


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
        moved = course.saw(step, [counts_of(case) for case in cases], [case.routing for case in cases])
        if step < warm:
            continue
        priced = PricedTraining(experiment, passages, slices, own_experts(now), moved, has_moves=course.moves)
        timeline = schedule(priced.lay_out(), machine, topology)
        totals.append(float(timeline.total_s.max()))
        if progress is not None:
            progress(f"step {step + 1} of {warm + steps}")
    return Simulation({"total": tuple(totals)}, {"step": timeline}, machine.basis)


def counts_of(case) -> np.ndarray:  # type: ignore[no-untyped-def]
    from harness.routing.certificate import expert_counts

    return expert_counts(case.routing)


def _planned(experiment: Experiment, passages: list[Passage | None]) -> list[Passage]:
    if any(passage is None for passage in passages):
        raise bad("system", experiment.system, "has bytes that nobody can plan for this model; it cannot be simulated")
    return [passage for passage in passages if passage is not None]


__all__ = ["Simulation", "layer_plans", "serving_plan", "simulate"]
