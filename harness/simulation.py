"""What an experiment takes on a machine: its plan, priced and simulated, for every system, phase and cluster.

The plan is laid out by the code that lays out the executed one. A training goes through ``warm`` steps of which only
what the system learns counts, and then ``steps`` priced ones.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from harness import ledger
from harness.case import cases_of, outlines_of, system_of
from harness.comm.moved import MOVES
from harness.errors import Unplanned, bad
from harness.plan.cost import Cost, Hold, transfers
from harness.plan.graph import Plan, Price, Timeline
from harness.plan.machine import Machine
from harness.plan.passage import Direction, Passage, plan_alone
from harness.plan.priced import PricedReplicated
from harness.plan.priced_step import PricedServing, PricedTraining, gradient_bytes, own_experts
from harness.plan.profiled import Profiled
from harness.plan.simulate import simulate as schedule
from harness.routing import Routing
from harness.routing.outline import Outlined
from harness.specs import SERVING, Experiment
from harness.topology import Topology

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Simulation:
    """``samples``: by direction, seconds of each priced step; ``timelines``: of the last one, [num_tasks, W].

    Where routing goes on, ``first`` is the number of the first priced step, and ``moved`` says of each what of experts'
    parameters all ranks have sent in it, in bytes by what for (``harness.comm.moved``)."""

    samples: Mapping[str, tuple[float, ...]]
    timelines: Mapping[str, Timeline]
    basis: str
    notes: tuple[str, ...] = ()
    first: int = 0
    moved: tuple[Mapping[str, float], ...] = ()
    heldout_error: float | None = None  # of the machine, where it is known (``harness.heldout``)


def simulate(
    experiment: Experiment,
    machine: Machine,
    *,
    steps: int = 1,
    warm: int = 0,
    whole: bool = False,
    progress: Progress | None = None,
) -> Simulation:
    """``UserError`` where the system refuses the case, or its bytes cannot be planned. ``steps`` and ``warm`` are of a
    training or a replay. All passes of other phases are alike, but for the first where a system remembers the batch
    before: that is none of those that are timed. ``whole``: every token of a training is drawn, however large."""
    links = machine.links
    with ledger.telling(links.calibration if isinstance(links, Profiled) else None):
        if experiment.phase == "train_step":
            return _training(experiment, machine, steps, warm, whole, progress)
        return _replayed(experiment, machine, steps, warm) if experiment.goes_on else _passes(experiment, machine)


def _passes(experiment: Experiment, machine: Machine) -> Simulation:
    seen = int(system_of(experiment).remembers)
    serves = experiment.phase in SERVING
    plans = {"pass": serving_plan(experiment, seen)} if serves else layer_plans(experiment, seen)
    topology = Topology(experiment.cluster.shape)
    timelines = {name: schedule(plan, machine, topology) for name, plan in plans.items()}
    seconds = {name: float(timeline.total_s.max()) for name, timeline in timelines.items()}
    if "pass" in seconds:
        seconds = {"total": seconds["pass"]}
    elif experiment.backward:
        seconds["total"] = sum(seconds.values())
    return Simulation({name: (value,) for name, value in seconds.items()}, timelines, machine.basis)


def _replayed(experiment: Experiment, machine: Machine, steps: int, warm: int) -> Simulation:
    """Passes of a server, each with the routing of its step."""
    topology, totals, moved, course = Topology(experiment.cluster.shape), [], [], None
    for step in range(warm + steps):
        cases = cases_of(experiment, step, routings=outlines_of(experiment, step))
        course = course or system_of(experiment).course(cases)
        if step >= warm:
            passages = _planned(experiment, course.passages(cases))
            timeline = schedule(PricedServing(experiment, passages).lay_out(), machine, topology)
            totals.append(float(timeline.total_s.max()))
            moved.append(_moved(experiment, passages, None))
        course.saw(step, [case.routing for case in cases])
    return Simulation({"total": tuple(totals)}, {"pass": timeline}, machine.basis, first=warm, moved=tuple(moved))


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
    cases = cases_of(experiment, routings=outlines_of(experiment))
    course = system_of(experiment).course(cases)
    for step in range(seen):
        course.saw(step, [case.routing for case in cases])
    return _planned(experiment, course.passages(cases))


def training_plan(experiment: Experiment, seen: int = 0) -> Plan:
    """Of the first step; ``seen``: after so many batches of the same routing."""
    training = Training(experiment)
    for step in range(seen):
        training.course.saw(step, [case.routing for case in training.cases])
    return training.lay_out()


class Training:
    """``whole``: no sample stands for the tokens. ``passages`` and ``own`` (experts that each rank keeps, int [W]): of
    the step that was decided last."""

    passages: list[Passage]
    own: np.ndarray

    def __init__(self, experiment: Experiment, *, whole: bool = False, priced: bool = True):
        self.experiment, self.whole = experiment, whole
        stream, system = gradient_bytes(experiment), system_of(experiment)
        cases = cases_of(experiment, routings=outlines_of(experiment, whole=whole, fewer=not priced))
        self.cases, self.slices = system.settle(cases, stream.part_bytes, stream.scope)
        self.course = system.course(self.cases)
        self.course.train()

    def come_to(self, step: int, *, priced: bool) -> None:
        """Its routing is that of the coming step."""
        fresh = outlines_of(self.experiment, step, whole=self.whole, fewer=not priced)
        pairs = zip(self.cases, fresh, strict=True)
        self.cases = [dataclasses.replace(case, routing=routing) for case, routing in pairs]

    def decide(self) -> None:
        """What each layer of the coming step does, and which experts ranks have for it."""
        self.own = own_experts(self.course.cases(self.cases))
        self.passages = _planned(self.experiment, self.course.passages(self.cases))

    def lay_out(self, price: Price = lambda cost: cost) -> Plan:
        """The coming step, up to what is done behind it."""
        self.decide()
        step = PricedTraining(self.experiment, self.passages, self.slices, self.own, has_moves=self.course.moves)
        return step.lay_out(price)

    def saw(self, step: int, timeline: Timeline | None) -> Cost | None:
        return self.course.saw(step, [case.routing for case in self.cases], timeline)


def _training(
    experiment: Experiment, machine: Machine, steps: int, warm: int, whole: bool, progress: Progress | None
) -> Simulation:
    topology, training = Topology(experiment.cluster.shape), Training(experiment, whole=whole, priced=not warm)
    totals: list[float] = []
    sent: list[dict[str, float]] = []
    for step in range(warm + steps):
        timeline = None
        priced = step >= warm or training.course.watches(step)
        if step:
            training.come_to(step, priced=priced)
        if priced:
            timeline = schedule(training.lay_out(machine.priced), machine, topology)
        moved = training.saw(step, timeline) if training.course.learns else None
        if step >= warm and timeline is not None:
            timeline = timeline if moved is None else ended(timeline, moved, machine, topology)
            totals.append(float(timeline.total_s.max()))
            sent.append(_moved(experiment, training.passages, moved))
        if progress is not None:
            progress(f"step {step + 1} of {warm + steps}")
    assert timeline is not None
    notes = (*notes_of([case.routing for case in training.cases]), *training.course.notes)
    samples, timelines = {"total": tuple(totals)}, {"step": timeline}
    return Simulation(samples, timelines, machine.basis, notes, first=warm, moved=tuple(sent))


def _moved(experiment: Experiment, passages: Sequence[Passage], behind: Cost | None) -> dict[str, float]:
    """Of a step of ``passages``, with what was moved ``behind`` it."""
    found = collections.Counter({MOVES: float(sum(each.matrix.sum() for each in transfers([behind])))})
    for passage in (part for whole in passages for part in whole.of_groups):
        if isinstance(passage, PricedReplicated):
            found.update(passage.copied_bytes(backward=experiment.backward))
    return {kind: num_bytes for kind, num_bytes in found.items() if num_bytes}


def notes_of(routings: Sequence[Routing]) -> tuple[str, ...]:
    """What was told from a sample, in the last step."""
    outlines = [each for each in routings if isinstance(each, Outlined) and each.few is not None]
    of = [each for each in outlines if each.sampled or each.estimated]
    if not of:
        return ()
    told = ["which tokens share a rank or node"] if any(each.sampled for each in of) else []
    told += ["loads of experts"] if any(each.estimated for each in of) else []
    few = f"{of[0].few} of {max(of[0].tokens)} tokens a rank in {len(of)} of {len(routings)} layers"
    return (f"from a sample, {few}, fewer in steps of warm-up: {' and '.join(told)}",)


def ended(timeline: Timeline, moved: Cost, machine: Machine, topology: Topology) -> Timeline:
    """``timeline`` [num_tasks, W] of a step whose last task, ``after-step``, was free, with what that costs."""
    (*_, last) = timeline.plan.tasks
    alone = Plan(timeline.plan.lanes)
    alone.add("begun", last.lane, (), Hold(timeline.start_s[-1]))
    alone.add(last.name, last.lane, ("begun",), moved)
    found = schedule(alone, machine, topology)
    plan = timeline.plan.priced(lambda cost: cost)
    plan.tasks[-1] = dataclasses.replace(last, cost=moved)
    start, end = (
        np.concatenate([whole[:-1], part[-1:]])
        for whole, part in ((timeline.start_s, found.start_s), (timeline.end_s, found.end_s))
    )
    return Timeline(plan, start, end)


def _planned(experiment: Experiment, passages: list[Passage | None]) -> list[Passage]:
    if any(passage is None for passage in passages):
        remedy = "has bytes that nobody can plan for this model; it cannot be simulated"
        raise Unplanned(str(bad("system", experiment.system, remedy)))
    return [passage for passage in passages if passage is not None]


__all__ = ["Simulation", "layer_plans", "serving_plan", "simulate", "training_plan"]
