"""Copying and summing rows: the two halves of every dispatch and combine.

A ``Spread`` says which item each row is a copy of. Spreading copies items to rows; gathering, its transpose, sums
the rows of each item, in float32 (float64 for float64) whatever the rows' own format.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch.nn import functional as F

BLOCK = 32  # items weighted and summed at a time on CPU, so that the float32 copies stay in cache


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """Row r copies item ``item[r]``; ``item`` int64 [R], values in 0..num_items - 1."""

    item: torch.Tensor
    num_items: int

    @functools.cached_property
    def order(self) -> torch.Tensor:
        """Rows by item, int64 [R]."""
        return self.item.argsort(stable=True)

    @functools.cached_property
    def starts(self) -> torch.Tensor:
        """Place in ``order`` of every item's first row, int64 [num_items]."""
        counts = torch.bincount(self.item, minlength=self.num_items)
        return counts.cumsum(0) - counts

    @functools.cached_property
    def copies(self) -> torch.Tensor:
        """Rows of every item, int64 [num_items, most copies], padded with -1."""
        counts = torch.bincount(self.item, minlength=self.num_items)
        width = int(counts.max()) if len(self.item) else 0
        item = self.item[self.order]
        copies = self.item.new_full((self.num_items, width), -1)
        copies[item, torch.arange(len(item), device=item.device) - self.starts[item]] = self.order
        return copies

    def spread(self, items: torch.Tensor) -> torch.Tensor:
        """items [num_items, M] -> rows [R, M]."""
        return items.index_select(0, self.item)

    def gather(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """sum over an item's rows of weight * row: rows [R, M], weights [R] -> [num_items, M] in rows' format."""
        if not len(rows) or not self.num_items:
            return rows.new_zeros(self.num_items, rows.shape[1])
        if weights is None:
            # embedding_bag is torch's fused gather-and-sum; it adds bfloat16 in float32 and rounds once.
            return F.embedding_bag(self.order, rows, self.starts, mode="sum")
        factor = weights.to(accumulator(rows.dtype))[self.copies].masked_fill_(self.copies < 0, 0)
        index = self.copies.clamp_min(0)
        out = rows.new_empty(self.num_items, rows.shape[1])
        block = BLOCK if rows.device.type == "cpu" else self.num_items
        for start in range(0, self.num_items, block):
            part = index[start : start + block]
            values = rows.index_select(0, part.flatten()).view(*part.shape, -1).to(factor.dtype)
            out[start : start + block] = values.mul_(factor[start : start + block].unsqueeze(-1)).sum(1)
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
        out[start:stop] = (a[start:stop].to(accumulate) * b[start:stop].to(accumulate)).sum(-1)
    return out
