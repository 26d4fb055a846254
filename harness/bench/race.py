"""One race on one rank: every system admitted by conformance, then all of them timed interleaved.

``run_race`` is called on every rank of a session. What a rank returns is raw: samples, errors, reasons; the rows of
the store are made of all ranks' answers in ``harness.bench.tidy``.
"""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from harness import devices, memory
from harness.bench import conformance, conserved, losses, serve, serving_check, train, training_check
from harness.bench.checkpoint import Checkpoints, resumed
from harness.bench.layer import LayerContender
from harness.bench.room import Room
from harness.bench.timing import Sample, Stopwatch, interleaved, num_cores, quiet
from harness.bench.untimed import put_back, settings
from harness.bench.witness import Verdict, first_of
from harness.case import case_of, no_layout, system_of
from harness.comm.agree import attempt, failed, first_said, status_of
from harness.comm.job import Job
from harness.layer import standin
from harness.plan.graph import Timeline
from harness.specs import SERVING, Experiment
from harness.system import Case, MoELayer, System


class Contender(Protocol):
    """A system built at full size, ready to be timed."""

    @property
    def layers(self) -> list[MoELayer]:
        """First layer first."""

    def warm_up(self) -> None:
        """Run once, untimed."""

    def check(self) -> Verdict:
        """Collective, outside the clock: of all runs since the last check, timed or not, what they made against what
        they must have made."""

    def known_cases(self, rep: int) -> list[Case]:
        """Of each MoE layer, with the routing that a timed repetition prescribed; none where none is prescribed."""

    def least_rows(self, rep: int) -> np.ndarray | None:
        """Where none is: rows that each rank must have received in a forward pass at least, [num_ranks], by what some
        layer was seen to choose; None where that is not known."""

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
    (folder and how often, of trainings whose experts change places), ``launch`` and ``distrusted`` (reasons by cell,
    found in earlier launches) -> ``host``, ``num_cores``, ``shared_clock``,
    ``launch_settings`` (of CUDA) and ``cells``: an ``Outcome`` as plain data by experiment digest."""
    experiments: list[Experiment] = [Experiment.model_validate(data) for data in payload["experiments"]]
    outcomes = {experiment.digest: Outcome() for experiment in experiments}
    payload = payload | _resumed(job, experiments, payload)
    contenders: list[tuple[Experiment, Contender]] = []
    folder = Path(payload["checkpoints"][0]) if "checkpoints" in payload else None
    room = Room(job, len(experiments), folder)
    shared: dict[Any, Any] = {}
    before, changed = settings(), dict.fromkeys(outcomes, "")
    for experiment in experiments:
        room.clear()
        contender = admit(job, experiment, outcomes[experiment.digest], payload, shared)
        changed[experiment.digest] = put_back(before)
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
            changed[experiment.digest] = put_back(before) or changed[experiment.digest]
            tell(job, {"did": "time", "system": experiment.system})
    for experiment, contender in contenders:
        name_phase(job, experiment, "checking what was timed")
        outcome = outcomes[experiment.digest]
        with room.turn(contender):
            settle(outcome, Verdict({}, first_of(job, changed[experiment.digest])))
            settle(outcome, contender.check())
            settle(
                outcome,
                conserved.check(job, system_of(experiment), experiment, contender, outcome.samples),
            )
            outcome.trace = {name: _trace(each) for name, each in contender.timelines().items()}
            outcome.how = {"experts": contender.layers[0].how(), "state": room.how}
            if experiment.phase == "train_step":
                outcome.how["resumed"] = payload["resumed"]
            if isinstance(contender, train.Trainer):
                name_phase(job, experiment, "counting memory")
                outcome.memory = dict(zip(("measured", "planned"), contender.memory(), strict=True))
        contender.close()
    compare_losses(job, contenders, outcomes)
    job.phase("race finished")
    return {
        "host": socket.gethostname(),
        "num_cores": num_cores(),
        "shared_clock": job.shared_clock,
        "launch_settings": devices.launch_settings() if job.device.type == "cuda" else {},
        "cells": {cell: dataclasses.asdict(outcome) for cell, outcome in outcomes.items()},
    }


def compare_losses(job: Job, contenders: list[tuple[Experiment, Contender]], outcomes: dict[str, Outcome]) -> None:
    """Collective: trainings of a race that are right so far, against the oracle and each other."""
    trainers = [(experiment, each) for experiment, each in contenders if isinstance(each, train.Trainer)]
    trainers = [(experiment, each) for experiment, each in trainers if outcomes[experiment.digest].status == "ok"]
    if trainers:
        name_phase(job, trainers[0][0], "comparing losses")
        for digest, verdict in losses.check(job, trainers).items():
            settle(outcomes[digest], verdict)


def _trace(timeline: Timeline) -> Trace:
    tasks = [(task.name, task.lane, task.kind) for task in timeline.plan.tasks]
    return Trace(tasks, timeline.start_s.tolist(), timeline.end_s.tolist())


def admit(
    job: Job, experiment: Experiment, outcome: Outcome, payload: dict[str, Any], shared: dict[Any, Any]
) -> Contender | None:
    """Refusal, conformance at reduced shapes, build, warm-up and its check at full shape; None if it may not race.
    ``shared``: of the race, what its contenders have in common."""
    system = system_of(experiment)
    case = case_of(experiment, str(job.device))
    name_phase(job, experiment, "asking whether it can run")
    refused = (
        no_layout(experiment)
        or experiment.lacks
        or system.missing()
        or no_stand_in(system, case)
        or system.refuse(case)
    )
    if reason := first_said(job, refused or memory.refusal(experiment, system, case)):
        outcome.status, outcome.reason = "refused", reason
        return None

    name_phase(job, experiment, "conformance before timing")
    found = conforms(job, system, experiment)
    if found["status"] == "ok" and experiment.phase == "train_step":
        found = training_check.gate_case(job, system, experiment, found)
    if found["status"] == "ok" and experiment.phase in SERVING:
        found = serving_check.gate_case(job, system, experiment, found)
    outcome.errors = dict(found["errors"])
    if found["status"] != "ok":
        outcome.status, outcome.reason = found["status"], found["reason"]
        return None

    if case.stand_in:
        name_phase(job, experiment, "checking it with real computation")
        verdict, error = attempt(job, lambda: checked_for_real(job, system, experiment, payload))
        if reason := failed(job, error):
            outcome.status, outcome.reason = status_of(reason), reason
            return None
        settle(outcome, verdict or Verdict())

    def build() -> Contender:
        name_phase(job, experiment, "building")
        built = make(job, system, experiment, case, shared, payload)
        catch_up(job, experiment, built, payload)
        name_phase(job, experiment, "first step at full shape")
        for _ in range(max(1, payload["warmup"])):  # once at least, for the check
            built.warm_up()
        settle(outcome, built.check())
        return built

    if outcome.status != "ok":
        return None
    contender, error = attempt(job, build)
    if reason := failed(job, error):
        outcome.status, outcome.reason = status_of(reason), reason
        return None
    return contender if outcome.status == "ok" else None


def make(
    job: Job,
    system: type[System],
    experiment: Experiment,
    case: Case,
    shared: dict[Any, Any],
    payload: dict[str, Any],
) -> Contender:
    """Collective: the contender of the experiment's phase."""
    num_calls = max(1, payload.get("warmup", 0)) + payload.get("repeats", 0)
    if experiment.phase == "train_step":
        checkpoints = payload.get("trainings", {}).get(experiment.digest)
        return train.Trainer(job, system, experiment, checkpoints, num_calls)
    if experiment.phase in SERVING:
        return serve.Server(job, system, experiment, shared=shared, num_calls=num_calls)
    return LayerContender(job, system, experiment, case, shared)


