"""How many rows HierD-AlltoAll sends between whom, from a routing alone (HierMoE, arXiv 2508.09591, section III).

Link levels are counted as in the paper: level i = 1 .. D joins U[i] units, U[0] = 1 and U[D] = G ranks. The
d-dimensional algorithm is Inter-level-1 .. Inter-level-(d-1), then Intra-level-(d-1) (for d = 1 all ranks at once). A
stage, ``Stage(a, b)``, takes a row that is in the right unit of level a to the unit of level b in which its expert is.
Ranks at a stage's two ends have equal coordinates beyond level b.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from harness.comm.assign import targets
from harness.comm.replicas import travel
from harness.routing.types import Routing
from harness.topology import Topology

Array = np.ndarray


class Stage(NamedTuple):
    """Inter-level-b (a = b - 1), Intra-level-a (b = D), or the whole (0, D)."""

    a: int
    b: int

    def key(self, num_levels: int) -> str:
        """Its all-to-all's key among a cluster's costs."""
        if self == (0, num_levels):
            return "a2a.flat"
        return f"a2a.intra{self.a}" if self.b == num_levels and self.a else f"a2a.inter{self.b}"


def stages(dimension: int, num_levels: int) -> list[Stage]:
    """Of HDd and Hd, outermost first."""
    inter = [Stage(i - 1, i) for i in range(1, dimension)]
    return [*inter, Stage(dimension - 1, num_levels)]


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """Per level i = 1 .. D (index i - 1), of each source rank: ``distinct`` [G, U_i], its tokens of which a unit holds
    an expert at all; ``copies`` [G, U_i], their (token, expert) pairs. Additive: ranks may count apart."""

    topology: Topology
    distinct: tuple[Array, ...]
    copies: tuple[Array, ...]

    def rows(self, stage: Stage, *, deduplicated: bool = True) -> Array:
        """Rows from -> to at a stage, int64 [G, G], what stays on its rank included; every token starts at its source.

        Inside a unit of level a the rows of all sources that have the same coordinates there meet on one rank."""
        table = (self.distinct if deduplicated else self.copies)[stage.b - 1]
        holder, target = _ends(self.topology, stage)
        num_ranks = self.topology.num_ranks
        flat = np.bincount((holder * num_ranks + target).ravel(), table.ravel(), num_ranks**2)
        return np.rint(flat).astype(np.int64).reshape(num_ranks, num_ranks)


def needed(unit: Array, num_units: int) -> Array:
    """unit int [T, k] of each token's experts, -1 where one is dropped -> bool [T, U]: units that a token needs."""
    found = np.zeros((len(unit), num_units + 1), dtype=bool)  # the last: for what is dropped
    found[np.arange(len(unit))[:, None], unit] = True
    return found[:, :num_units]


def count(routing: Routing, where: Array, topology: Topology) -> Counts:
    """``where``: the rank of each expert int [E], or its hosts bool [E, G]. O(T k (log k + D)). Where a sample stands
    for the tokens, copies are those of all, and as many of them are duplicates as in the sample."""
    few, num_ranks = routing.sample, topology.num_ranks
    distinct = _distinct(_ranks(few, where, topology), topology, few.source, num_ranks)
    copies = _copies(routing, where, topology)
    if few is not routing:
        pairs = zip(distinct, _copies(few, where, topology), copies, strict=True)
        distinct = tuple(_as_in_sample(*each) for each in pairs)
    return Counts(topology, distinct, copies)


def longest(
    routing: Routing, where: Array, topology: Topology, stage: Stage, chunks: int, *, deduplicated: bool
) -> int:
    """Rows of a message of ``stage`` if all are as long as the longest, each rank's tokens in so many pieces; summed
    over these."""
    few, num_ranks = routing.sample, topology.num_ranks
    place = np.arange(len(few.ids)) - few.offsets[few.source]
    source = ((place + 1) * chunks - 1) // np.asarray(few.tokens)[few.source] * num_ranks + few.source
    tables = (_distinct if deduplicated else _pairs)(_ranks(few, where, topology), topology, source, chunks * num_ranks)
    pieces = zip(*(np.split(table, chunks) for table in tables), strict=True)
    most = sum(int(Counts(topology, piece, piece).rows(stage).max(initial=0)) for piece in pieces)
    return most if few is routing else round(most * sum(routing.tokens) / max(1, sum(few.tokens)))


