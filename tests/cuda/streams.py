"""Streams and events as vector clocks: which work on the device is ordered behind which.

Each piece of work on a stream gets the next number of that stream. A stream's clock says, for every stream, up to which
number its next piece of work is ordered behind. ``wait_event`` joins an event's clock into a stream's; what the host
waits for holds for all that it issues from then on, on any stream. Work really runs at once, in the order of issue.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

Clock = dict[int, int]  # by stream


class Stream:
    """``torch.cuda.Stream``."""

    all: list[Stream] = []
    synchronised: Clock = {}  # what the host has waited for

    def __init__(self, device: Any = None, priority: int = 0, **ignored: Any):
        self.id = self.stream_id = self.cuda_stream = len(Stream.all)
        self.name = f"stream {self.id}" if self.id else "the default stream"
        self.priority, self.device_index = priority, 0
        self.clock: Clock = {**Stream.synchronised, self.id: 0}
        Stream.all.append(self)

    def tick(self) -> int:
        """The number of one more piece of work here."""
        self.clock[self.id] += 1
        return self.clock[self.id]

    def join(self, clock: Clock) -> None:
        mine = self.clock
        for stream, number in clock.items():
            if mine.get(stream, 0) < number:
                mine[stream] = number

    def is_behind(self, stream: int, number: int) -> bool:
        """Whether what comes next here is ordered behind that piece of work."""
        return stream == self.id or self.clock.get(stream, 0) >= number

    def wait_event(self, event: Event) -> None:
        self.join(event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.join(stream.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        host_waits(self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.id == self.id

    def __hash__(self) -> int:
        return self.id


class Event:
    """``torch.cuda.Event``. Its time is the host's when it was recorded, since work runs when it is issued."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **ignored: Any):
        self.timing, self.clock, self.at_s = enable_timing, {}, None

    clock: Clock
    at_s: float | None

    def record(self, stream: Stream | None = None) -> None:
        self.clock, self.at_s = dict((stream or current()).clock), time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current()).join(self.clock)

    def synchronize(self) -> None:
        host_waits(self.clock)

    def query(self) -> bool:
        self.synchronize()
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if not (self.timing and end.timing):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self.at_s is None or end.at_s is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return 1e3 * (end.at_s - self.at_s)


def host_waits(clock: Clock) -> None:
    """All that is issued from now on, on any stream, is ordered behind ``clock``."""
    for stream in Stream.all:
        stream.join(clock)
    for stream, number in clock.items():
        Stream.synchronised[stream] = max(number, Stream.synchronised.get(stream, 0))


def synchronize(device: Any = None) -> None:
    for stream in Stream.all:
        host_waits(stream.clock)


DEFAULT = Stream()
_current = DEFAULT


def current(device: Any = None) -> Stream:
    return _current


@contextlib.contextmanager
def use(stream: Stream | None) -> Iterator[None]:
    """``torch.cuda.stream``."""
    global _current
    before = _current
    _current = stream or before
    try:
        yield
    finally:
        _current = before
