"""A system's options as a case gives them, checked."""

from __future__ import annotations

from harness.errors import bad
from harness.system import Case


def whole(case: Case, option: str, default: int, most: int, least: int = 1) -> int:
    """A whole number from ``least`` to ``most``."""
    value = case.options.get(option, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise bad(f"options.{option}", value, f"must be a whole number from {least} to {most}")
    return value


def yes(case: Case, option: str, default: bool) -> bool:
    value = case.options.get(option, default)
    if not isinstance(value, bool):
        raise bad(f"options.{option}", value, "must be true or false")
    return value
