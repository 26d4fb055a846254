"""A system's options as a case gives them, checked; and a system's name with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.errors import bad

if TYPE_CHECKING:
    from harness.specs import Experiment
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


def label(
    system: str,
    options: Mapping[str, Any],
    capacity_factor: float | None = None,
    layout: Mapping[str, Any] | None = None,
) -> str:
    """What tells it from others of its race: its name, its options, its layout where that is not the default, and its
    capacity factor where it drops."""
    extras = [f"{key}={value}" for key, value in sorted(options.items())]
    extras += [f"{key}={value}" for key, value in sorted((layout or {}).items())]
    extras += [f"capacity {capacity_factor:g}"] if capacity_factor else []
    return f"{system} ({', '.join(extras)})" if extras else system


def label_of(experiment: Experiment) -> str:
    """The same of an experiment."""
    of = experiment
    return label(of.system, of.options, of.model.capacity_factor, of.layout.model_dump())
