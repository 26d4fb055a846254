"""Files that moebench writes: tried before the work, written whole or not at all, and never in the place of another's.

A file that is there already is replaced only if it is moebench's: its own words say so, or the list of what moebench
wrote in that folder (``.moebench``, one name a line) names it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from harness.errors import UserError, bad

LIST = ".moebench"


def check(path: Path, field: str = "--out", is_ours: Callable[[Path], bool] | None = None) -> None:
    """``UserError`` now and not after minutes of work, for a file that could not be written, or that is there and is
    not moebench's: neither listed nor ``is_ours``. Nothing is made, nothing stays."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        there = path.parent
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise unwritable(path, error, field) from None
    if os.path.lexists(path) and not listed(path) and not (is_ours and path.is_file() and is_ours(path)):
        raise bad(field, str(path), "is there and was not written by moebench; move it, or choose another place")


def check_folder(folder: Path, suffixes: Iterable[str], field: str = "--out") -> None:
    """The same for files with such ``suffixes`` in ``folder``, whose names are not known yet."""
    check(folder / f"{LIST}-try", field)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in suffixes:
            check(path, field)


def stamp(path: Path) -> tuple[int, ...]:
    """What tells a file from what it was before it changed. ``OSError`` where there is none."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def unwritable(path: Path, error: OSError, field: str = "--out") -> UserError:
    other = field if field.startswith("--") else "place"
    return bad(field, str(path), f"cannot be written ({error.strerror or error}); choose another {other}")


@contextlib.contextmanager
def whole(path: Path, field: str = "--out", *, list_it: bool = False) -> Iterator[IO[bytes]]:
    """What is written to the file that this yields is in ``path`` at the end, or nothing is. ``list_it``: as
    moebench's, where the file's own words do not say so."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        if list_it:
            add(path)
    except OSError as error:
        raise unwritable(path, error, field) from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def write(path: Path, text: str, field: str = "--out", *, list_it: bool = False) -> None:
    """``text`` as the whole file."""
    with whole(path, field, list_it=list_it) as file:
        file.write(text.encode())


def listed(path: Path) -> bool:
    """Whether the list of its folder names it."""
    try:
        return path.name in (path.parent / LIST).read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return False


def add(path: Path) -> None:
    """To the list of its folder, in one write, so that lines of several processes do not mix."""
    if not listed(path):
        fd = os.open(path.parent / LIST, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, f"{path.name}\n".encode())
        finally:
            os.close(fd)


def starts_with(*words: bytes) -> Callable[[Path], bool]:
    """Whether one of ``words`` stands at the beginning of a file."""

    def found(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                head = file.read(4096)
        except OSError:
            return False
        return any(word in head for word in words)

    return found
