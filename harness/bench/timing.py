"""Timing on one rank: every repetition starts at an agreed moment, and everything that it cost is read around it.

The time of the job is computed later, from all ranks' samples: max(end) - min(start) where all ranks share one clock,
else the slowest rank's own device time. A step costs what its slowest rank costs.

On CUDA these are two things: the span of one clock holds the launches and the wait for the device's end, the device
time does not. So that runs on one machine and on several can be compared, the rows hold both of either: metric
``device_time_s`` (largest time between events of any rank) and ``host_time_s`` (largest time on any rank's own clock).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator

import psutil
import torch
import torch.distributed as dist

from harness.comm import arrivals
from harness.comm.job import Job

#: how far ahead the common start lies: more than an all-reduce of one number takes to reach the last rank
START_MARGIN_S = 0.004
_CALIBRATIONS = 5


@dataclasses.dataclass
class Sample:
    """One repetition of one direction on one rank. Clocks are ``time.perf_counter`` of this machine."""

    rep: int
    direction: str  # forward | backward; total where a step is one piece
    start_s: float
    end_s: float
    device_s: float | None  # between CUDA events; None on CPU
    own_cpu_s: float  # CPU of this process between start and end, all threads, user and system
    window_s: float  # between the barriers around the repetition: ...
    window_cpu_s: float  # ... CPU of this process
    window_busy_s: float  # ... CPUs of this machine busy with anything
    num_bytes: list[int] | None  # sent over each link level by the whole job; rank 0 only, where countable
    received_bytes: int = 0  # by this rank, as torch's process groups count
    loss: float | None = None  # train_step
    parts_s: dict[str, list[float]] | None = None  # serving: of each layer, by part, where the system has tasks
    step: int | None = None  # of the experiment, where its routing goes on from step to step
    #: of experts' parameters, sent by this rank, by what for (``harness.comm.moved``)
    moved_bytes: dict[str, int] = dataclasses.field(default_factory=dict)


class Stopwatch:
    """Times callables on all ranks together. Collective: every rank makes the same calls."""

    def __init__(self, job: Job):
        arrivals.install()
        self.job = job
        self.cuda = job.device.type == "cuda"
        self._barrier_bytes = [0] * len(self._count() or [])
        self._barrier_bytes = self._calibrate()

    def measure(
        self, rep: int, direction: str, work: Callable[[], object], stopped: Callable[[], object] | None = None
    ) -> Sample:
        """Run ``work`` once, at the agreed start; ``stopped``: at once when this rank's clock has stopped. Between the
        two readings of the counters nothing else is sent than the barriers' own bytes, which are measured beforehand
        and taken off."""
        self._barrier()
        counted = self._count()
        window, window_cpu, busy = time.perf_counter(), time.process_time(), _busy_cpu_s()
        begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2)) if self.cuda else (None, None)
        self._wait_for_start()
        arrived, moved = arrivals.received_bytes(), self.job.moved.since({})
        cpu = time.process_time()
        start = time.perf_counter()
        if begin is not None and finish is not None:
            begin.record()
            work()
            finish.record()
            torch.cuda.synchronize(self.job.device)
        else:
            work()
        end = time.perf_counter()
        own = time.process_time() - cpu
        arrived = arrivals.received_bytes() - arrived
        if stopped is not None:
            stopped()
        self._barrier()
        window, window_cpu = time.perf_counter() - window, time.process_time() - window_cpu
        busy = _busy_cpu_s() - busy
        if counted is not None:
            after = self._count() or counted
            counted = [max(0, b - a - c) for a, b, c in zip(counted, after, self._barrier_bytes, strict=True)]
        self._barrier()  # nobody sends before rank 0 has read
        device = begin.elapsed_time(finish) / 1e3 if begin is not None and finish is not None else None
        sample = Sample(rep, direction, start, end, device, own, window, window_cpu, busy, counted, arrived)
        sample.moved_bytes = self.job.moved.since(moved)
        return sample

    def _barrier(self) -> None:
        if self.job.num_ranks > 1:
            dist.barrier()
        if self.cuda:
            torch.cuda.synchronize(self.job.device)

    def _wait_for_start(self) -> None:
        """Agree on a moment a little ahead and sleep until it; without a common clock the barrier is the start."""
        if not self.job.shared_clock:
            self._barrier()
            return
        moment = torch.tensor([time.perf_counter() + START_MARGIN_S], dtype=torch.float64, device=self.job.device)
        if self.job.num_ranks > 1:
            dist.all_reduce(moment, dist.ReduceOp.MAX)
        time.sleep(max(0.0, float(moment) - time.perf_counter()))

    def _count(self) -> list[int] | None:
        return list(self.job.counters()) if self.job.counters is not None and self.job.rank == 0 else None

    def _calibrate(self) -> list[int]:
        samples = [self.measure(-1, "forward", lambda: None).num_bytes for _ in range(_CALIBRATIONS)]
        return [round(statistics.median(level)) for level in zip(*(s for s in samples if s is not None), strict=True)]


def interleaved(num_systems: int, num_reps: int) -> list[tuple[int, int]]:
    """(repetition, system) in the order A B B A, so that a drift of the machine favours nobody."""
    order = list(range(num_systems))
    return [(rep, which) for rep in range(num_reps) for which in (order if rep % 2 == 0 else reversed(order))]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside, and nothing to collect at its beginning. Inside another it changes nothing."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def num_cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _busy_cpu_s() -> float:
    """Seconds that all CPUs of this machine have been busy since it started (in steps of 10 ms)."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
