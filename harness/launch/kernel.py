"""The few Linux calls that Python 3.11 has no name for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def inside_network(path: str) -> Iterator[None]:
    """Be in the network namespace at ``path`` for the length of a with statement (this thread only)."""
    with Path("/proc/self/ns/net").open() as home:
        enter_network(path)
        try:
            yield
        finally:
            _enter(home.fileno(), "home")


def enter_network(path: str) -> None:
    """Move this thread into the network namespace at ``path``."""
    with Path(path).open() as namespace:
        _enter(namespace.fileno(), path)


def _enter(fd: int, name: str) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, however it dies."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def exact_timers() -> None:
    """Let timed waits end within a microsecond instead of the default 50."""
    _libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


def use_batch_scheduling() -> str:
    """SCHED_BATCH for this process and all that it starts: gloo's spinning loop thread otherwise pre-empts the
    rank that it waits for. Returns the policy's name as provenance."""
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        return "SCHED_OTHER"
    return "SCHED_BATCH"


def give_back() -> None:
    """Memory that was freed goes back to the kernel, as far as the C library (glibc) does it; else it stays with it in
    pieces, and a process that has had several systems holds what all of them have held."""
    if trim := getattr(_libc, "malloc_trim", None):
        trim(0)
