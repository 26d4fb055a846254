"""Copying and summing rows: the two halves of every dispatch and combine.

A ``Spread`` says which item each row is a copy of. Spreading copies items to rows; gathering, its transpose, sums
the rows of each item, in float32 (float64 for float64) whatever the rows' own format.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch.nn import functional as F

from harness.comm.handover import Handover


@dataclasses.dataclass(frozen=True, eq=False)
class Spread(Handover):
    """Row r copies item ``item[r]``; ``item`` int64 [R], values in 0..num_items - 1.

    ``place`` int64 [R]: where row r stands in the buffer of rows, if not in order. ``rank_in_item`` int64 [R], below
    2^16: in which order an item's rows are added, if not in theirs.
    """

    item: torch.Tensor
    num_items: int
    place: torch.Tensor | None = None
    rank_in_item: torch.Tensor | None = None

    @functools.cached_property
    def by_item(self) -> torch.Tensor:
        """Rows by item, int64 [R]."""
        if self.rank_in_item is None:
            return stable_order(self.item, self.num_items)
        first = stable_order(self.rank_in_item, 1 << 16)
        return first[stable_order(self.item[first], self.num_items)]

    @functools.cached_property
    def source(self) -> torch.Tensor:
        """Where the rows of item 0, 1, ... stand in the buffer, int64 [R]."""
        return self.by_item if self.place is None else self.place[self.by_item]

    @functools.cached_property
    def starts(self) -> torch.Tensor:
        """Index in ``source`` of every item's first row, int64 [num_items]."""
        counts = torch.bincount(self.item, minlength=self.num_items)
        return counts.cumsum(0) - counts

    def spread(self, items: torch.Tensor) -> torch.Tensor:
        """items [num_items, M] -> rows [R, M], in order."""
        return items.index_select(0, self.item)

    def gather(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over an item's rows of weight * row: buffer [>= R, M], weights [R] -> [num_items, M]."""
        if weights is not None:
            weights = weights[self.by_item]
        return sum_rows(rows, self.source, self.starts, weights)


def sum_rows(
    rows: torch.Tensor, source: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums of weight * row, one for each of ``starts`` [N]: of ``rows[source]`` from there to the next start.

    embedding_bag is torch's fused gather-and-sum; it adds formats of 16 bits in float32 and rounds once."""
    if not len(source) or not len(starts):
        return rows.new_zeros(len(starts), rows.shape[1])
    if weights is not None and rows.dtype.itemsize == 2:
        # The kernel wants weights in the rows' format: each row counts twice, with the upper and with the lower
        # bits of its weight, inside one float32 sum.
        upper = weights.to(rows.dtype)
        lower = (weights - upper).to(rows.dtype)
        source, starts = source.repeat_interleave(2), starts * 2
        weights = torch.stack([upper, lower], dim=1).flatten()
    if weights is not None:
        weights = weights.to(rows.dtype)
    return F.embedding_bag(source, rows, starts, mode="sum", per_sample_weights=weights)


def scale_rows(rows: torch.Tensor, source: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """weights [R] * rows[source] -> [R, M], rounded once."""
    return sum_rows(rows, source, torch.arange(len(source), device=source.device), weights)


def stable_order(key: torch.Tensor, bound: int) -> torch.Tensor:
    """``key.argsort(stable=True)`` for int64 keys in 0..bound - 1; radix sort on CPU where 16 bits hold them."""
    if key.is_cuda or bound > 1 << 16:
        return key.argsort(stable=True)
    return torch.from_numpy(key.numpy().astype(np.uint16).argsort(kind="stable"))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The format in which sums of ``dtype`` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_rows(a: torch.Tensor, source: torch.Tensor, b: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
    """Inner products of a[source] and b (or b[place]) [R, M], row by row -> [R], added in the accumulator's format."""
    rows = torch.arange(len(source), device=b.device)
    if not len(rows):
        return b.new_zeros(0, dtype=accumulator(b.dtype))
    # The gradient of embedding_bag's weights is just this, fused; its public face would compute the sums as well.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a, b, rows if place is None else place, rows, source, 0
    )
    return dots.to(accumulator(b.dtype))
