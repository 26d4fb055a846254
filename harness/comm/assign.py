"""Who computes a row: the nearest host of its expert, for every exchange (``harness.comm.replicas.Nearest``)."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from harness.comm.replicas import nearest
from harness.comm.rows import stable_order
from harness.topology import Topology


@dataclasses.dataclass(frozen=True, eq=False)
class Hosting:
    """Who holds which expert in a batch, as one rank sees it. ``hosts`` bool [E, num_ranks]; ``held``: this rank's
    experts in the order in which it computes them; ``counts`` int64 [pieces, num_ranks, E]: rows of every rank for
    every expert, where all ranks know them; ``owners`` bool [E, num_ranks]: hosts that are no copies for this batch
    alone; None: all.

    Every holding, (expert, host), has a number: by rank, and by expert there."""

    hosts: np.ndarray
    held: np.ndarray
    counts: np.ndarray | None = None
    owners: np.ndarray | None = None

    def counted(self, counts: np.ndarray) -> Hosting:
        return dataclasses.replace(self, counts=counts)

    @functools.cached_property
    def several(self) -> bool:
        """Whether an expert has more than one host."""
        return bool((self.hosts.sum(1) > 1).any())

    @functools.cached_property
    def _holdings(self) -> tuple[np.ndarray, np.ndarray]:
        holder, expert = np.nonzero(self.hosts.T)
        return expert, holder

    @property
    def expert(self) -> np.ndarray:
        """Of every holding, int [n]."""
        return self._holdings[0]

    @property
    def holder(self) -> np.ndarray:
        """Its rank, int [n], ascending."""
        return self._holdings[1]

    @functools.cached_property
    def number(self) -> np.ndarray:
        """Of the holding of each expert and rank, int64 [E, num_ranks]; -1: not held."""
        found = np.full(self.hosts.shape, -1, dtype=np.int64)
        found[self.expert, self.holder] = np.arange(len(self.holder))
        return found

    @property
    def owner(self) -> np.ndarray:
        """Of every expert its first host that is no copy for this batch alone, int [E]."""
        return (self.hosts if self.owners is None else self.owners).argmax(1)

    @property
    def copied(self) -> np.ndarray:
        """Copies for this batch alone, bool [E, num_ranks]."""
        return np.zeros_like(self.hosts) if self.owners is None else self.hosts & ~self.owners


def assign(expert: torch.Tensor, hosting: Hosting, topology: Topology, rank: int) -> torch.Tensor:
    """``expert`` int64 [R] of the rows of ``rank``, in the order of its tokens -> the holding that computes each."""
    device = expert.device
    number = torch.as_tensor(hosting.number, device=device)
    if not hosting.several:
        return number.max(1).values[expert]
    near = nearest(hosting.hosts, topology)
    order = stable_order(expert, len(hosting.hosts))
    counts = torch.bincount(expert, minlength=len(hosting.hosts))
    place = torch.empty_like(expert)  # among the rows of its expert
    place[order] = torch.arange(len(expert), device=device) - (counts.cumsum(0) - counts)[expert[order]]
    share = torch.as_tensor(near.count[rank], device=device)[expert]
    host = torch.as_tensor(near.holders(rank), device=device)[expert, (place + rank) % share]
    return number[expert, host]


def expert_pieces(owner: np.ndarray, pieces: int) -> np.ndarray:
    """The piece of each expert, int [E], where every rank cuts its own experts into as many; copies are in the piece of
    their expert. ``owner`` int [E].

    >>> expert_pieces(np.array([0, 0, 0, 0, 1, 1]), 2).tolist()
    [0, 0, 1, 1, 0, 1]
    """
    own = owner[:, None] == owner[None, :]
    place = np.tril(own, -1).sum(1)  # among those of its owner
    return place * pieces // own.sum(1)


def dealt_pieces(
    hosting: Hosting, topology: Topology, rank: int, pieces: int, piece_of: np.ndarray | None
) -> np.ndarray:
    """What ``assign`` of all ranks sends to ``rank``, int64 [pieces, source, held], experts ascending. ``piece_of`` int
    [source, E]: the piece of what goes from each rank for each expert; None: pieces are of ``Hosting.counts``."""
    near = nearest(hosting.hosts, topology)
    here = near.holder == rank
    assert hosting.counts is not None
    if piece_of is not None:
        rows = near.dealt(hosting.counts.sum(0))[:, here]  # [source, held]
        return np.where(piece_of[:, near.expert[here]] == np.arange(pieces)[:, None, None], rows, 0)
    so_far = np.stack([near.dealt(each)[:, here] for each in hosting.counts.cumsum(0)])
    return np.diff(so_far, axis=0, prepend=0)


def targets(ids: np.ndarray, source: np.ndarray, hosts: np.ndarray, topology: Topology) -> np.ndarray:
    """The rank that computes each row by ``assign``, int [T, k]; ``ids`` int [T, k] of tokens of ``source`` int [T]."""
    hosting = Hosting(hosts, np.empty(0, dtype=np.int64))
    if not hosting.several:
        return hosts.argmax(1)[ids]
    found = np.empty(ids.shape, dtype=np.int64)
    for rank in np.unique(source):
        mine = source == rank
        expert = torch.from_numpy(ids[mine].ravel().astype(np.int64))
        held = assign(expert, hosting, topology, int(rank)).numpy()
        found[mine] = hosting.holder[held].reshape(-1, ids.shape[1])
    return found


__all__ = ["Hosting", "assign", "dealt_pieces", "expert_pieces", "targets"]
