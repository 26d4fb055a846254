"""Which rank holds which expert."""

from __future__ import annotations

import dataclasses

import numpy as np

from harness.errors import bad


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """``hosts`` bool [E, num_ranks]; more than one True in a row is a replicated expert."""

    hosts: np.ndarray

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> Placement:
        """Experts in index order, E / num_ranks each, as Megatron, DeepSpeed and Tutel place them."""
        if num_experts % num_ranks:
            raise bad("num_experts", num_experts, f"is not divisible by the {num_ranks} ranks")
        owner = np.arange(num_experts) // (num_experts // num_ranks)
        return cls(owner[:, None] == np.arange(num_ranks)[None, :])

    @property
    def owner(self) -> np.ndarray:
        """First rank that holds each expert, int [E]."""
        return self.hosts.argmax(1)

    def local(self, rank: int) -> np.ndarray:
        """Experts of ``rank``, ascending, int [E_local]."""
        return np.flatnonzero(self.hosts[:, rank])
