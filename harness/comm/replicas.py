"""Tokens to experts that have replicas, over the flat all-to-all-v: to the nearest, evenly among those as near.

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
import torch

from harness.comm.exchange import FlatExchange, FlatPlan, all_to_all, flat_plan, taken, there_and_back
from harness.comm.rows import stable_order
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


class ReplicaExchange(FlatExchange):
    """``placement``: the owners. Replicas come with every plan (``plan_to``)."""

    def plan(self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None) -> FlatPlan:
        """Without replicas."""
        own = self.placement.local(self.job.rank)
        return self.plan_to(self.placement.hosts, own, ids, weights, kept, self.count(ids, kept))

    def count(self, ids: torch.Tensor, kept: torch.Tensor | None) -> np.ndarray:
        """Collective: rows of every rank for every expert, int64 [num_ranks, E]."""
        num_ranks, num_experts = self.placement.hosts.shape[::-1]
        own = torch.bincount(ids.flatten()[taken(ids, kept)], minlength=num_experts)
        if num_ranks == 1:
            return own.cpu().numpy()[None]
        each = [num_experts] * num_ranks
        every, _ = all_to_all(own.repeat(num_ranks), each, each, self.job.world)
        return every.cpu().numpy().reshape(num_ranks, num_experts)

    def plan_to(
        self,
        hosts: np.ndarray,
        held: np.ndarray,
        ids: torch.Tensor,
        weights: torch.Tensor,
        kept: torch.Tensor | None,
        counts: np.ndarray,
        only: np.ndarray | None = None,
    ) -> FlatPlan:
        """``hosts`` bool [E, num_ranks]: who holds what in this batch; ``held``: this rank's experts in the order in
        which it computes them; ``counts``: as of ``count``; ``only`` bool [source, E, rank]: the part of the rows that
        this plan is for."""
        rank, device = self.job.rank, ids.device
        near = nearest(hosts, self.job.topology)
        rows = near.rows(counts)  # [source, E, rank]
        if only is not None:
            rows = np.where(only, rows, 0)

        chosen = taken(ids, kept)
        expert = ids.flatten()[chosen]
        order = stable_order(expert, len(hosts))
        expert, chosen = expert[order], chosen[order]
        own = torch.as_tensor(counts[rank], device=device)
        number = (
            torch.arange(len(expert), device=device) - (own.cumsum(0) - own)[expert]
        )  # among the rows of its expert
        share = torch.as_tensor(near.count[rank], device=device)[expert]
        target = torch.as_tensor(near.holders(rank), device=device)[expert, (number + rank) % share]
        if only is not None:
            these = torch.as_tensor(only[rank], device=device)[expert, target]
            chosen, target = chosen[these], target[these]
        send = chosen[stable_order(target, len(counts))]

        ascending = np.argsort(held, kind="stable")  # as ranks send them
        received = torch.as_tensor(np.ascontiguousarray(rows[:, np.asarray(held)[ascending], rank]))
        return flat_plan(weights, send, rows[rank].sum(0).tolist(), received, torch.as_tensor(ascending))


def replica_bytes(routing: Routing, hosts: np.ndarray, topology: Topology, row_bytes: float) -> dict[str, np.ndarray]:
    """Planned bytes of ``ReplicaExchange``, [num_ranks, num_ranks] from -> to, by part (see
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
