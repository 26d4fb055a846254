"""One process at a time fills a run's folder, on this machine or on any other that shares the file system.

Who holds a folder stands in a file there, which is made whole or not at all (a hard link) and touched as long as its
holder lives. A holder that has died on this machine is known by its process; one on another machine, or in another
container, by a file that nobody has touched for ``STALE_S``, by the file system's own clock. Then the next one takes
over.

Jobs of one sweep share a folder, each with files of its own, and say so with a file each, that only a run minds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import UserError, bad

FOLDER = "locks"
RUN = "run"
BEAT_S = 10.0
STALE_S = 180.0  # more than the minute for which NFS may show an old time of a file


@contextlib.contextmanager
def held(run_dir: Path, name: str = RUN) -> Iterator[None]:
    """``run_dir`` is this process's. ``name``: by default its alone; else its with others that have names of their own,
    as jobs of a sweep. ``UserError`` that names the holder if it has one."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    mine = json.dumps(_this_process())
    with _one_at_a_time(folder):
        for path in sorted(folder.iterdir()):
            if path.suffix == ".lock" and (name == RUN or path.stem in (RUN, name)):
                _clear(run_dir, path, took_over=path.stem == name and name != RUN)
        lock = _take(run_dir, folder / f"{name}.lock", mine)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(lock, ended), name="run's lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            if lock.read_text() == mine:
                lock.unlink()


def holder(path: Path) -> dict[str, Any] | None:
    """Of a lock: who holds it (host, pid, since); None if nobody does, or that one has died."""
    try:
        with path.open() as file:  # opened, so that a network file system looks again
            text, touched = file.read(), os.fstat(file.fileno()).st_mtime
        who = dict(json.loads(text))
        here = (who["host"], who["space"]) == (socket.gethostname(), _space())
        alive = _lives(int(who["pid"]), str(who["began"])) if here else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):  # written by hand, or by a machine that went down meanwhile
        who, alive, touched = {"host": "an unknown machine", "pid": "?", "since": "?"}, None, path.stat().st_mtime
    if alive is None:
        alive = _now(path.parent) - touched < STALE_S
    return who if alive else None


def _clear(run_dir: Path, path: Path, took_over: bool) -> None:
    """Remove what a dead holder has left. ``took_over``: this is the same job, started again."""
    with contextlib.suppress(FileNotFoundError):
        judged = path.read_bytes()
        if not took_over and (who := holder(path)) is not None:
            raise _refusal(run_dir, who)
        aside = path.rename(path.with_name(f".{uuid.uuid4().hex}"))
        taken = aside.read_bytes() != judged  # by another one meanwhile, where ``_one_at_a_time`` could not keep it off
        if taken:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()
        if taken:
            raise _refusal(run_dir, holder(path) or {})


def _take(run_dir: Path, lock: Path, mine: str) -> Path:
    own = lock.with_name(f".{uuid.uuid4().hex}")
    own.write_text(mine)
    try:
        os.link(own, lock)
    except FileExistsError:  # somebody was faster
        if own.stat().st_nlink < 2:  # and it was not this process, whose answer was lost
            raise _refusal(run_dir, holder(lock) or {}) from None
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileExistsError), lock.open("x") as file:
            file.write(mine)
        if lock.read_text() != mine:
            raise _refusal(run_dir, holder(lock) or {}) from None
    finally:
        own.unlink(missing_ok=True)
    return lock


def _refusal(run_dir: Path, who: dict[str, Any]) -> UserError:
    words = f"process {who.get('pid', '?')} on {who.get('host', '?')} has been filling it since {who.get('since', '?')}"
    there = who.get("host") != socket.gethostname()
    dead = f" (if it has died there, this is known {STALE_S:.0f} s later)" if there else ""
    return bad("run", str(run_dir), f"{words}{dead}; wait for its end, end it, or take another --name")


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Nobody else looks and takes meanwhile, where the file system can lock; where not, the link alone decides."""
    guard = os.open(folder / ".guard", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield
    finally:
        os.close(guard)


def _beat(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(lock)


def _now(folder: Path) -> float:
    """By the clock of the file system, which stamps locks too."""
    probe = folder / f".{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {"host": socket.gethostname(), "space": _space(), "pid": pid, "began": _began(pid), "since": since}


def _space() -> str:
    """Within which a process number means the same: this boot of this machine, and this container of it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _began(pid: int) -> str:
    """When a process was started, in ticks; empty if there is none (a zombie is none)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if stat[0] in "ZX" else stat[19]


def _lives(pid: int, began: str) -> bool:
    return _began(pid) == began
