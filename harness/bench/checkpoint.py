"""A training that outlives its ranks: its state at a boundary of steps, and the move of experts under way, on disk.

A folder holds, of the last two whole steps, ``step-N/rank-R.pt`` (parameters, optimizer state and what the system
remembers, of each rank), ``step-N/rank-R.sum`` (its checksum) and ``step-N/whole.json`` (written last: all ranks are
there; the placement of every layer's experts); and, while experts change places, ``moving.json``: the placements before
and after. Each file is written beside its name and renamed, so that whenever a rank dies both placements can be read
and the training goes on from the last whole step. A part that is damaged or missing is named, and the step before is
taken, or none.

All trainings of a race go on at one step, that of the one that is farthest: the others catch up (``resumed``).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from harness.comm.agree import of_all
from harness.comm.job import Job
from harness.errors import bad
from harness.placement import Placement
from harness.plan.moving import Move
from harness.plan.native import NativeLayer
from harness.system import AfterStep, MoELayer

NUM_KEPT = 2


class Checkpoints:
    """Of one training, in ``folder``, every ``every`` steps; 0: never. All methods are collective."""

    def __init__(self, folder: Path | str, every: int, job: Job):
        self.folder, self.every, self.job = Path(folder), every, job
        self._newest: tuple[int, list[str]] | None = None
        self._placements: list[Any] = []  # of that step

    def newest(self) -> tuple[int, list[str]]:
        """The last step that is whole on every rank, 0 for none; and what is wrong with later ones, if anything is but
        that they were being written."""
        if self._newest is None:
            self._newest = self._find()
        return self._newest

    def _find(self) -> tuple[int, list[str]]:
        notes: list[str] = []
        for step, facts, problem in self._seen_by_rank_0():
            if facts is None and not problem:
                continue  # the ranks ended while they were writing it
            problems = [problem] if problem else of_all(self.job, self._problem(step))
            if facts is not None and not any(problems):
                self._placements = facts["placements"]
                return step, notes
            notes += [each for each in dict.fromkeys(problems) if each]
        return 0, notes

    def _seen_by_rank_0(self) -> list[tuple[int, dict[str, Any] | None, str]]:
        """Of each step there is, the last first: what all ranks are to know, None if it has not become whole; and what
        is wrong with that. Nodes may see a file system that they share at different ages, and ranks that began at
        different steps would never meet."""
        seen = [self._whole(step) for step in sorted(self._steps(), reverse=True)] if self.job.rank == 0 else []
        said: list[Any] = [seen]
        if self.job.num_ranks > 1:
            dist.broadcast_object_list(said, device=self.job.device)
        return list(said[0])

    def _whole(self, step: int) -> tuple[int, dict[str, Any] | None, str]:
        path = self.folder / f"step-{step}" / "whole.json"
        try:
            facts = _read(path)
            num_ranks = facts["num_ranks"]
        except FileNotFoundError:
            return step, None, ""
        except (OSError, ValueError, KeyError) as error:
            return step, None, f"{path}: damaged ({error})"
        here = self.job.num_ranks
        return step, facts, "" if num_ranks == here else f"{path}: is of {num_ranks} ranks, not {here}"

    def _problem(self, step: int) -> str:
        """What is wrong with this rank's part of a checkpoint; empty if nothing is."""
        part = self.folder / f"step-{step}" / f"rank-{self.job.rank}.pt"
        try:
            if part.with_suffix(".sum").read_text() != _sum_of(part):
                return f"{part}: damaged (its checksum is another)"
        except (OSError, ValueError) as error:
            return f"{part}: cannot be read ({getattr(error, 'strerror', None) or error})"
        return ""

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
        path, partial = here / f"rank-{self.job.rank}.pt", here / f"rank-{self.job.rank}.partial"
        torch.save(state, partial)
        _write(path.with_suffix(".sum"), _sum_of(partial))
        partial.replace(path)
        self._meet()
        if self.job.rank == 0:
            placements = [_slots(layer) for layer in layers]
            facts = {"step": step, "num_ranks": self.job.num_ranks, "placements": placements}
            _write(here / "whole.json", json.dumps({"state": facts, "sum": _sum(facts)}))
            self._forget(step)
        self._meet()

    def restore(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Sequence[MoELayer],
        after_step: AfterStep | None,
    ) -> int:
        """Steps done by the last whole checkpoint, whose state all of them then have; 0: none. ``UserError`` for one
        that is whole and of another training; all are put aside, so that the next attempt does without them."""
        step, _ = self.newest()
        if not step:
            return 0
        here = self.folder / f"step-{step}"
        file = here / f"rank-{self.job.rank}.pt"
        try:
            state = torch.load(file, map_location=self.job.device, weights_only=True)
            for layer, slots in zip(layers, self._placements, strict=True):
                if isinstance(layer, NativeLayer) and slots is not None:
                    layer.place(Placement.of_slots(slots))
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            if after_step is not None:
                after_step.restore(state["after_step"])
        except Exception as error:  # torch has many
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            why = ""
        wrong = next(filter(None, of_all(self.job, why and f"{file}: {why}")), "")
        if wrong:
            if self.job.rank == 0:
                for number, each in self._steps().items():
                    shutil.rmtree(each.with_name(f"unfit-{number}"), ignore_errors=True)
                    each.rename(each.with_name(f"unfit-{number}"))
            path, _, words = wrong.partition(": ")
            raise bad(
                "checkpoint", path, f"is of another training ({words}); it and those before are put aside: run again"
            )
        if self.job.rank == 0:
            self._forget(step)
        return step

    def _forget(self, step: int) -> None:
        """All but ``step`` and those just before it."""
        steps = self._steps()
        kept = sorted(each for each in steps if each <= step)[-NUM_KEPT:]
        for old in set(steps) - set(kept):
            shutil.rmtree(steps[old], ignore_errors=True)

    def _steps(self) -> dict[int, Path]:
        found = ((path.name.removeprefix("step-"), path) for path in self.folder.glob("step-*"))
        return {int(number): path for number, path in found if number.isdecimal()}

    @contextmanager
    def noting(self, step: int) -> Iterator[None]:
        """While in here, ``moving.json`` says which experts are on their way, if any."""

        def moving(moves: Sequence[Move]) -> None:
            if self.job.rank == 0:
                placed = [{key: _lists(getattr(each, key)) for key in ("before", "after")} for each in moves]
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(self.folder / "moving.json", json.dumps({"step": step, "moves": placed}))

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


def resumed(job: Job, trainings: Mapping[str, Checkpoints]) -> tuple[int, str]:
    """Collective: the step at which all trainings of a race go on, of which ``trainings`` have checkpoints; and in
    words, where that is not 0 or where a checkpoint could not be used."""
    found = [checkpoints.newest() for checkpoints in trainings.values()]
    step = max((each for each, _ in found), default=0)
    words = [f"all systems go on after step {step}"] if step else []
    words += [note for _, notes in found for note in notes]
    return step, "; ".join(words)


def _slots(layer: MoELayer) -> list[list[int]] | None:
    return _lists(layer.exchange_.placement) if isinstance(layer, NativeLayer) else None


def _lists(placement: Placement) -> list[list[int]]:
    return [placement.local(rank).tolist() for rank in range(placement.hosts.shape[1])]


def _read(path: Path) -> dict[str, Any]:
    """The state in a ``whole.json``; ``ValueError`` if it is not what was written."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or found.get("sum") != _sum(found.get("state")):
        raise ValueError("its checksum is another")
    return dict(found["state"])


def _sum(state: Any) -> str:
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
