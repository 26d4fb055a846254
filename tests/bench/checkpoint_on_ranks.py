"""What every rank does in the tests of checkpoints."""

from __future__ import annotations

import os
from typing import Any

from harness.bench.checkpoint import Checkpoints
from harness.bench.train import Trainer
from harness.comm.job import Job
from harness.plan import moving
from harness.registry import system
from harness.specs import Experiment


def trained(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Losses by step, in a run that goes on from its last checkpoint. ``dies_at``: the move of experts in the middle of
    which rank 1 ends."""
    experiment = Experiment.model_validate(payload["experiment"])
    trainer = Trainer(job, system(experiment.system), experiment, Checkpoints(payload["folder"], payload["every"], job))
    began, transfer, num_moves = trainer.step, moving.dist.batch_isend_irecv, 0

    def dying(work: list[Any]) -> Any:
        nonlocal num_moves
        num_moves += 1
        if job.rank == 1 and num_moves == payload["dies_at"]:
            os._exit(9)
        return transfer(work)

    moving.dist.batch_isend_irecv = dying
    losses = {}
    try:
        while trainer.step < payload["num_steps"]:
            step = trainer.step
            trainer.warm_up()
            losses[step] = trainer.last_loss
    finally:
        moving.dist.batch_isend_irecv = transfer
    return {
        "began": began,
        "losses": losses,
        "owners": [layer.exchange_.placement.owner.tolist() for layer in trainer.layers],
    }
