"""Copying and summing rows: the two halves of every dispatch and combine.

A ``Spread`` says which item each row is a copy of. Spreading copies items to rows; gathering, its transpose, sums
the rows of each item, in float32 (float64 for float64) whatever the rows' own format.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch
from torch.nn import functional as F

BLOCK = 64  # items weighted and summed at a time on CPU, so that the float32 copies stay in cache


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """Row r copies item ``item[r]``; ``item`` int64 [R], values in 0..num_items - 1.

    ``place`` int64 [R]: where row r stands in the buffer of rows, if not in order.
    """

    item: torch.Tensor
    num_items: int
    place: torch.Tensor | None = None

    @functools.cached_property
    def by_item(self) -> torch.Tensor:
        """Rows by item, int64 [R]."""
        return self.item.argsort(stable=True)

    @functools.cached_property
    def source(self) -> torch.Tensor:
        """Where the rows of item 0, 1, ... stand in the buffer, int64 [R]."""
        return self.by_item if self.place is None else self.place[self.by_item]

    @functools.cached_property
    def starts(self) -> torch.Tensor:
        """Index in ``source`` of every item's first row, int64 [num_items]."""
        counts = torch.bincount(self.item, minlength=self.num_items)
        return counts.cumsum(0) - counts

    def spread(self, items: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """items [num_items, M] -> rows [R, M]; with ``out`` each row goes to its place there."""
        rows = items.index_select(0, self.item)
        if out is None:
            return rows
        out[slice(None) if self.place is None else self.place] = rows
        return rows

    def gather(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over an item's rows of weight * row: buffer [>= R, M], weights [R] -> [num_items, M]."""
        if not len(self.item) or not self.num_items:
            return rows.new_zeros(self.num_items, rows.shape[1])
        if weights is None:
            # embedding_bag is torch's fused gather-and-sum; it adds bfloat16 in float32 and rounds once.
            return F.embedding_bag(self.source, rows, self.starts, mode="sum")
        weights = weights.to(accumulator(rows.dtype))[self.by_item]
        out = rows.new_empty(self.num_items, rows.shape[1])
        block = BLOCK if rows.device.type == "cpu" else self.num_items
        bounds = [*self.starts[::block].tolist(), len(self.item)]
        for i, (a, b) in enumerate(itertools.pairwise(bounds)):
            items = slice(i * block, (i + 1) * block)
            values = rows.index_select(0, self.source[a:b]).to(weights.dtype)
            index = torch.arange(b - a, device=rows.device)
            starts = self.starts[items] - a
            out[items] = F.embedding_bag(index, values, starts, mode="sum", per_sample_weights=weights[a:b])
        return out


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The format in which sums of ``dtype`` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row-wise inner products in the accumulator's format: [R, M] x [R, M] -> [R]."""
    accumulate = accumulator(a.dtype)
    out = torch.empty(len(a), dtype=accumulate, device=a.device)
    block = BLOCK if a.device.type == "cpu" else max(1, len(a))
    for start in range(0, len(a), block):
        stop = start + block
        out[start:stop] = torch.linalg.vecdot(a[start:stop].to(accumulate), b[start:stop].to(accumulate))
    return out
