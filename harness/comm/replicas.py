"""Tokens to experts that have replicas: to the nearest, evenly among those as near.

A token on a rank that holds its expert stays; else the rows for this expert are dealt out evenly to the holders in
the rank's node; else evenly to all holders (Hecate, arXiv 2502.02581, topology-aware dispatch). With more than two
link levels the holders of the nearest unit share. A rank deals its rows in their order, beginning with the holder
after its own number, so that what does not divide does not always go to the first. Who gets how many is then a
function of the tokens that each rank has for each expert: every rank is told these, and nothing else travels as
metadata.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from harness.routing.certificate import expert_counts
from harness.routing.types import Routing
from harness.topology import Topology


class Nearest:
    """Which holders share the rows that each rank has for each expert. ``hosts`` bool [E, num_ranks]. Holdings (expert
    and rank, n of them) are few, so arrays are [source, n] rather than [source, E, num_ranks]."""

    def __init__(self, hosts: np.ndarray, topology: Topology):
        self.shape = hosts.shape
        self.expert, self.holder = np.nonzero(hosts)
        first = np.searchsorted(self.expert, np.arange(len(hosts)))
        level = topology.level_between[:, self.holder]  # num_levels: the rank itself
        self.share = level == np.maximum.reduceat(level, first, axis=1)[:, self.expert]
        self.count = np.add.reduceat(self.share, first, axis=1, dtype=np.int64)  # [source, E]
        before = np.cumsum(self.share, axis=1, dtype=np.int32)
        self.index = before - before[:, first][:, self.expert] + self.share[:, first][:, self.expert] - 1
        # ^ of each holder among those that share

    def dealt(self, counts: np.ndarray) -> np.ndarray:
        """``counts`` int [source, E]: rows of each rank for each expert -> int [source, n]: who gets how many."""
        whole, rest = np.divmod(counts, self.count)
        turn = self.index - (np.arange(len(counts))[:, None] % self.count)[:, self.expert]
        turn += np.where(turn < 0, self.count[:, self.expert], 0)
        return np.where(self.share, whole[:, self.expert] + (turn < rest[:, self.expert]), 0)

    def rows(self, counts: np.ndarray) -> np.ndarray:
        """``dealt`` as int [source, E, rank]."""
        found = np.zeros((len(counts), *self.shape), dtype=np.int64)
        found[:, self.expert, self.holder] = self.dealt(counts)
        return found

    def holders(self, rank: int) -> np.ndarray:
        """Of the rows of ``rank``: holders of each expert that share them, int [E, most], in their order."""
        here = self.share[rank]
        found = np.zeros((self.shape[0], int(self.count[rank].max())), dtype=np.int64)
        found[self.expert[here], self.index[rank, here]] = self.holder[here]
        return found


def nearest(hosts: np.ndarray, topology: Topology) -> Nearest:
    """Kept for placements that come again."""
    return _nearest(np.packbits(hosts).tobytes(), hosts.shape, topology)


@functools.lru_cache(maxsize=64)
def _nearest(packed: bytes, shape: tuple[int, int], topology: Topology) -> Nearest:
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=shape[0] * shape[1])
    return Nearest(bits.reshape(shape).astype(bool), topology)


def replica_bytes(routing: Routing, hosts: np.ndarray, topology: Topology, row_bytes: float) -> dict[str, np.ndarray]:
    """Planned bytes of the flat exchange to copies, [num_ranks, num_ranks] from -> to, by part (see
    ``System.planned_bytes``)."""
    return bytes_of_rows(travel(expert_counts(routing), hosts, topology).rows, len(hosts), row_bytes)


def bytes_of_rows(rows: np.ndarray, num_experts: int, row_bytes: float) -> dict[str, np.ndarray]:
    """The same of ``rows`` [source, rank] that go from each rank to each."""
    matrix = rows * float(row_bytes)
    np.fill_diagonal(matrix, 0)
    metadata = np.full(matrix.shape, 8.0 * num_experts)  # int64 per expert
    np.fill_diagonal(metadata, 0)
    return there_and_back(metadata, matrix)


class Travel(NamedTuple):
    """``rows`` float64 [source, rank]: that go from each rank to each; ``computed`` float64 [W, E]: that each rank
    computes of each expert; ``stays`` float64 [W, E]: those of its own tokens among them."""

    rows: np.ndarray
    computed: np.ndarray
    stays: np.ndarray


def travel(counts: np.ndarray, hosts: np.ndarray, topology: Topology, masks: np.ndarray | None = None) -> Travel:
    """Of ``counts`` int [source, E] to the nearest of ``hosts`` bool [E, num_ranks]. ``masks`` bool [n, source, rank]:
    ``computed`` is [n, W, E] then, of the rows between these ranks."""
    num_ranks, num_experts = counts.shape
    rows, stays = np.zeros((num_ranks, num_ranks)), np.zeros((num_ranks, num_experts))
    between = np.ones((1, num_ranks, num_ranks)) if masks is None else masks.astype(np.float64)
    computed = np.zeros((len(between), num_ranks, num_experts))
    single = np.flatnonzero(hosts.sum(1) == 1)  # nothing to share out
    if len(single):
        owner = hosts[single].argmax(1)
        np.add.at(rows.T, owner, counts[:, single].T)
        computed[:, owner, single] = np.einsum("se,gse->ge", counts[:, single], between[:, :, owner])
        stays[owner, single] = counts[owner, single]
    everywhere, home = hosts.all(1) & (num_ranks > 1), np.arange(num_ranks)
    if everywhere.any():  # all stay
        rows[home, home] += counts[:, everywhere].sum(1)
        computed[:, :, everywhere] = counts[:, everywhere] * between[:, home, home][..., None]
        stays[:, everywhere] = counts[:, everywhere]
    several = np.flatnonzero((hosts.sum(1) > 1) & ~everywhere)
    size = max(1, (1 << 22) // (num_ranks * max(1, int(hosts.sum(1).max()))))  # a few at a time: [source, n] is large
    for first in range(0, len(several), size):
        part = several[first : first + size]
        near = nearest(hosts[part], topology)
        dealt, expert, holder = near.dealt(counts[:, part]), part[near.expert], near.holder
        order = np.argsort(holder, kind="stable")
        ranks, starts = np.unique(holder[order], return_index=True)
        rows[:, ranks] += np.add.reduceat(dealt[:, order], starts, axis=1)
        if masks is None:
            computed[0, holder, expert] = dealt.sum(0)
        else:
            computed[:, holder, expert] = np.einsum("sn,gsn->gn", dealt, between[:, :, holder])
        stays[holder, expert] = dealt[holder, np.arange(len(holder))]
    return Travel(rows, computed[0] if masks is None else computed, stays)


def replica_shares(routing: Routing, hosts: np.ndarray, topology: Topology) -> np.ndarray:
    """Share of each expert's rows that each of its ``hosts`` computes, float64 [E, num_ranks] (see
    ``System.planned_shares``); of an expert without rows, as if evenly."""
    counts = expert_counts(routing)
    rows = travel(counts, hosts, topology).computed.T
    total = counts.sum(0)[:, None]
    return np.where(total > 0, rows / np.maximum(total, 1), hosts / hosts.sum(1, keepdims=True))


def there_and_back(metadata: np.ndarray, dispatch: np.ndarray) -> dict[str, np.ndarray]:
    """Parts of ``System.planned_bytes`` of an exchange whose rows come home the way they went, and again backward."""
    return {
        "metadata": metadata,
        "dispatch": dispatch,
        "combine": dispatch.T.copy(),
        "combine_grad": dispatch,
        "dispatch_grad": dispatch.T.copy(),
    }
