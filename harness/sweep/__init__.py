"""Sweeps: grids of cells as arrays of jobs that go on without whoever submitted them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.sweep.states import Sweep


def attach(path: Path | str) -> Sweep:
    """The sweep in the run folder ``path``."""
    from harness.sweep.states import Sweep

    return Sweep.attach(path)
