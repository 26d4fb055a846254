"""How much of what Hecate sends beside the attention is hidden, on every rank."""

from __future__ import annotations

import time
from typing import Any

from harness.bench import train
from harness.comm.job import Job
from harness.registry import system
from harness.specs import Experiment


def hidden(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Hidden part of every gather, re-gather and reduction of the last step, and the step's time and memory."""
    experiment = Experiment.model_validate(payload["experiment"])
    trainer = train.Trainer(job, system(experiment.system), experiment)
    seconds = []
    for _ in range(payload["num_steps"]):
        tokens = trainer.training.prepare(trainer.step)
        begin = time.perf_counter()
        trainer._job_loss(trainer._update(tokens))
        seconds.append(time.perf_counter() - begin)
    timeline = trainer.timelines()["step"]
    found = {
        kind: {name: float(part) for name, part in timeline.hidden(kind).items()}
        for kind in ("gather", "regather", "reduce")
    }
    spans = {
        task.name: (float(start), float(end))
        for task, start, end in zip(timeline.plan.tasks, timeline.start_s, timeline.end_s, strict=True)
    }
    measured, planned = trainer.memory() if payload.get("memory") else ({}, {})
    policy = getattr(trainer.layers[0], "policy", None)
    return {
        "hidden": found,
        "seconds": seconds,
        "spans": spans,
        "t": getattr(policy, "t", None),
        "measured": measured,
        "planned": planned,
    }
