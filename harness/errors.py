"""The one error that a user may cause: it names the field or file, the value, and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The command line prints its message on one line and exits with status 2."""


def bad(field: str, value: object, remedy: str) -> UserError:
    """Build the one-line error every part of moebench uses: ``field``: ``value``: ``remedy``."""
    shown = repr(value)
    return UserError(f"{field}: {shown if len(shown) <= 200 else shown[:197] + '...'}: {remedy}")
