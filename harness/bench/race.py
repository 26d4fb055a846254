"""One race on one rank: every system admitted by conformance, then all of them timed interleaved.

``run_race`` is called on every rank of a session. What a rank returns is raw: samples, errors, reasons; the rows of
the store are made of all ranks' answers in ``harness.bench.tidy``.
"""

from __future__ import annotations

import dataclasses
import socket
from typing import Any, Protocol

import torch

from harness import devices, memory, registry
from harness.bench import conformance, serve, train
from harness.bench.checkpoint import Checkpoints, resumed
from harness.bench.layer import LayerContender
from harness.bench.room import Room
from harness.bench.timing import Sample, Stopwatch, interleaved, num_cores, quiet
from harness.comm.agree import attempt, failed, first_said, status_of
from harness.comm.job import Job
from harness.layer import standin
from harness.placement import Placement
from harness.plan.graph import Timeline
from harness.routing import planned_routing
from harness.specs import SERVING, Experiment
from harness.system import Case, MoELayer, System
from harness.topology import Topology


class Contender(Protocol):
    """A system built at full size, ready to be timed."""

    @property
    def layers(self) -> list[MoELayer]:
        """First layer first."""

    def warm_up(self) -> None:
        """Run once, untimed."""

    def errors(self) -> dict[str, float]:
        """Of the last run, timed or not, against what must come out; the largest over ranks."""

    def run(self, rep: int, watch: Stopwatch) -> list[Sample]:
        """One timed repetition."""

    def timelines(self) -> dict[str, Timeline]:
        """Of the last run, by direction; none where the system is a black box."""

    def keep(self) -> list[torch.Tensor]:
        """Its turn is over: let gradients go; what it must find again in its next turn."""

    def close(self) -> None:
        """Its race is over: what it kept on disk for the case that it were not is no longer needed."""


@dataclasses.dataclass
class Trace:
    """A timeline on one rank, as plain data."""

    tasks: list[tuple[str, str, str]]  # name, lane, kind
    start_s: list[float]
    end_s: list[float]


@dataclasses.dataclass
class Outcome:
    """What one rank knows of one cell. ``status`` is of ``harness.bench.store.STATUSES``."""

    status: str = "ok"
    reason: str = ""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)  # output, input_grad, weight_grad, loss
    samples: list[Sample] = dataclasses.field(default_factory=list)
    trace: dict[str, Trace] = dataclasses.field(default_factory=dict)  # of the last repetition, by direction
    memory: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # measured, planned: bytes by part
    how: dict[str, str] = dataclasses.field(default_factory=dict)  # it ran, where it may run in several ways: in words


