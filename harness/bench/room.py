"""Room for all contenders of a race, which take turns (A B B A) until its end.

If the device has room for all of them, each stays there. If not, whoever is not at work waits elsewhere (parameters,
optimizer state, caches): of a GPU in the host's memory, of CPUs in files that have no name any more. Its turn begins
with coming back and one untimed step, so that the allocator has found its blocks before the clock runs. Which of the
two is decided from what the contenders that are there have been seen to hold, for all ranks alike, and stands in the
rows.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.launch.kernel import give_back

if TYPE_CHECKING:
    from harness.bench.race import Contender

SHARE = 0.8  # of the device that may be counted on
HOST_SHARE = 0.8  # of the host's memory, and of its disk


def fits(num_contenders: int, kept_bytes: float, passing_bytes: float, device_bytes: float) -> bool:
    """Whether all may stay on the device: each holds ``kept_bytes`` between its turns, and one at a time needs
    ``passing_bytes`` beside. Those not seen yet may need more within a turn: twice as much is reckoned with.

    >>> fits(3, 20e9, 10e9, 80e9), fits(2, 20e9, 10e9, 80e9)
    (False, True)
    """
    return num_contenders * kept_bytes + 2 * passing_bytes <= SHARE * device_bytes


def in_memory(folder: Path) -> bool:
    """Whether what is written there takes the machine's memory."""
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    path = next((each for each in (folder.resolve(), *folder.resolve().parents) if each in mounts), None)
    return path is not None and mounts[path] in ("tmpfs", "ramfs")


class Room:
    """Of one rank; collective: every rank makes the same calls. ``num_contenders``: as many as may come; ``folder``:
    for those that wait, where the folder for temporary files is no disk."""

    def __init__(self, job: Job, num_contenders: int, folder: Path | None = None):
        self.job, self.num_contenders, self._other = job, num_contenders, folder
        self.cuda = job.device.type == "cuda"
        self.parks = False
        self.contenders: list[Contender] = []
        self.kept_bytes = self.passing_bytes = 0.0  # of the contender with most
        self._before = 0
        self._parked: dict[int, Parked] = {}
        gc.collect()  # what the last race left
        gc.freeze()  # what is older than a race need not be looked at after each of its systems

    @functools.cached_property
    def folder(self) -> Path:
        """Where those wait that have no room, on CPUs."""
        temporary = Path(tempfile.gettempdir())
        if self._other is None or not in_memory(temporary):
            return temporary
        self._other.mkdir(parents=True, exist_ok=True)
        return self._other

    @property
    def how(self) -> str:
        """Where contenders are between their turns, for the rows; empty where there is no choice."""
        if not self.cuda:
            return "on disk between turns" if self.parks else ""
        return "in the host's memory between turns" if self.parks else "on the device between turns"

    def clear(self) -> None:
        """Ahead of the next contender: freed memory is given back."""
        give_back()
        if not self.cuda:
            return
        torch.cuda.empty_cache()
        torch.cuda.synchronize(self.job.device)
        torch.cuda.reset_peak_memory_stats(self.job.device)
        self._before = torch.cuda.memory_allocated(self.job.device)

    def take(self, contender: Contender | None) -> None:
        """``contender`` has been built and has run; None: it did not come to that."""
        gc.collect()  # what conformance left, and whoever did not come to that
        if contender is None:
            self.num_contenders -= 1
            return
        self.contenders.append(contender)
        if self.parks:
            self._park(contender)
        elif self._crowded():
            self.parks = True
            for each in self.contenders:
                self._park(each)

    @contextlib.contextmanager
    def turn(self, contender: Contender, warm_up: bool = False) -> Iterator[None]:
        """``contender`` is on the device. ``warm_up``: it has run once since it came back."""
        if not self.parks:
            yield
            return
        self._parked.pop(id(contender)).back()
        if warm_up:
            contender.warm_up()
        yield
        self._park(contender)

    def _crowded(self) -> bool:
        """Whether not all can stay. ``MemoryError`` where they cannot wait elsewhere either."""
        if self.num_contenders < 2:
            return False
        return self._crowded_device() if self.cuda else self._crowded_host()

    def _crowded_device(self) -> bool:
        device, here = self.job.device, torch.cuda.memory_allocated(self.job.device)
        peak = torch.cuda.max_memory_allocated(device)
        total = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)  # without other programs'
        found = [here - self._before, peak - here, -total, -psutil.virtual_memory().available]
        worst = torch.tensor(found, dtype=torch.float64, device=device)
        if self.job.num_ranks > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        kept, passing, total, available = worst.abs().tolist()
        self.kept_bytes, self.passing_bytes = max(self.kept_bytes, kept), max(self.passing_bytes, passing)
        if fits(self.num_contenders, self.kept_bytes, self.passing_bytes, total):
            return False
        on_host = self.num_contenders * self.kept_bytes * self.job.topology.shape[-1]
        if on_host > HOST_SHARE * available:
            raise MemoryError(
                f"{self.num_contenders} systems of {self.kept_bytes / 1e9:.3g} GB fit neither a device of "
                f"{total / 1e9:.3g} GB nor, while they wait, a host with {available / 1e9:.3g} GB left for "
                f"{self.job.topology.shape[-1]} ranks; race fewer at a time"
            )
        return True

    def _crowded_host(self) -> bool:
        """Ranks share the memory of their machine, and its disk. What a process grows by counts for nothing: it imports
        and compiles for all contenders as it admits the first."""
        kept = sum(each.nbytes() for each in storages(self.contenders[-1].keep(), self.job.device))
        found = [kept, -psutil.virtual_memory().available, -shutil.disk_usage(self.folder).free]
        worst = torch.tensor(found, dtype=torch.float64)
        if self.job.num_ranks > 1:
            dist.all_reduce(worst, dist.ReduceOp.MAX)
        kept, available, free = worst.abs().tolist()
        self.kept_bytes = max(self.kept_bytes, kept)
        num_ranks = self.job.num_ranks if self.job.shared_clock else self.job.topology.shape[-1]  # of this machine
        of_each = self.kept_bytes * num_ranks
        if (self.num_contenders - len(self.contenders)) * of_each <= HOST_SHARE * available:
            return False
        if self.num_contenders * of_each > HOST_SHARE * free:
            raise MemoryError(
                f"{self.num_contenders} systems of {of_each / 1e9:.3g} GB on {num_ranks} ranks fit neither the memory, "
                f"of which {available / 1e9:.3g} GB are left, nor, while they wait, {self.folder} with "
                f"{free / 1e9:.3g} GB; race fewer at a time, or name a larger disk (TMPDIR)"
            )
        return True

    def _park(self, contender: Contender) -> None:
        self._parked[id(contender)] = Parked(storages(contender.keep(), self.job.device), self.job.device, self.folder)
        if self.cuda:
            torch.cuda.empty_cache()


