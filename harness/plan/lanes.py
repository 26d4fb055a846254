"""Run a plan: every lane does its tasks in order, and waits for what they wait for on other lanes.

On CUDA a lane is a stream and a wait an event, all issued by the calling thread. On CPU threads do the tasks, so that a
collective (each lane has process groups of its own) and a computation really go on side by side: gloo and torch let go
of the interpreter while they work. The thread that ends a task goes on with what waited for it, and wakes others only
for what can be at work beside that: on busy cores a thread wakes late.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from threading import Event, Lock
from typing import TypeAlias

import numpy as np
import torch

from harness.comm.job import Job
from harness.plan.graph import COMPUTE, INTER, LANES, Plan, Timeline

Inbox: TypeAlias = "queue.SimpleQueue[Callable[[], None] | None]"


class PlanFailure(RuntimeError):
    """A task raised; the message names it, and the cause is chained."""


class Executor:
    """The lanes of one rank. Reusable; ``close`` ends its threads."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        lanes: tuple[str, ...] = LANES,
        failing: Callable[[BaseException], None] = lambda error: None,
    ):
        """``failing``: told at once of what a task raises, as other lanes may wait for other ranks for ever."""
        self.device, self.failing = torch.device(device), failing
        self.lanes = lanes
        self._inbox: Inbox = queue.SimpleQueue()
        if self.device.type == "cuda":
            self.streams = {
                lane: torch.cuda.current_stream(self.device) if lane == COMPUTE else torch.cuda.Stream(self.device, -1)
                for lane in lanes
            }
            return
        for _ in lanes:
            work = (self._inbox, torch.get_num_threads())
            threading.Thread(target=_serve, args=work, name="lanes", daemon=True).start()

    def close(self) -> None:
        if self.device.type != "cuda":
            for _ in self.lanes:
                self._inbox.put(None)

    def run(self, plan: Plan, serial: bool = False) -> Timeline:
        """Execute; returns when every task has ended (on CUDA: has been issued, and the calling stream waits for all).

        The timeline's clock is ``time.perf_counter``, on CUDA too, so that ranks of one machine share it. Raises
        ``PlanFailure`` with the name of the first task that failed; tasks that wait for it, or follow it on its lane,
        do not run. ``serial``: one task after another, in the calling thread and, on CUDA, on the calling stream."""
        plan.order  # noqa: B018  # a cycle or a stranger is found before anything runs
        if self.device.type == "cuda":
            return self._run_streams(plan, serial)
        return self._run_serial(plan) if serial else self._run_threads(plan)

    # ------------------------------------------------------------------ CPU

    def _run_serial(self, plan: Plan) -> Timeline:
        start, end = np.zeros(len(plan.tasks)), np.zeros(len(plan.tasks))
        for here in plan.order:
            task = plan.tasks[here]
            start[here] = time.perf_counter()
            try:
                if task.run is not None:
                    task.run()
            except Exception as error:
                raise PlanFailure(f"task {task.name}: {type(error).__name__}: {error}") from error
            end[here] = time.perf_counter()
        return Timeline(plan.done(), start, end)

    def _run_threads(self, plan: Plan) -> Timeline:
        run = _Run(plan, self._inbox, self.failing)
        run.take(run.turns.first)
        run.over.wait()
        run.plan = plan.done()  # another thread may still be on its way out
        if run.failures:
            name, error = run.failures[0]
            if not isinstance(error, Exception):
                raise error  # Ctrl-C and the like
            raise PlanFailure(f"task {name}: {type(error).__name__}: {error}") from error
        return Timeline(run.plan, run.start, run.end)

    # ------------------------------------------------------------------ CUDA

    def _run_streams(self, plan: Plan, serial: bool) -> Timeline:
        calling = torch.cuda.current_stream(self.device)
        self.streams[COMPUTE] = calling
        entry = calling.record_event()
        begin, finish = ([torch.cuda.Event(enable_timing=True) for _ in plan.tasks] for _ in range(2))
        for stream in self.streams.values():
            stream.wait_event(entry)
        for here in plan.order:
            task = plan.tasks[here]
            stream = calling if serial else self.streams[task.lane]
            for name in task.after:
                stream.wait_event(finish[plan.index[name]])
            begin[here].record(stream)
            if task.run is not None:
                try:
                    with torch.cuda.stream(stream):
                        task.run()
                except Exception as error:
                    raise PlanFailure(f"task {task.name}: {type(error).__name__}: {error}") from error
            finish[here].record(stream)
        for event in finish:
            calling.wait_event(event)
        return _DeviceTimeline(plan.done(), self.device, begin, finish)


