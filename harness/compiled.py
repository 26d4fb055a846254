"""Loops compiled by numba, each by one process of a machine: the others wait for it and load what it has compiled.

All ranks of a node come to a loop for the first time together. Without a lock, each would compile it for itself, and on
few cores that lasts as many times as long.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock

_depth = 0  # of loops that call others, which are compiled inside them


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` with a cache on disk; ``options``: those of it."""

    def decorate(function: Callable[..., Any]) -> Any:
        loop = numba.njit(cache=True, **options)(function)
        compile_ = loop.compile

        def compile_alone(signature: Any) -> Any:
            with _alone():
                return compile_(signature)

        loop.compile = compile_alone
        return loop

    return decorate


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other thread, and no other process of this user's on this machine, compiles meanwhile. Where no lock can be
    had, they do."""
    global _depth
    with global_compiler_lock, contextlib.ExitStack() as stack:
        if not _depth:
            with contextlib.suppress(OSError):
                handle = os.open(_lock_file(), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, handle)  # which unlocks it, as the end of the process does
                fcntl.flock(handle, fcntl.LOCK_EX)
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def _lock_file() -> Path:
    return Path(tempfile.gettempdir()) / f"moebench-compiles-{os.getuid()}.lock"
