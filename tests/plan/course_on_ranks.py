"""What every rank does in the tests of what is decided from step to step."""

from __future__ import annotations

from typing import Any

from harness.bench import train
from harness.comm.job import Job
from harness.registry import system
from harness.specs import Experiment


def trained(job: Job, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every training (``payload["experiments"]``), behind every step: who holds the experts of each layer, and the
    copies of its last batch; what this rank has sent of their parameters; whether the step ended with a task of its
    own, and what the system found out."""
    found = []
    for each in payload["experiments"]:
        experiment = Experiment.model_validate(each)
        trainer = train.Trainer(job, system(experiment.system), experiment)
        row: dict[str, Any] = {"hosts": [], "used": [], "sent": [], "first": hosts(trainer)}
        for step in range(payload["num_steps"]):
            before = job.moved.since({})
            trainer._update(trainer.training.prepare(step))
            row["sent"].append(job.moved.since(before))
            row["hosts"].append(hosts(trainer))
            row["used"].append([getattr(layer, "hosts", None) for layer in trainer.layers])
        row["used"] = [[None if each is None else each.tolist() for each in step] for step in row["used"]]
        row["moves"] = "after-step" in trainer.timelines()["step"].plan.index
        row["moved"] = getattr(trainer.after_step, "moved", [])
        found.append(row)
    return found


def hosts(trainer: train.Trainer) -> list[list[list[bool]]]:
    return [layer.exchange_.placement.hosts.tolist() for layer in trainer.layers]  # type: ignore[attr-defined, union-attr]
