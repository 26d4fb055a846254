"""Expert-parallel groups of a job: ranks that hold every expert once, and exchange rows among themselves alone.

A group is as good as a job of its own, with link levels of its own (``Groups.topology``): exchanges, placements and
planners see nothing else. What is told of a whole job is put together from its groups.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from harness.placement import Placement
from harness.topology import Topology


@dataclasses.dataclass(frozen=True)
class Groups:
    """``whole``: all ranks. ``shape``: of one group, its part of every link level. ``strided``: ranks of a group are as
    far apart as there are groups, so that it extends over the outermost levels; else they are neighbours."""

    whole: Topology
    shape: tuple[int, ...]
    strided: bool = False

    @classmethod
    def of(cls, whole: Topology, size: int, across: bool = False) -> Groups:
        """Groups of ``size`` ranks that fill one node after another, or have equal parts of as many nodes as they can
        (``across``). ``ValueError`` where ranks cannot be divided so."""
        if whole.num_ranks % size:
            raise ValueError(f"does not divide the {whole.num_ranks} ranks; give a degree that does")
        left, found = size, []
        for units in whole.shape if across else whole.shape[::-1]:
            part = math.gcd(left, units)
            if part != min(left, units):
                shape = " x ".join(map(str, whole.shape))
                raise ValueError(f"leaves a group unequal parts of the {shape} ranks' nodes; give another degree")
            found.append(part)
            left //= part
        return cls(whole, tuple(found if across else found[::-1]), across and size < whole.num_ranks)

    @functools.cached_property
    def topology(self) -> Topology:
        """Of one group."""
        return Topology(self.shape)

    @property
    def size(self) -> int:
        return self.topology.num_ranks

    def __len__(self) -> int:
        return self.whole.num_ranks // self.size

    def __iter__(self) -> Iterator[np.ndarray]:
        """Ranks of one group after another."""
        return iter(self.members)

    @functools.cached_property
    def members(self) -> np.ndarray:
        """Ranks of every group, int [groups, size]; a column has the same experts."""
        ranks = np.arange(self.whole.num_ranks)
        return ranks.reshape(self.size, -1).T if self.strided else ranks.reshape(-1, self.size)

    def of_rank(self, rank: int) -> tuple[int, int]:
        """Group of a rank, and its place in there."""
        group, place = np.argwhere(self.members == rank)[0].tolist()
        return group, place

    @property
    def replicas(self) -> tuple[int, int]:
        """How many ranks have the same experts, and how far they are apart."""
        return len(self), 1 if self.strided else self.size

    @property
    def apart(self) -> int:
        """How far neighbours of a group are apart."""
        return len(self) if self.strided else 1

    # ------------------------------------------------------------------------------------------- together and apart

    def joined(self, parts: Sequence[np.ndarray], axis: int = -1) -> np.ndarray:
        """What is known of the ranks of each group, one after another on ``axis`` -> of all ranks, in their order."""
        found = np.concatenate(parts, axis)
        return np.take(found, np.argsort(self.members.ravel()), axis)

    def blocks(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Matrices [.., size, size] from and to ranks of each group -> [.., W, W]; nothing goes from group to group."""
        shape, every = np.broadcast_shapes(*(part.shape[:-2] for part in parts)), self.whole.num_ranks
        found = np.zeros((*shape, every, every), dtype=np.result_type(*parts))
        for ranks, part in zip(self, parts, strict=True):
            found[..., ranks[:, None], ranks] = part
        return found

    def placed(self, parts: Sequence[Placement]) -> Placement:
        """A placement for every group -> of all ranks, where each expert has a replica in each group."""
        slots = [part.local(place) for part in parts for place in range(self.size)]
        return Placement.of_slots([slots[at] for at in np.argsort(self.members.ravel())])

    def contiguous(self, num_experts: int) -> Placement:
        """Experts in index order, in every group."""
        return self.placed([Placement.contiguous(num_experts, self.size)] * len(self))

    def placement(self, whole: Placement, group: int) -> Placement:
        """That of one group."""
        return Placement.of_slots([whole.local(rank) for rank in self.members[group].tolist()])


__all__ = ["Groups"]
