"""What HierD-AlltoAll will send, from the routing alone (pure numpy): by part of the exchange and by stage.

One place says which bytes go where; ``HierTravel.bytes`` sums them up for ``System.planned_bytes``, and
``methods.hiermoe.layout`` prices them stage by stage.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from harness.routing.types import Routing
from harness.topology import Topology
from methods.hiermoe.counts import Array, Counts, Stage, count, longest, stages

#: parts of an exchange (``System.planned_bytes``) on the way to the experts; the others go home
AWAY = ("metadata", "dispatch", "combine_grad")


@dataclasses.dataclass(frozen=True)
class Wire:
    """How an exchange sends. ``row_bytes``: of a token, and ``dispatch_bytes`` on its way to the experts in the
    forward where that is another number; ``weight_bytes``: of a gate weight; ``weights_learn``: whether their gradients
    return."""

    row_bytes: float
    weight_bytes: int
    num_chunks: int = 4
    deduplicate: bool = True
    padded: bool = False
    weights_learn: bool = True
    dispatch_bytes: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class HierTravel:
    """One batch by HDd (or Hd), d = ``dimension``. Matrices [num_ranks, num_ranks] from -> to are made when they are
    asked for. ``chosen``: the ranks told each other their counts to choose the dimension. ``padded``: of each stage
    rows of a padded message, summed over chunks; empty where none are padded."""

    counts: Counts
    where: Array  # the rank of each expert int [E], or its hosts bool [E, G]
    dimension: int
    wire: Wire
    chosen: bool = False
    padded: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        routing: Routing,
        where: Array,
        topology: Topology,
        dimension: int,
        wire: Wire,
        *,
        counts: Counts | None = None,
        chosen: bool = False,
    ) -> HierTravel:
        """``counts``: of ``routing``, where they are known. O(T k)."""
        counts = counts or count(routing, where, topology)
        padded: tuple[int, ...] = ()
        if wire.padded:
            padded = tuple(
                longest(routing, where, topology, stage, wire.num_chunks, deduplicated=wire.deduplicate)
                for stage in stages(dimension, topology.num_levels)
            )
        return cls(counts, where, dimension, wire, chosen, padded)

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """Outermost first."""
        return stages(self.dimension, self.counts.topology.num_levels)

    def bytes(self, part: str) -> Array:
        """Of a part of the exchange over all its stages, diagonal 0."""
        found = sum(self.stage_bytes(part, stage) for stage in self.stages)
        assert isinstance(found, np.ndarray)
        if part == "metadata" and self.chosen:
            found = found + self.choice_bytes()
        np.fill_diagonal(found, 0)
        return found

    def stage_bytes(self, part: str, stage: Stage) -> Array:
        """Of a part of the exchange at one stage, what stays on its rank included."""
        if part == "metadata":
            return self._metadata(stage)
        if part == "metadata_grad":
            return self._entries(stage).T * float(self.wire.weight_bytes)
        apart = self.wire.dispatch_bytes if part == "dispatch" else None
        rows = self._rows(stage) * (self.wire.row_bytes if apart is None else apart)
        return rows if part in AWAY else rows.T

    def choice_bytes(self) -> Array:
        """Every rank tells every other how many of its tokens go where, int32 for each unit of each level."""
        topology = self.counts.topology
        num_units = sum(topology.num_units(level) for level in range(topology.num_levels))
        return np.full((topology.num_ranks,) * 2, 4.0 * num_units)

    def _rows(self, stage: Stage) -> Array:
        """Padded, if they are."""
        if self.padded:
            return _peers(self.counts.topology, stage) * float(self.padded[self.stages.index(stage)])
        return self.counts.rows(stage, deduplicated=self.wire.deduplicate).astype(np.float64)

    def _entries(self, stage: Stage) -> Array:
        """(row, expert) pairs."""
        return self.counts.rows(stage, deduplicated=False)

    def _metadata(self, stage: Stage) -> Array:
        """Rows of every chunk and entries, int32; of each row how many experts, of each entry its expert and weight."""
        topology, wire = self.counts.topology, self.wire
        unit = topology.unit_of(stage.b - 1)
        width = np.where(self._held(unit)[unit] <= 256, 1.0, 2.0)  # per receiving rank
        rows = self.counts.rows(stage, deduplicated=wire.deduplicate)
        table = _peers(topology, stage) * 4.0 * (wire.num_chunks + 1)
        return np.asarray(table + rows + self._entries(stage) * (width + wire.weight_bytes))

    def _held(self, unit: Array) -> Array:
        """Experts, with copies, of each unit."""
        if self.where.ndim == 1:
            return np.bincount(unit[self.where], minlength=unit.max() + 1)
        return np.bincount(unit, self.where.sum(0), unit.max() + 1)


@functools.lru_cache(maxsize=8)
def _peers(topology: Topology, stage: Stage) -> Array:
    """1 between ranks of one all-to-all of the stage, [num_ranks, num_ranks]."""
    outside = np.delete(topology.coordinates, np.s_[stage.a : stage.b], axis=1)
    return (outside[:, None] == outside[None]).all(-1).astype(np.float64)
