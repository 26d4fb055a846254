"""The one error that a user may cause: it names the field or file, the value, and the remedy. And how any other error
is told: on one line, with its own text, where it was raised, and who raised it first."""

from __future__ import annotations

import difflib
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

Kind = Literal["raised", "died", "hung", "out_of_memory"]  # of a rank's failure
#: of the cell in which a rank failed
STATUS_OF_FAILURE: dict[Kind, str] = {"raised": "failed", "died": "failed", "hung": "hung", "out_of_memory": "oom"}


#: what a system's own code may raise wherever it is asked, at the expense of its own cells alone
OF_A_SYSTEM = (Exception, SystemExit)


class UserError(ValueError):
    """Bad input. The command line prints its message on one line and exits with status 2.

    ``failure``: of which rank, in which phase, where a rank has found it."""

    failure: RankFailure | None = None

    def __reduce__(self) -> tuple[type[UserError], tuple[object, ...], dict[str, object]]:
        return type(self), self.args, self.__dict__


class Failure(RuntimeError):
    """What was started for a command has ended early; the message says why, and in which log the rest is. The command
    line prints it on one line and exits with status 1."""


class RankFailure(Failure):
    """A rank raised, died, hung or ran out of memory, and with it all ranks of its session have ended.

    ``rank`` is -1 where no single rank is to blame (the launcher or the emulated switch ended). ``log_path`` holds the
    traceback.
    """

    def __init__(self, rank: int, phase: str, kind: Kind, message: str, log_path: Path):
        super().__init__(f"rank {rank} {kind.replace('_', ' ')} in phase {phase!r}: {message} (log: {log_path})")
        self.rank, self.phase, self.kind, self.message, self.log_path = rank, phase, kind, message, log_path

    def __reduce__(self) -> tuple[type[RankFailure], tuple[int, str, Kind, str, Path]]:
        return RankFailure, (self.rank, self.phase, self.kind, self.message, self.log_path)


class Unplanned(UserError):
    """A system's bytes are known to nobody before it runs, so that it cannot be priced."""


def bad(field: str, value: object, remedy: str) -> UserError:
    """Build the one-line error every part of moebench uses: ``field``: ``value``: ``remedy``."""
    shown = repr(value)
    return UserError(f"{field}: {shown if len(shown) <= 200 else shown[:197] + '...'}: {remedy}")


class Unreadable(UserError):
    """A whole input file cannot be read, so that nothing that needs it has a meaning."""


def unreadable(field: str, value: object, remedy: str) -> Unreadable:
    """``bad``, for a whole input file."""
    return Unreadable(str(bad(field, value, remedy)))


def unknown(field: str, name: str, known: Iterable[str], plural: str, *, like: str | None = None) -> UserError:
    """``name`` is none of the ``known``: the nearest one (to ``like``, if that is how they are written), and all."""
    known = list(known)
    near = difflib.get_close_matches(like or name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return bad(field, name, f"unknown; {hint}known {plural} are {', '.join(known)}")


_OUT_OF_MEMORY = re.compile(r"MemoryError|out of memory|allocate memory|ALLOC_FAILED", re.IGNORECASE)
#: how a rank puts it that another one has gone, or does not come
_ECHO = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused|aborted)|broken pipe|remote process|ncclRemoteError"
    r"|pair closure|wait timeout|socket timeout|timed? ?out waiting|EnforceNotMet|op\.(nbytes|preamble)",
    re.IGNORECASE,
)
_PACKAGES = tuple(str(Path(__file__).parents[1] / name) + os.sep for name in ("harness", "baselines", "methods"))
_LIBRARIES = (sysconfig.get_path("stdlib") + os.sep, f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_AT = "raised at "
_MAX_WORDS = 1000  # letters of one exception; those of C++ bring their stacks
_MOST_CAUSES, _MOST_LETTERS = 3, 100_000


def tells_out_of_memory(text: str) -> bool:
    """Whether an error's class and words, Python's, torch's, CUDA's or a library's, tell that memory has run out; also
    where one rank repeats them as another exception of its own."""
    return _OUT_OF_MEMORY.search(text) is not None


def is_echo(text: str) -> bool:
    """Whether a rank's words tell of another rank's end rather than of a fault of its own."""
    return not tells_out_of_memory(text) and _ECHO.search(text) is not None


def told(error: BaseException) -> str:
    """``error`` on one line: its class, its words, what it was raised from, and the file and line that this comes
    from."""
    place = place_of(error)
    return f"{_named(error)}{place and f', at {place}'}"


def unplannable(system: str, error: BaseException) -> str:
    """Why a cell has no plan: its system raised ``error`` when it was asked for one."""
    return f"{system} cannot be planned: {told(error)}"


def words(error: BaseException) -> str:
    """Of ``error``, on one line, as any terminal and file takes them; also where it cannot say them."""
    try:
        text = str(error)
    except Exception as fault:
        text = f"its str() raises {type(fault).__name__}: {words(fault)}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text[:_MOST_LETTERS].split()))


def first_line(error: BaseException) -> str:
    """Of what a library raised for a user's file: its first line, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _named(error: BaseException, depth: int = 0) -> str:
    text = words(error).split("Exception raised from ", 1)[0].rstrip()
    text = text if len(text) <= _MAX_WORDS else text[: _MAX_WORDS - 3] + "..."
    inner = _inner(error)
    told_inner = "" if inner is None or depth > _MOST_CAUSES else f", from {_named(inner, depth + 1)}"
    return f"{type(error).__name__}{': ' if text else ''}{text}{told_inner}"


def _inner(error: BaseException) -> BaseException | None:
    """What it was raised from; of a group the first."""
    return error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__


def placed(error: Exception) -> Exception:
    """``error`` as it may be sent to another process, where its traceback does not come along."""
    error.add_note(_AT + place_of(error))
    return error


def place_of(error: BaseException) -> str:
    """``file:line in function``, of the cause that was first: the innermost that is of no library, if there is one."""
    inner = _inner(error)
    while inner is not None and (inner.__traceback__ is not None or hasattr(inner, "__notes__")):
        error, inner = inner, _inner(inner)
    for note in getattr(error, "__notes__", ()):
        if note.startswith(_AT):
            return str(note.removeprefix(_AT))
    frames = [(each.filename, each.lineno or 0, each.name) for each in traceback.extract_tb(error.__traceback__)]
    return nearest(frames[::-1])


def of_a_method(error: BaseException) -> bool:
    """Whether it was raised by what a system, a study or a placer does, or below that."""
    return any(each.filename.startswith(_PACKAGES[1:]) for each in traceback.extract_tb(error.__traceback__))


def nearest(frames: Sequence[tuple[str, int, str]]) -> str:
    """Of (file, line, function), innermost first: the first that is of no library, else the first; empty for none."""
    own = [frame for frame in frames if not _of_library(frame[0])] or list(frames)
    return f"{_short(own[0][0])}:{own[0][1]} in {own[0][2]}" if own else ""


def _of_library(path: str) -> bool:
    if path.startswith(_PACKAGES):
        return False
    return path.startswith(("<", _LIBRARIES[0])) or any(part in path for part in _LIBRARIES[1:])


def _short(path: str) -> str:
    """Files of this checkout by their path in it, others by the whole one."""
    rest = path.removeprefix(str(Path(__file__).parents[1]) + os.sep)
    return path if rest.startswith(".") else rest
