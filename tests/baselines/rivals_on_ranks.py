"""What every rank does in the tests of Hecate's rivals."""

from __future__ import annotations

from typing import Any

import torch

from harness.bench import train
from harness.comm.job import Job
from harness.plan.rearrange import Rearranger
from harness.registry import system
from harness.specs import Experiment


def trained(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Losses of training, where experts are in the end, and how much optimizer state this rank has of them."""
    experiment = Experiment.model_validate(payload["experiment"])
    trainer = train.Trainer(job, system(experiment.system), experiment)
    losses, before = [], [layer.exchange_.placement.hosts.tolist() for layer in trainer.layers]
    for step in range(payload["num_steps"]):
        losses.append(trainer._job_loss(trainer._update(trainer.training.prepare(step))))
    parameters = [p for layer in trainer.layers for p in layer.experts.parameters()]
    state = trainer.training.optimizer.state
    return {
        "losses": losses,
        "before": before,
        "hosts": [layer.exchange_.placement.hosts.tolist() for layer in trainer.layers],
        "used": [getattr(layer, "hosts", None) is not None and int(layer.hosts.sum()) for layer in trainer.layers],
        "placed": trainer.after_step.placed if isinstance(trainer.after_step, Rearranger) else 0,
        "moments": sum(len(state[p]["exp_avg"]) for p in parameters if p in state),
        "experts": {
            f"{i}.{e}.{name}": getattr(layer.experts, name)[slot].detach().double().sum().item()
            for i, layer in enumerate(trainer.layers)
            for slot, e in enumerate(layer.experts.local)
            for name in layer.experts.names
        },
        "kinds": sorted({task.kind for task in trainer.timelines()["step"].plan.tasks}),
        "elements": sum(torch.numel(p) for p in parameters),
    }
