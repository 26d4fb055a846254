"""Copying and summing rows: the two halves of every dispatch and combine.

A ``Spread`` says which item each row is a copy of. Spreading copies items to rows; gathering, its transpose, sums
the rows of each item, in float32 (float64 for float64) whatever the rows' own format.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

BLOCK = 256  # items summed at a time on CPU, so that the float32 copies stay in cache


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """Row r copies item ``item[r]``; ``item`` int64 [R], values in 0..num_items - 1."""

    item: torch.Tensor
    num_items: int

    @functools.cached_property
    def copies(self) -> torch.Tensor:
        """Rows of every item, int64 [num_items, most copies], padded with -1."""
        counts = torch.bincount(self.item, minlength=self.num_items)
        width = int(counts.max()) if len(self.item) else 0
        order = self.item.argsort(stable=True)
        sorted_item = self.item[order]
        place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sorted_item]
        copies = torch.full((self.num_items, width), -1, dtype=torch.int64, device=self.item.device)
        copies[sorted_item, place] = order
        return copies

    def spread(self, items: torch.Tensor) -> torch.Tensor:
        """items [num_items, M] -> rows [R, M]."""
        return items.index_select(0, self.item)

    def gather(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """sum over an item's rows of weight * row: rows [R, M], weights [R] -> [num_items, M] in rows' format."""
        out = rows.new_empty(self.num_items, rows.shape[1])
        if self.copies.shape[1] == 0:
            return out.zero_()
        accumulate = accumulator(rows.dtype)
        padded = bool((self.copies < 0).any())
        index = self.copies.clamp_min(0)
        factor = None
        if weights is not None:
            factor = weights.to(accumulate)[index]
        elif padded:
            factor = torch.ones(index.shape, dtype=accumulate, device=index.device)
        if padded and factor is not None:
            factor = factor.masked_fill(self.copies < 0, 0)
        if factor is None and index.shape[1] == 1:
            return rows.index_select(0, index[:, 0])
        block = BLOCK if rows.device.type == "cpu" else max(1, self.num_items)
        for start in range(0, self.num_items, block):
            part = index[start : start + block]
            values = rows.index_select(0, part.flatten()).view(*part.shape, -1).to(accumulate)
            if factor is not None:
                values *= factor[start : start + block].unsqueeze(-1)
            out[start : start + block] = values.sum(1)
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