def storages(tensors: Iterable[torch.Tensor], device: torch.device) -> list[torch.UntypedStorage]:
    """Memory of those on ``device``, each once."""
    here = (t for t in tensors if t.device == device and t.numel())
    return list({t.untyped_storage().data_ptr(): t.untyped_storage() for t in here}.values())


class Parked:
    """Memory of a device in the host's memory, or a CPU's in a file in ``folder``; the tensors that it is of, and all
    views of them, stay as they are, with nothing in them, until it is ``back``."""

    def __init__(self, storages: Sequence[torch.UntypedStorage], device: torch.device, folder: Path):
        self.device, self.away = device, []
        if not storages:
            return
        sizes = [storage.nbytes() for storage in storages]
        whole = _host_bytes(sum(sizes)) if device.type == "cuda" else _file_bytes(sum(sizes), folder)
        for storage, host in zip(storages, whole.split(sizes), strict=True):
            host.copy_(_bytes_of(storage, device), non_blocking=True)
            self.away.append((storage, host))
        self._settle()
        for storage in storages:
            storage.resize_(0)

    def back(self) -> None:
        for storage, host in self.away:
            storage.resize_(len(host))
            _bytes_of(storage, self.device).copy_(host, non_blocking=True)
        self._settle()

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _host_bytes(num_bytes: int) -> torch.Tensor:
    with contextlib.suppress(RuntimeError):  # a machine may not pin all that it has
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(num_bytes, dtype=torch.uint8)


def _file_bytes(num_bytes: int, folder: Path) -> torch.Tensor:
    """Of a file that goes with the tensor, however this process ends. ``OSError`` where the disk is full."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".waits-") as file:
        os.posix_fallocate(file.fileno(), 0, num_bytes)  # what is missing later is no error but a signal
        return torch.from_file(file.name, shared=True, size=num_bytes, dtype=torch.uint8)
