"""What every rank does in the tests of bytes that trainings send whose experts move, and systems that send others than
they plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from baselines import smartmoe
from harness import registry
from harness.bench import conserved, train
from harness.bench.timing import Stopwatch
from harness.comm import wire
from harness.comm.job import Job
from harness.plan.rearrange import Rearranger
from harness.specs import Experiment
from harness.system import AfterStep, Case, MoELayer


class Forgets(smartmoe.SmartMoE):
    """Experts move without their moments: two thirds of what is planned for that."""

    name = "forgets"

    @classmethod
    def after_step(cls, layers: Sequence[MoELayer], case: Case, job: Job) -> AfterStep:
        forgets = dataclasses.replace(smartmoe.following(case), optimizer_state=False)
        return Rearranger(job, layers, forgets)  # type: ignore[arg-type]


class Chatters(smartmoe.SmartMoE):
    """A tenth more is sent than planned, behind every step."""

    name = "chatters"

    @classmethod
    def after_step(cls, layers: Sequence[MoELayer], case: Case, job: Job) -> AfterStep:
        moves = super().after_step(layers, case, job)
        assert isinstance(moves, Rearranger)
        return Chatter(job, layers, moves.following)  # type: ignore[arg-type]


class Chatter(Rearranger):
    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        super().__call__(optimizer, step)
        model, tokens = self.layers[0].model, 64
        rows = 4 * len(self.layers) * tokens * model.top_k // 10  # there and back, forward and backward
        sent = torch.zeros(rows - rows % self.job.num_ranks, model.hidden, dtype=torch.float64)
        wire.all_to_all_single(torch.empty_like(sent), sent)


PLANTED = (Forgets, Chatters)


def checked(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Of every training (``payload["experiments"]``), by system: what is wrong with its bytes, and how many of its
    steps had been foreseen."""
    registry.systems().update({each.name: each for each in PLANTED})
    found = {}
    try:
        for each in payload["experiments"]:
            experiment = Experiment.model_validate(each)
            system = registry.system(experiment.system)
            trainer, watch = train.Trainer(job, system, experiment), Stopwatch(job)
            samples = [sample for rep in range(payload["num_steps"]) for sample in trainer.run(rep, watch)]
            foreseen = conserved._followed(experiment, trainer, range(payload["num_steps"]))
            verdict = conserved.check(job, system, experiment, trainer, samples)
            found[system.name] = verdict.reason, len(foreseen)
    finally:
        for planted in PLANTED:
            registry.systems().pop(planted.name, None)
    return found