def run_race(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Collective. ``payload``: ``experiments`` (of one race, as plain data), ``repeats``, ``warmup``, ``checkpoints``
    (folder and how often, of trainings whose experts change places) -> ``host``, ``num_cores``, ``shared_clock``,
    ``launch_settings`` (of CUDA) and ``cells``: an ``Outcome`` as plain data by experiment digest."""
    experiments: list[Experiment] = [Experiment.model_validate(data) for data in payload["experiments"]]
    outcomes = {experiment.digest: Outcome() for experiment in experiments}
    payload = payload | _resumed(job, experiments, payload)
    contenders: list[tuple[Experiment, Contender]] = []
    room = Room(job, len(experiments))
    for experiment in experiments:
        room.clear()
        contender = admit(job, experiment, outcomes[experiment.digest], payload)
        room.take(contender)
        if contender is not None:
            contenders.append((experiment, contender))
        tell(job, {"did": "admit", "system": experiment.system})
    with quiet():
        watch = Stopwatch(job)
        for rep, which in interleaved(len(contenders), payload["repeats"]):
            experiment, contender = contenders[which]
            name_phase(job, experiment, f"timed repetition {rep}")
            with room.turn(contender, warm_up=True):
                outcomes[experiment.digest].samples += contender.run(rep, watch)
            tell(job, {"did": "time", "system": experiment.system})
    for experiment, contender in contenders:
        name_phase(job, experiment, "checking the last repetition")
        outcome = outcomes[experiment.digest]
        with room.turn(contender):
            settle(experiment, outcome, contender.errors())
            outcome.trace = {name: _trace(each) for name, each in contender.timelines().items()}
            outcome.how = {"experts": contender.layers[0].how(), "state": room.how}
            if experiment.phase == "train_step":
                outcome.how["resumed"] = payload["resumed"]
            if isinstance(contender, train.Trainer):
                name_phase(job, experiment, "counting memory")
                outcome.memory = dict(zip(("measured", "planned"), contender.memory(), strict=True))
        contender.close()
    job.phase("race finished")
    return {
        "host": socket.gethostname(),
        "num_cores": num_cores(),
        "shared_clock": job.shared_clock,
        "launch_settings": devices.launch_settings() if job.device.type == "cuda" else {},
        "cells": {cell: dataclasses.asdict(outcome) for cell, outcome in outcomes.items()},
    }


def _trace(timeline: Timeline) -> Trace:
    tasks = [(task.name, task.lane, task.kind) for task in timeline.plan.tasks]
    return Trace(tasks, timeline.start_s.tolist(), timeline.end_s.tolist())


def admit(job: Job, experiment: Experiment, outcome: Outcome, payload: dict[str, Any]) -> Contender | None:
    """Refusal, conformance at reduced shapes, build, check at full shape and warm-up; None if it may not race."""
    system = registry.system(experiment.system)
    case = make_case(experiment, job.topology, str(job.device))
    name_phase(job, experiment, "asking whether it can run")
    refused = system.missing() or no_stand_in(system, case) or system.refuse(case)
    if reason := first_said(job, refused or memory.refusal(experiment, system, case)):
        outcome.status, outcome.reason = "refused", reason
        return None

    name_phase(job, experiment, "conformance before timing")
    found = conforms(job, system, experiment)
    if found["status"] == "ok" and experiment.phase == "train_step":
        found = train.gate_case(job, system, experiment, found)
    if found["status"] == "ok" and experiment.phase in SERVING:
        found = serve.gate_case(job, system, experiment, found)
    outcome.errors = dict(found["errors"])
    if found["status"] != "ok":
        outcome.status, outcome.reason = found["status"], found["reason"]
        return None

    def build() -> Contender:
        name_phase(job, experiment, "building")
        if experiment.phase == "train_step":
            built: Contender = train.Trainer(job, system, experiment, _checkpoints(experiment, payload))
        elif experiment.phase in SERVING:
            built = serve.Server(job, system, experiment)
        else:
            built = LayerContender(job, system, experiment, case)
        catch_up(job, experiment, built, payload)
        name_phase(job, experiment, "first step at full shape")
        for _ in range(max(1, payload["warmup"])):  # once at least, for the check
            built.warm_up()
        settle(experiment, outcome, built.errors())
        return built

    contender, error = attempt(job, build)
    if reason := failed(job, error):
        outcome.status, outcome.reason = status_of(reason), reason
        return None
    return contender if outcome.status == "ok" else None


def _resumed(job: Job, experiments: list[Experiment], payload: dict[str, Any]) -> dict[str, Any]:
    """Collective: ``trainings``: the checkpoints of those whose experts change places, by experiment digest; ``step``:
    at which all trainings go on; ``resumed``: that in words, if it needs any."""
    trainings: dict[str, Checkpoints] = {}
    folder, every = payload.get("checkpoints", ("", 0))
    for experiment in experiments if folder else ():
        moves = registry.system(experiment.system).after_step.__func__ is not System.after_step.__func__  # type: ignore[attr-defined]
        if experiment.phase == "train_step" and moves:
            trainings[experiment.digest] = Checkpoints(f"{folder}/{experiment.digest}", every, job)
    step, words = resumed(job, trainings)
    if words:
        tell(job, {"did": "note", "text": words})
    return {"trainings": trainings, "step": step, "resumed": words}


def _checkpoints(experiment: Experiment, payload: dict[str, Any]) -> Checkpoints | None:
    return payload["trainings"].get(experiment.digest)


def catch_up(job: Job, experiment: Experiment, contender: Contender, payload: dict[str, Any]) -> None:
    """To the step at which the race's trainings go on: what has no checkpoint of it does the steps that are missing."""
    while isinstance(contender, train.Trainer) and contender.step < payload["step"]:
        name_phase(job, experiment, f"catching up: step {contender.step} of {payload['step']}")
        contender.warm_up()


def no_stand_in(system: type[System], case: Case) -> str | None:
    """Why ``system`` cannot wait in place of computing ``case``; None if it can, or is to compute."""
    if not case.stand_in:
        return None
    if not system.stands_in:
        return f"{system.name} has no stand-in for its computation"
    return standin.refusal(case.device, case.stand_in_costs)


def conforms(job: Job, system: type[System], experiment: Experiment) -> dict[str, Any]:
    """``conformance.gate_case``, once per session for experiments that differ only in what it reduces anyway."""
    model = experiment.model.model_dump(
        exclude={"name", "num_layers", "hidden", "ffn", "seq", "source", "interpretation"}
    )
    tokens = tuple(min(count, 16) for count in experiment.workload.tokens(job.num_ranks))
    key = repr(
        (system.name, model, experiment.dtype, sorted(experiment.options.items()), tokens, experiment.workload.seed)
    )
    if key not in _conforming:
        found = conformance.gate_case(job, system, experiment)
        if found["status"] != "ok":
            return found
        _conforming[key] = found
    return _conforming[key]


_conforming: dict[str, dict[str, Any]] = {}


def settle(experiment: Experiment, outcome: Outcome, errors: dict[str, float]) -> None:
    """Fold the errors of a check at full shape into the outcome; the worst of all checks is kept."""
    tolerance = registry.system(experiment.system).tolerance(experiment.dtype)
    wrong = {name: value for name, value in errors.items() if not value <= tolerance}
    if wrong and outcome.status == "ok":
        outcome.status = "nonconforming"
        text = ", ".join(f"{name} off by {value:.1e}" for name, value in wrong.items())
        outcome.reason = f"at full shape: {text}, allowed {tolerance:.0e}"
    for name, value in errors.items():
        outcome.errors[name] = max(value, outcome.errors.get(name, 0.0))


def make_case(
    experiment: Experiment, topology: Topology, device: str = "cpu", *, step: int = 0, layer: int = 0
) -> Case:
    """The layer that ``experiment`` asks for, experts in index order. A natural routing is planned as uniform."""
    model, workload = experiment.model, experiment.workload
    return Case(
        model,
        experiment.dtype,
        topology,
        Placement.contiguous(model.num_experts, topology.num_ranks),
        planned_routing(workload, model, topology, step=step, layer=layer),
        device,
        experiment.phase == "exchange",
        dict(experiment.options),
        experiment.cluster,
        experiment.compute == "stand-in",
    )


def name_phase(job: Job, experiment: Experiment, text: str) -> None:
    """Say what this rank does now; the digest lets the runner tell which cell a dead rank was in."""
    job.phase(f"{experiment.system} {experiment.phase}: {text} [{experiment.digest}]")


def tell(job: Job, message: dict[str, Any]) -> None:
    """Progress, once for the whole job."""
    if job.rank == 0:
        job.progress(message)
