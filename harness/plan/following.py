"""Placements that follow the load, decided in numpy: which steps' tokens count, when a planner is asked, what changes.

The same for what runs (``harness.plan.rearrange``) and for what is priced (``harness.plan.course``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from harness.placement import Placement

#: load [E] of some steps, placement so far -> placement; that one itself where nothing is to change
Planner = Callable[[np.ndarray, Placement], Placement]
WINDOW = 5  # steps whose tokens count


@dataclasses.dataclass(frozen=True)
class Following:
    """Every ``every`` steps each layer's ``planner`` gets the tokens that its experts had in the last ``window`` of
    them, on all ranks. Experts move with their optimizer state unless ``optimizer_state`` is False."""

    planner: Planner
    every: int
    window: int = WINDOW
    optimizer_state: bool = True

    def counts(self, step: int) -> bool:
        """Whether the tokens of ``step`` do."""
        return step % self.every >= self.every - min(self.window, self.every)

    def due(self, step: int) -> bool:
        """Whether the planner is asked behind ``step``."""
        return (step + 1) % self.every == 0

    def decide(self, loads: np.ndarray, placements: Sequence[Placement]) -> dict[int, Placement]:
        """``loads`` [L, E] of the window -> new placements of the layers that change."""
        found = {}
        for layer, (load, before) in enumerate(zip(loads, placements, strict=True)):
            after = self.planner(load, before)
            if after is not before:
                found[layer] = after
        return found


__all__ = ["WINDOW", "Following", "Planner"]
