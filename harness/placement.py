"""Which rank holds which expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from harness.errors import bad


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """``hosts`` bool [E, num_ranks]; more than one True in a row is a replicated expert. ``slots``: the experts of each
    rank in the order in which it keeps them; None: ascending."""

    hosts: np.ndarray
    slots: tuple[np.ndarray, ...] | None = None

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Placement:
        """Experts in index order, E / num_ranks each, as Megatron, DeepSpeed and Tutel place them."""
        if num_experts % num_ranks:
            raise bad("num_experts", num_experts, f"is not divisible by the {num_ranks} ranks")
        owner = np.arange(num_experts) // (num_experts // num_ranks)
        return cls(owner[:, None] == np.arange(num_ranks)[None, :])

    @classmethod
    def of_slots(cls, slots: Sequence[Sequence[int] | np.ndarray]) -> Placement:
        """``slots``: the experts of each rank; every expert somewhere."""
        kept = tuple(np.asarray(each, dtype=np.int64) for each in slots)
        hosts = np.zeros((1 + max(int(each.max(initial=-1)) for each in kept), len(kept)), dtype=bool)
        for rank, each in enumerate(kept):
            hosts[each, rank] = True
        if not hosts.any(1).all():
            raise bad("placement", int(hosts.any(1).argmin()), "is an expert that no rank holds")
        return cls(hosts, kept)

    @classmethod
    def of_owner(cls, owner: np.ndarray, before: Placement) -> Placement:
        """``owner`` int [E]: the rank of each expert, as many for each rank as ``before``. Experts that stay keep their
        slots; those that come take, in order, the slots that others leave."""
        slots = []
        for rank in range(before.hosts.shape[1]):
            own = before.local(rank).copy()
            gone = owner[own] != rank
            come = np.flatnonzero((owner == rank) & ~before.hosts[:, rank])
            if len(come) != gone.sum():
                raise bad(f"placement of rank {rank}", int((owner == rank).sum()), f"experts; it has {len(own)} slots")
            own[gone] = come
            slots.append(own)
        return cls.of_slots(slots)

    @classmethod
    def of_hosts(cls, hosts: np.ndarray, before: Placement) -> Placement:
        """``hosts`` bool [E, num_ranks]: any number of experts on each rank, any number of ranks for each. Experts that
        stay keep their slots where these remain."""
        slots, counts, changed = [], hosts.sum(0).tolist(), (hosts != before.hosts).any(0).tolist()
        for rank, count in enumerate(counts):
            old = before.local(rank)
            if not changed[rank] and len(old) == count:
                slots.append(old)
                continue
            own = np.full(count, -1)
            kept, come = hosts[old[: len(own)], rank], hosts[:, rank].copy()
            own[: len(kept)][kept] = old[: len(own)][kept]
            come[own[own >= 0]] = False
            own[own < 0] = np.flatnonzero(come)
            slots.append(own)
        return cls.of_slots(slots)

    @classmethod
    def reshaped(cls, owner: np.ndarray, before: Placement) -> Placement:
        """``owner`` int [E], as many for each rank as it may be; otherwise as ``of_hosts``."""
        return cls.of_hosts(owner[:, None] == np.arange(before.hosts.shape[1]), before)

    def swapped(self, pairs: Sequence[tuple[int, int]]) -> Placement:
        """With the places of each pair of experts exchanged, one pair after another."""
        slots = [self.local(rank).copy() for rank in range(self.hosts.shape[1])]
        for a, b in pairs:
            here, there = ([own == expert for own in slots] for expert in (a, b))
            for own, is_a, is_b in zip(slots, here, there, strict=True):
                own[is_a], own[is_b] = b, a
        return self.of_slots(slots)

    @property
    def owner(self) -> np.ndarray:
        """First rank that holds each expert, int [E]."""
        return self.hosts.argmax(1)

    def local(self, rank: int) -> np.ndarray:
        """Experts of ``rank`` in the order of its slots, int [E_local]."""
        return np.flatnonzero(self.hosts[:, rank]) if self.slots is None else self.slots[rank]
