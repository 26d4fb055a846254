"""What the steps stand on: one GPU, or the emulated one, a job of one rank on it, and what cannot be shown there."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.specs import with_levels
from harness.topology import Topology
from tests.gpu.step import Skip

#: of one GPU; two levels, as systems with stages want
CLUSTER = with_levels(
    "one-gpu", [{"name": "node", "size": 1}, {"name": "gpu", "size": 1}], kind="physical", device="gpu"
)


class Machine:
    """One a process. Everything in it is made when a step first asks for it."""

    def __init__(self, emulated: bool):
        self.emulated = emulated
        if emulated:
            from tests.cuda import emulated as device

            torch.set_num_threads(1)
            device.install()

    @functools.cached_property
    def device(self) -> torch.device:
        """``Skip`` where there is none."""
        if not self.emulated and not torch.cuda.is_available():
            why = "is a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda} sees none"
            raise Skip(f"no CUDA device: torch {torch.__version__} {why}")
        return torch.device("cuda", 0)

    @functools.cached_property
    def job(self) -> Job:
        """Of one rank, over NCCL (emulated: gloo)."""
        backend = "gloo" if self.emulated else "nccl"
        if not self.emulated:
            torch.cuda.set_device(self.device)
            if not dist.is_nccl_available():
                raise Skip(f"torch {torch.__version__} has no NCCL")
        self._folder = tempfile.TemporaryDirectory()
        dist.init_process_group(
            backend,
            store=dist.FileStore(str(Path(self._folder.name) / "rendezvous"), 1),
            rank=0,
            world_size=1,
            timeout=datetime.timedelta(seconds=60),
            device_id=None if self.emulated else self.device,
        )
        return Job(Topology(CLUSTER.shape), self.device)

    def leave(self) -> None:
        """Destroy the job's process group; the next step gets another one."""
        if self.__dict__.pop("job", None) is not None:
            dist.destroy_process_group()

    def unseen(self, what: str) -> dict[str, str]:
        """To be added to a step's figures: what the emulated device cannot show."""
        return {"not shown": what} if self.emulated else {}

    def hazards(self) -> list[str]:
        """Races, and memory used again too early, that the emulated device has seen since the last call."""
        if not self.emulated:
            return []
        from tests.cuda import emulated as device

        races, reuses = device.hazards()
        return [*races, *reuses]

    def only_real(self, why: str) -> None:
        """Skip the rest of the step without a GPU."""
        if self.emulated:
            raise Skip(why)

    # ------------------------------------------------------------------ time on the device

    def spin(self, seconds: float) -> None:
        """Keep the current stream busy for so long; nothing on the emulated device, which has no time."""
        if not self.emulated:
            torch.cuda._sleep(max(1, round(seconds * self._cycles_per_s)))

    @functools.cached_property
    def _cycles_per_s(self) -> float:
        cycles = 100_000_000
        torch.cuda._sleep(cycles // 10)
        return cycles / self.seconds(lambda: torch.cuda._sleep(cycles))

    def seconds(self, work: Callable[[], Any], repeats: int = 1) -> float:
        """Of one ``work`` on the device, between events; emulated, by the host's clock."""
        if self.emulated:
            begin = time.perf_counter()
            for _ in range(repeats):
                work()
            return (time.perf_counter() - begin) / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(repeats):
            work()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / repeats

    @functools.cached_property
    def name(self) -> str:
        """As the driver calls the device."""
        return "emulated" if self.emulated else torch.cuda.get_device_name(self.device)

    def tidy(self) -> None:
        """After each step: what it held must not be the next one's."""
        gc.collect()
        if not self.emulated and torch.cuda.is_initialized():
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
