"""The one error that a user may cause: it names the field or file, the value, and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints its message on one line and exits with status 2."""


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


def tells_out_of_memory(text: str) -> bool:
    """Whether an error's class and words, Python's, torch's, CUDA's or a library's, tell that memory has run out; also
    where one rank repeats them as another exception of its own."""
    return _OUT_OF_MEMORY.search(text) is not None
