"""The face of the emulated device, for tests and scripts; see ``tests.cuda``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.cuda import device, memory, streams

_mode: device.EmulatedDevice | None = None


def install() -> None:
    """From here on this process has a CUDA device, ``cuda:0``, in the calling thread; there is no way back.
    Once; at any time before the first ``device="cuda"``, before or after ``init_process_group("gloo")``."""
    global _mode
    if _mode is None:
        _mode = device.install()
        _mode.__enter__()


def hazards() -> tuple[dict[str, int], dict[str, int]]:
    """Races and reuses since the last call, by text, with how often each was seen; both must be empty."""
    return memory.hazards.drain()


@contextlib.contextmanager
def task(name: str) -> Iterator[None]:
    """What is done inside is called ``name`` in messages."""
    before, memory.task = memory.task, name
    try:
        yield
    finally:
        memory.task = before


def name_stream(stream: streams.Stream, name: str) -> None:
    """What messages call a stream."""
    stream.name = name


def enter() -> None:
    """The device, once installed, is there in the calling thread too."""
    assert _mode is not None
    device.EmulatedDevice().__enter__()
