"""What every rank does in the tests of checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from harness.bench import race
from harness.bench.checkpoint import Checkpoints
from harness.bench.train import Trainer
from harness.comm.job import Job
from harness.plan import moving
from harness.registry import system
from harness.specs import Experiment


class Counting(Checkpoints):
    """``armed`` while the move of experts number ``dies_at`` is under way."""

    num_moves, dies_at, armed = 0, 0, False

    @contextlib.contextmanager
    def noting(self, step: int) -> Iterator[None]:
        with super().noting(step):
            note = self.job.moving
            assert note is not None

            def counted(moves: Any) -> None:
                note(moves)
                self.num_moves += 1
                self.armed = self.num_moves == self.dies_at

            self.job.moving = counted
            yield


def trained(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Losses by step, in a run that goes on from its last checkpoint. ``dies_at``: the move of experts in the middle of
    which rank 1 ends."""
    experiment = Experiment.model_validate(payload["experiment"])
    checkpoints = Counting(payload["folder"], payload["every"], job)
    checkpoints.dies_at = payload["dies_at"]
    trainer = Trainer(job, system(experiment.system), experiment, checkpoints)
    began, transfer = trainer.step, moving.dist.batch_isend_irecv

    def dying(work: list[Any]) -> Any:
        if job.rank == 1 and checkpoints.armed:
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
        "notes": checkpoints.newest()[1],
        "losses": losses,
        "owners": [layer.exchange_.placement.owner.tolist() for layer in trainer.layers],
    }


def raced(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """A race: losses by system, and what it says of how it went on. It ends in its repetition ``ends_at``."""
    run = Trainer.run

    def ending(trainer: Trainer, rep: int, watch: Any) -> Any:
        if rep == payload["ends_at"]:
            raise InterruptedError
        return run(trainer, rep, watch)

    Trainer.run = ending  # type: ignore[method-assign]
    try:
        answer = race.run_race(job, payload)
    except InterruptedError:
        return {}
    finally:
        Trainer.run = run  # type: ignore[method-assign]
    cells = answer["cells"].values()
    assert {cell["status"] for cell in cells} == {"ok"}, cells
    losses = [[sample["loss"] for sample in cell["samples"]] for cell in cells]
    return {"losses": losses, "resumed": {cell["how"]["resumed"] for cell in cells}}
