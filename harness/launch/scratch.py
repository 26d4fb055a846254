"""Folders in the temporary folder, and what becomes of them.

A ``folder`` is locked for as long as it is in use, and removed at its end. Where its process is killed before, the lock
goes with it, and the next one that asks for a folder removes what is locked no more. What is to be read later, the logs
of what failed, is ``kept``, for a week.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LOCK, KEPT = ".in-use", ".kept"
PREFIX = "moebench-"
NEW_S = 60.0  # a folder as young as that may not be locked yet
KEPT_S = 7 * 86400.0


class Folder:
    """A new folder ``moebench-KIND...`` of this process; ``close`` it. ``OSError`` if it cannot be made."""

    def __init__(self, kind: str = ""):
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}{kind and '-'}", dir=place()))
        self._kept = False
        try:
            self._lock = hold(self.path)
        except OSError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def keep(self) -> None:
        """When it is closed, it stays, for a week."""
        self._kept = True

    def close(self) -> None:
        if self._kept:
            (self.path / KEPT).touch()
            (self.path / LOCK).unlink(missing_ok=True)
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def hold(path: Path) -> int:
    """Nobody removes ``path`` as long as this process lives, or has not closed what comes back."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: then nobody removes it at all
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@contextlib.contextmanager
def folder(kind: str) -> Iterator[Path]:
    """One that is gone at the end."""
    with contextlib.closing(Folder(kind)) as made:
        yield made.path


@contextlib.contextmanager
def logs(kind: str) -> Iterator[Folder]:
    """One for logs, which stays if an exception, or somebody who has asked for it, wants it."""
    with contextlib.closing(Folder(kind)) as made:
        try:
            yield made
        except BaseException:
            made.keep()
            raise


def place() -> str:
    """The temporary folder; not under /run, which the namespaces of an emulated cluster replace."""
    default = tempfile.gettempdir()
    return "/tmp" if default.startswith("/run") else default


def sweep(where: Path | str = "") -> None:
    """Remove this user's folders whose processes have ended without doing so, and logs that nobody has asked for."""
    with contextlib.suppress(OSError):
        for path in Path(where or place()).glob(f"{PREFIX}*/"):
            with contextlib.suppress(OSError):
                facts = path.lstat()
                if facts.st_uid == os.getuid() and _is_over(path, time.time() - facts.st_mtime):
                    shutil.rmtree(path, ignore_errors=True)


def _is_over(path: Path, age_s: float) -> bool:
    if path.is_symlink() or age_s < NEW_S:
        return False
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:  # kept, or of something else that is called so
        return (path / KEPT).exists() and age_s > KEPT_S
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True
