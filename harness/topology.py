"""Which ranks share which link: ranks as coordinates over link levels, outermost first.

``shape = (2, 4)``: two nodes of four ranks; rank ``r`` has coordinates ``unravel_index(r, shape)``.
``crossing[i]`` everywhere in moebench means traffic between ranks whose first differing coordinate is ``i``.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from harness.errors import bad

MOST_RANKS = 4096  # of a plan, which holds bytes from each rank to each


def check_size(name: str, shape: tuple[int, ...]) -> None:
    """``UserError`` for a cluster of more ranks than can be planned for."""
    if (num_ranks := math.prod(shape)) > MOST_RANKS:
        levels = " x ".join(map(str, shape))
        remedy = f"multiply to {num_ranks:,} ranks, and a plan holds {MOST_RANKS:,} at most; make a level smaller"
        raise bad(f"cluster {name}.levels", levels, remedy)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Ranks laid out over link levels."""

    shape: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return math.prod(self.shape)

    @property
    def num_levels(self) -> int:
        return len(self.shape)

    def num_units(self, level: int) -> int:
        """Units at ``level``: ``U[level + 1]`` in HierMoE's words (nodes for level 0)."""
        return math.prod(self.shape[: level + 1])

    @functools.cached_property
    def coordinates(self) -> np.ndarray:
        """int [num_ranks, num_levels]."""
        return np.stack(np.unravel_index(np.arange(self.num_ranks), self.shape), axis=1)

    def unit_of(self, level: int) -> np.ndarray:
        """Unit index at ``level`` of every rank, int [num_ranks]; at the innermost level the rank itself."""
        return np.arange(self.num_ranks) // (self.num_ranks // self.num_units(level))

    @functools.cached_property
    def level_between(self) -> np.ndarray:
        """First level at which two ranks differ, int [num_ranks, num_ranks]; num_levels on the diagonal."""
        differ = self.coordinates[:, None, :] != self.coordinates[None, :, :]
        return np.where(differ.any(-1), differ.argmax(-1), self.num_levels)

    def inner_group(self, rank: int, level: int) -> list[int]:
        """Ranks in the same unit as ``rank`` at ``level`` (its node for level 0)."""
        unit = self.unit_of(level)
        return [int(r) for r in np.flatnonzero(unit == unit[rank])]

    def rail(self, rank: int, level: int = 0) -> list[int]:
        """Ranks with ``rank``'s coordinates below ``level`` and the same unit above it: one per unit of
        ``level``, so the group in which an inter-node (level 0) all-to-all runs."""
        here = self.coordinates[rank]
        same = np.delete(self.coordinates, level, axis=1) == np.delete(here, level)
        return [int(r) for r in np.flatnonzero(same.all(-1))]
