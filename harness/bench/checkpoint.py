"""A training that outlives its ranks: its state at a boundary of steps, and the move of experts under way, on disk.

A folder holds ``step-N/rank-R.pt`` (parameters, optimizer state and what the system remembers, of each rank),
``latest.json`` (the step that is whole on all ranks, and the placement of every layer's experts at it) and, while
experts change places, ``moving.json``: the placements before and after. Each file is written beside its name and
renamed, ``latest.json`` last of all, so that whenever a rank dies both placements can be read and the training goes on
from the last whole step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from harness.comm.job import Job
from harness.errors import bad
from harness.placement import Placement
from harness.plan.moving import Move
from harness.plan.native import NativeLayer
from harness.system import AfterStep, MoELayer


class Checkpoints:
    """Of one training, in ``folder``, every ``every`` steps; 0: never. All methods are collective."""

    def __init__(self, folder: Path | str, every: int, job: Job):
        self.folder, self.every, self.job = Path(folder), every, job
        if job.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Sequence[MoELayer],
        after_step: AfterStep | None,
    ) -> None:
        """After ``step`` steps, where that is due."""
        if not self.every or step % self.every:
            return
        here = self.folder / f"step-{step}"
        here.mkdir(parents=True, exist_ok=True)
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
        if after_step is not None:
            state["after_step"] = after_step.state()
        path = here / f"rank-{self.job.rank}.pt"
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        self._meet()
        if self.job.rank == 0:
            latest = {"step": step, "num_ranks": self.job.num_ranks, "placements": [_slots(layer) for layer in layers]}
            _write(self.folder / "latest.json", latest)
            for old in self.folder.glob("step-*"):
                if old != here:
                    shutil.rmtree(old)
        self._meet()

    def restore(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Sequence[MoELayer],
        after_step: AfterStep | None,
    ) -> int:
        """Steps done by the last whole checkpoint, whose state all of them then have; 0: none."""
        path, remedy = self.folder / "latest.json", "is no whole checkpoint; remove its folder to begin anew"
        text, error = self._read_by_rank_0(path)
        if error:
            raise bad("checkpoint", str(path), f"{remedy} ({error})")
        if text is None:
            return 0
        try:
            latest: dict[str, Any] = json.loads(text)
            step, num_ranks, placements = latest["step"], latest["num_ranks"], latest["placements"]
        except (ValueError, KeyError, TypeError) as error:
            raise bad("checkpoint", str(path), f"{remedy} ({error})") from None
        if (num_ranks, len(placements)) != (self.job.num_ranks, len(layers)):
            there = f"{num_ranks} ranks and {len(placements)} layers"
            raise bad("checkpoint", str(path), f"is of {there}, not {self.job.num_ranks} and {len(layers)}")
        file = self.folder / f"step-{step}" / f"rank-{self.job.rank}.pt"
        try:
            state = torch.load(file, map_location=self.job.device, weights_only=True)
        except Exception as error:  # torch has many
            raise bad("checkpoint", str(file), f"{remedy} ({' '.join(str(error).split())[:200]})") from None
        for layer, slots in zip(layers, placements, strict=True):
            if isinstance(layer, NativeLayer) and slots is not None:
                layer.place(Placement.of_slots(slots))
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if after_step is not None:
            after_step.restore(state["after_step"])
        return int(step)

    def _read_by_rank_0(self, path: Path) -> tuple[str | None, str]:
        """Text of ``path``, None if there is no such file, and what was wrong: the same on all ranks. Nodes may see a
        file system that they share at different ages, and ranks that began at different steps would never meet."""
        found: list[tuple[str | None, str]] = [(None, "")]
        if self.job.rank == 0:
            try:
                found = [(path.read_text(), "")]
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                found = [(None, str(error))]
        if self.job.num_ranks > 1:
            dist.broadcast_object_list(found, device=self.job.device)
        return found[0]

    @contextmanager
    def noting(self, step: int) -> Iterator[None]:
        """While in here, ``moving.json`` says which experts are on their way, if any."""

        def moving(moves: Sequence[Move]) -> None:
            if self.job.rank == 0:
                placed = [{key: _lists(getattr(each, key)) for key in ("before", "after")} for each in moves]
                _write(self.folder / "moving.json", {"step": step, "moves": placed})

        self.job.moving = moving
        try:
            yield
        finally:
            self.job.moving = None
        if self.job.rank == 0:  # not where a rank failed
            (self.folder / "moving.json").unlink(missing_ok=True)

    def remove(self) -> None:
        """The training is done."""
        self._meet()
        if self.job.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _meet(self) -> None:
        if self.job.num_ranks > 1:
            dist.barrier()


def _slots(layer: MoELayer) -> list[list[int]] | None:
    return _lists(layer.exchange_.placement) if isinstance(layer, NativeLayer) else None


def _lists(placement: Placement) -> list[list[int]]:
    return [placement.local(rank).tolist() for rank in range(placement.hosts.shape[1])]


def _write(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data))
    partial.replace(path)
