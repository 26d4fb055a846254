"""What a process had to say last: read from its log when it has died, or from the stacks that it was made to write."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from pathlib import Path

from harness.errors import nearest

TAIL_BYTES = 65536
LEAST_FREE_BYTES = 16384
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+|\?\?\?) in (?P<function>.+)$', re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x", re.MULTILINE)
_TELLING = re.compile(r"what\(\):|\w(Error|Exception|Failure)\b|error:|Assertion|terminate called", re.IGNORECASE)
_WAITING = ("harness/plan/lanes.py", "harness/launch/rank.py")  # where a thread only waits for another, or for a call


def line(path: Path) -> str:
    """The last one that is not empty."""
    return next((each for each in reversed(_lines(path)) if each), "")


def of_dead(path: Path) -> str:
    """Why a rank has died, from its log: what the C++ runtime or Python said, and where Python then was."""
    text = "\n".join(_lines(path, strip=False))
    before, fatal, stack = text.rpartition("Fatal Python error: ")
    last = before.splitlines()[-40:] if fatal else text.splitlines()[-1:]  # what is older may be of another matter
    said = [each.strip() for each in last if _TELLING.search(each)]
    if any("what():" in each for each in said):
        said = [each for each in said if "what():" in each]
    found = " ".join(said[-1].removeprefix("what():").split())[:500] if said else ""
    where = place(stack)
    return ", ".join(filter(None, (found, where and f"at {where}")))


def no_room(path: Path) -> str:
    """That a log could not be written to, if that is why it says nothing."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(path.parent).free < LEAST_FREE_BYTES:
            return f"no space is left at {path.parent}, where its log would be; free some, or set TMPDIR"
    return ""


def place(stacks: str) -> str:
    """Where a process stands, in short, of what faulthandler wrote: its main thread, which is the last, or what that
    one waits for."""
    starts = [match.start() for match in _THREAD.finditer(stacks)] + [len(stacks)]
    threads = [stacks[begin:end] for begin, end in itertools.pairwise(starts)] or [stacks]
    places = [nearest(_frames(thread)) for thread in threads]
    if places[-1].startswith(_WAITING):
        places = [each for each in places if each and not each.startswith(_WAITING)] or places[-1:]
        return " and ".join(dict.fromkeys(places))
    return places[-1]


def _frames(thread: str) -> list[tuple[str, int, str]]:
    found = (match.groupdict() for match in _FRAME.finditer(thread))
    return [(each["file"], int(each["line"]) if each["line"].isdigit() else 0, each["function"]) for each in found]


def _lines(path: Path, strip: bool = True) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [each.strip() for each in lines] if strip else lines
