"""Expert ids of every token of the job, for one layer and step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from harness.errors import bad


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """``ids`` int32 [T, k]: distinct experts of each token, best first; tokens of rank 0 first.

    ``tokens``: tokens of each rank, summing to T.
    """

    ids: np.ndarray
    tokens: tuple[int, ...]
    num_experts: int

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or len(self.ids) != sum(self.tokens):
            raise bad("routing.ids", self.ids.shape, f"must be [T, k] with T = {sum(self.tokens)} tokens")
        if not np.issubdtype(self.ids.dtype, np.integer):
            raise bad("routing.ids", str(self.ids.dtype), "expert ids must be whole numbers")
        if self.ids.size and not 0 <= self.ids.min() <= self.ids.max() < self.num_experts:
            wrong = self.ids.min() if self.ids.min() < 0 else self.ids.max()
            raise bad("routing.ids", int(wrong), f"expert ids must lie in 0..{self.num_experts - 1}")

    @property
    def top_k(self) -> int:
        return int(self.ids.shape[1])

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """First token of every rank, and the total, int [num_ranks + 1]."""
        return np.concatenate([[0], np.cumsum(self.tokens)]).astype(np.int64)

    @functools.cached_property
    def source(self) -> np.ndarray:
        """Rank of every token, int [T]."""
        return np.repeat(np.arange(len(self.tokens)), self.tokens)

    def of_rank(self, rank: int) -> np.ndarray:
        """int32 [T_rank, k]."""
        return self.ids[self.offsets[rank] : self.offsets[rank + 1]]

    @functools.cached_property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 over ids (as a set per token), tokens per rank and E."""
        h = hashlib.sha256(np.sort(self.ids.astype("<i4"), axis=1).tobytes())
        h.update(repr((tuple(map(int, self.tokens)), self.num_experts, self.top_k)).encode())
        return h.hexdigest()[:16]

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Assignments from each rank to each expert, int64 [num_ranks, E]; not to be changed."""
        cells = self.source[:, None] * self.num_experts + self.ids
        found = np.bincount(cells.ravel(), minlength=len(self.tokens) * self.num_experts)
        found.setflags(write=False)
        return found.reshape(len(self.tokens), self.num_experts)

    @property
    def sample(self) -> Routing:
        """Tokens for statistics of pairs: who shares tokens with whom. Here all of them."""
        return self

    def gathered(self, ranks: np.ndarray) -> Routing:
        """As if the ranks in each row of ``ranks`` [size, n] were one, and there were no others."""
        return Gathered(self, ranks)


class Gathered(Routing):
    """Of some ranks of ``whole``; drawn when asked for, as that is."""

    whole: Routing
    ranks: np.ndarray

    def __init__(self, whole: Routing, ranks: np.ndarray):
        values = self.__dict__  # which is frozen otherwise
        values["whole"], values["ranks"], values["num_experts"] = whole, ranks, whole.num_experts
        values["tokens"] = tuple(sum(whole.tokens[rank] for rank in row) for row in ranks.tolist())

    @functools.cached_property
    def ids(self) -> np.ndarray:  # type: ignore[override]
        return np.concatenate([self.whole.of_rank(rank) for rank in self.ranks.ravel().tolist()])

    @property
    def top_k(self) -> int:
        return int(self.whole.top_k)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        found: np.ndarray = self.whole.counts[self.ranks].sum(1)
        found.setflags(write=False)
        return found

    @property
    def sample(self) -> Routing:
        few = self.whole.sample
        return self if few is self.whole else few.gathered(self.ranks)