def checked_for_real(job: Job, system: type[System], experiment: Experiment, payload: dict[str, Any]) -> Verdict:
    """Collective: once a run, in its first launch, a call of what will stand in for computation, computed. Later
    launches are told what was found (``distrusted``)."""
    if (reason := payload.get("distrusted", {}).get(experiment.digest)) is not None:
        return Verdict({}, reason.removeprefix("at full shape: "))
    if payload.get("launch", 0):
        return Verdict()
    real = experiment.model_copy(update={"compute": "real"})
    contender = make(job, system, real, case_of(real, str(job.device)), {}, {})
    contender.warm_up()
    verdict = contender.check()
    return dataclasses.replace(verdict, reason=verdict.reason and f"with real computation {verdict.reason}")


def _resumed(job: Job, experiments: list[Experiment], payload: dict[str, Any]) -> dict[str, Any]:
    """Collective: ``trainings``: the checkpoints of those whose experts change places, by experiment digest; ``step``:
    at which all trainings go on; ``resumed``: that in words, if it needs any."""
    trainings: dict[str, Checkpoints] = {}
    folder, every = payload.get("checkpoints", ("", 0))
    for experiment in experiments if folder else ():
        if experiment.phase == "train_step" and system_of(experiment).acts_between_steps():
            trainings[experiment.digest] = Checkpoints(f"{folder}/{experiment.digest}", every, job)
    step, words = resumed(job, trainings)
    if words:
        tell(job, {"did": "note", "text": words})
    return {"trainings": trainings, "step": step, "resumed": words}


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
    options, seed = sorted(experiment.options.items()), experiment.workload.seed
    key = repr((system.name, model, experiment.formats, options, tokens, seed, experiment.groups))
    if key not in _conforming:
        found = conformance.gate_case(job, system, experiment)
        if found["status"] != "ok":
            return found
        _conforming[key] = found
    return _conforming[key]


_conforming: dict[str, dict[str, Any]] = {}


def settle(outcome: Outcome, verdict: Verdict) -> None:
    """Fold a check at full shape into the outcome; the worst of all checks is kept."""
    if verdict.reason and outcome.status == "ok":
        outcome.status, outcome.reason = "nonconforming", f"at full shape: {verdict.reason}"
    for name, value in verdict.errors.items():
        outcome.errors[name] = max(value, outcome.errors.get(name, 0.0))


def name_phase(job: Job, experiment: Experiment, text: str) -> None:
    """Say what this rank does now; the digest lets the runner tell which cell a dead rank was in."""
    job.phase(f"{experiment.system} {experiment.phase}: {text} [{experiment.digest}]")


def tell(job: Job, message: dict[str, Any]) -> None:
    """Progress, once for the whole job."""
    if job.rank == 0:
        job.progress(message)