def _ranks(routing: Routing, where: Array, topology: Topology) -> Array:
    """That compute each token's rows, int [T, k]."""
    return where[routing.ids] if where.ndim == 1 else targets(routing.ids, routing.source, where, topology)


def _distinct(ranks: Array, topology: Topology, source: Array, num_sources: int) -> tuple[Array, ...]:
    """``Counts.distinct``, of tokens that come from ``source`` int [T]; ``ranks`` int [T, k]."""
    found = []
    ranks = np.sort(ranks.astype(np.int32), axis=1)  # units of equal rank follow each other on any level
    for level in range(topology.num_levels):
        num_units = topology.num_units(level)
        unit = ranks // (topology.num_ranks // num_units)  # [T, k]
        first = np.ones(unit.shape, dtype=bool)
        first[:, 1:] = unit[:, 1:] != unit[:, :-1]
        keys = ((source * num_units)[:, None] + unit)[first]
        found.append(np.bincount(keys, minlength=num_sources * num_units).reshape(num_sources, num_units))
    return tuple(found)


def _pairs(ranks: Array, topology: Topology, source: Array, num_sources: int) -> tuple[Array, ...]:
    """``Counts.copies``, likewise."""
    keys = (source * topology.num_ranks)[:, None] + ranks
    found = np.bincount(keys.ravel(), minlength=num_sources * topology.num_ranks)
    return _by_level(found.reshape(num_sources, -1), topology)


def _copies(routing: Routing, where: Array, topology: Topology) -> tuple[Array, ...]:
    """``Counts.copies``."""
    if where.ndim > 1:
        return _by_level(np.rint(travel(routing.counts, where, topology).rows).astype(np.int64), topology)
    there = where[:, None] == np.arange(topology.num_ranks)  # [E, G]
    return _by_level(np.rint(routing.counts.astype(np.float64) @ there).astype(np.int64), topology)


def _by_level(of_rank: Array, topology: Topology) -> tuple[Array, ...]:
    """[.., G] -> [.., U_i] of every level."""
    return tuple(of_rank.reshape(len(of_rank), topology.num_units(i), -1).sum(-1) for i in range(topology.num_levels))


def _as_in_sample(distinct: Array, copies: Array, of_all: Array) -> Array:
    """Of ``of_all`` copies [G, U] as many distinct ones as a sample has of its ``copies``; where the sample of a rank
    has none, as that of all ranks."""
    common = distinct.sum(0) / np.maximum(copies.sum(0), 1)
    share = np.where(copies > 0, distinct / np.maximum(copies, 1), np.where(common > 0, common, 1.0))
    return np.rint(of_all * share).astype(np.int64)


@functools.lru_cache(maxsize=64)
def _ends(topology: Topology, stage: Stage) -> tuple[Array, Array]:
    """Ranks [G, U_b] between which a row goes at ``stage``, by its source and the unit of level b that it needs."""
    coordinates = topology.coordinates  # [G, D]
    of_unit = np.stack(np.unravel_index(np.arange(topology.num_units(stage.b - 1)), topology.shape[: stage.b]), axis=1)
    ends = []
    for prefix in (stage.a, stage.b):
        place = np.repeat(coordinates[:, None, :], len(of_unit), axis=1)  # [G, U_b, D]
        place[..., :prefix] = of_unit[None, :, :prefix]
        ends.append(np.ravel_multi_index(np.moveaxis(place, -1, 0), topology.shape))
    return ends[0], ends[1]


# ---- duplication (Table II) ---------------------------------------------------------------------------------------


def duplication(top_k: int, num_experts: int, num_groups: int) -> float:
    """Share of (token, expert) pairs that are duplicates if every k distinct experts are equally likely: a group of
    E / R experts is spared by C(E - E/R, k) / C(E, k) of the tokens."""
    size = num_experts // num_groups
    spared = math.comb(num_experts - size, top_k) / math.comb(num_experts, top_k)
    return 1 - num_groups * (1 - spared) / top_k


def counted_duplication(ids: Array, num_experts: int, num_groups: int) -> float:
    """The same of tokens [T, k], experts in index order."""
    return float(1 - needed(ids // (num_experts // num_groups), num_groups).sum() / ids.size)
