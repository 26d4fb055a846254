"""What every rank does in the tests of Hecate."""

from __future__ import annotations

from typing import Any

from harness.bench import train, training_check
from harness.comm.job import Job
from harness.registry import system
from harness.specs import Experiment


def trained(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Losses of training beside the oracle's (on rank 0), and what was materialised, moved and kept."""
    experiment = Experiment.model_validate(payload["experiment"])
    trainer = train.Trainer(job, system(experiment.system), experiment)
    losses, hosts, names = [], [], set()
    for step in range(payload["num_steps"]):
        losses.append(trainer._job_loss(trainer._update(trainer.training.prepare(step))))
        hosts.append([(layer.hosts.sum(1) - 1).tolist() for layer in trainer.layers])
        names |= {task.name for task in trainer.timelines()["step"].plan.tasks}
    optimizer, states = trainer.training.optimizer, []
    for layer in trainer.layers:
        parameters = list(layer.experts.parameters())
        assert all(len(p) == len(layer.experts.local) for p in parameters)
        states.append(
            sum(v.numel() for p in parameters for v in optimizer.state[p].values() if getattr(v, "ndim", 0) > 0)
        )
    expected = []
    if job.rank == 0 and payload.get("oracle", True):
        expected = training_check.oracle_losses(
            experiment, system(experiment.system), job.topology, payload["num_steps"]
        )
    return {
        "losses": losses,
        "oracle": expected,
        "copies": hosts,
        "moved": trainer.after_step.moved,
        "owners": [layer.placement.owner.tolist() for layer in trainer.layers],
        "states": states,
        "names": sorted(names),
        "t": trainer.layers[0].policy.t,
    }