class _Run:
    """One run of a plan by several threads. It holds no reference to itself, so that tensors go when it is over."""

    def __init__(self, plan: Plan, inbox: Inbox, failing: Callable[[BaseException], None]):
        self.plan, self.inbox, self.failing = plan, inbox, failing
        self.start, self.end = np.zeros(len(plan.tasks)), np.zeros(len(plan.tasks))
        self.failures: list[tuple[str, BaseException]] = []
        self.grad, self.turns, self.lock, self.over = torch.is_grad_enabled(), plan.turns(), Lock(), Event()

    def take(self, ready: list[int]) -> None:
        """The first of some tasks whose turn it is, and what it was the last to hold up; other threads the rest."""
        while ready:
            here, *others = ready
            for other in others:
                self.inbox.put(functools.partial(self.take, [other]))
            task = self.plan.tasks[here]
            self.start[here] = time.perf_counter()
            try:
                if task.run is not None and not self.failures:
                    with torch.set_grad_enabled(self.grad):
                        task.run()
            except BaseException as error:
                self.failures.append((task.name, error))
                self.failing(error)
            self.end[here] = time.perf_counter()
            del task  # a thread that goes on to wait holds no tensors
            with self.lock:
                ready = self.turns.ended(here)
            ready.sort(key=lambda each: self.plan.tasks[each].lane != INTER)  # the slowest link waits for no thread
        if not self.turns.left:
            self.over.set()


class _DeviceTimeline(Timeline):
    """Read from the events when asked for, so that issuing a plan never waits for the device."""

    def __init__(self, plan: Plan, device: torch.device, begin: list[torch.cuda.Event], finish: list[torch.cuda.Event]):
        object.__setattr__(self, "plan", plan)
        object.__setattr__(self, "_events", (device, begin, finish))

    @functools.cached_property
    def _times(self) -> tuple[np.ndarray, np.ndarray]:
        """Of begin and finish, on the clock of ``time.perf_counter``: seconds before an event that is recorded now.
        The device's clock drifts from the host's by milliseconds a minute, so the two meet anew for every timeline."""
        device, *events = self._events  # type: ignore[attr-defined]
        torch.cuda.synchronize(device)
        before, mark, after = min((_mark(device) for _ in range(3)), key=lambda each: each[2] - each[0])
        begin, finish = (np.array([event.elapsed_time(mark) / 1e3 for event in each]) for each in events)
        return (before + after) / 2 - begin, (before + after) / 2 - finish

    @property
    def start_s(self) -> np.ndarray:  # type: ignore[override]
        return self._times[0]

    @property
    def end_s(self) -> np.ndarray:  # type: ignore[override]
        return self._times[1]


def _mark(device: torch.device) -> tuple[float, torch.cuda.Event, float]:
    """An event on an idle device, and the host's time just before and just after it."""
    event = torch.cuda.Event(enable_timing=True)
    before = time.perf_counter()
    event.record(torch.cuda.current_stream(device))
    event.synchronize()
    return before, event, time.perf_counter()


def _serve(inbox: Inbox, num_threads: int) -> None:
    torch.set_num_threads(num_threads)  # OpenMP counts threads per thread
    while (work := inbox.get()) is not None:
        work()
        del work  # and what it holds


def executor_of(job: Job) -> Executor:
    """The one executor of a rank's job, made at its first use: layers come and go, lanes stay."""
    if job not in _executors:
        _executors[job] = Executor(job.device, failing=job.failing)
    return _executors[job]


_executors: weakref.WeakKeyDictionary[Job, Executor] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def executor(device: torch.device | str = "cpu", lanes: tuple[str, ...] = LANES) -> Iterator[Executor]:
    """An ``Executor`` that is closed at the end."""
    made = Executor(device, lanes)
    try:
        yield made
    finally:
        made.close()
