"""What every rank does to see how much of what Hecate sends is hidden."""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np

from harness.bench import train
from harness.case import system_of
from harness.comm.job import Job
from harness.plan.graph import Plan, Timeline
from harness.specs import Experiment


def traced(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Seconds and timelines of every step, and memory."""
    experiment = Experiment.model_validate(payload["experiment"])
    trainer, seconds, timelines = train.Trainer(job, system_of(experiment), experiment), [], []
    for _ in range(payload["num_steps"]):
        tokens = trainer.training.prepare(trainer.step)
        begin = time.perf_counter()
        trainer._job_loss(trainer._update(tokens))
        seconds.append(time.perf_counter() - begin)
        timelines.append(trainer.timelines()["step"])
    trainer.training.gpt.blocks[0].moe_norm.register_forward_pre_hook(_collects)
    measured, planned = trainer.memory()
    return {
        "seconds": seconds,
        "steps": [
            {
                "tasks": [(task.name, task.lane, task.kind) for task in timeline.plan.tasks],
                "start_s": timeline.start_s.tolist(),
                "end_s": timeline.end_s.tolist(),
            }
            for timeline in timelines
        ],
        "t": getattr(getattr(trainer.layers[0], "policy", None), "t", None),
        "copies": [int((layer.hosts.sum(1) - 1).sum()) for layer in trainer.layers if hasattr(layer, "hosts")],
        "measured": measured,
        "planned": planned,
    }


def _collects(*_: Any) -> None:
    """As the collector may at any time, of what earlier calls left in circles."""
    gc.collect()


def timeline_of(found: list[dict[str, Any]], step: int = -1) -> Timeline:
    """[num_tasks, ranks] of one step, of what all ranks returned."""
    of_ranks, plan = [each["steps"][step] for each in found], Plan()
    for name, lane, kind in of_ranks[0]["tasks"]:
        plan.add(name, lane, kind=kind)
    start, end = (np.array([each[key] for each in of_ranks]).T for key in ("start_s", "end_s"))
    return Timeline(plan, start - start.min(), end - start.min())
