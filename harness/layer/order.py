"""Orders: a rank's tokens in the capacity layout [E, C, M], and back (FSMoE's Order and I-Order, section 3.1).

Two ways to the same buffers: by matrix products with a dense mask (GShard), and by copying rows (Tutel). A token
stands in one slot for each of its experts; slots that nobody takes are zero.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch.nn import functional as F

from harness.comm.rows import Spread, dot_rows, scale_rows, stable_order


@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """Where every assignment of a rank's tokens stands: computed once, used by order and restore, forward and back."""

    expert: torch.Tensor  # int64 [T, k]
    place: torch.Tensor  # int64 [T, k]: slot within the expert, -1 for an assignment that is left out
    num_experts: int
    capacity: int  # C: slots that an expert may fill
    padded: int  # C_pad: slots that it has

    @functools.cached_property
    def taken(self) -> torch.Tensor:
        """Flat indices into [T, k] of the assignments that have a slot, int64 [R]."""
        return (self.place >= 0).flatten().nonzero().squeeze(1)

    @functools.cached_property
    def spread(self) -> Spread:
        """Row -> token, and where it stands in the buffer [E * C_pad, M]."""
        slot = (self.expert * self.padded + self.place).flatten()[self.taken]
        return Spread(self.taken // self.place.shape[1], len(self.place), slot)

    def mask(self, values: torch.Tensor) -> torch.Tensor:
        """values [T, k] at their slots, dense [T, E, C_pad]."""
        place = F.one_hot(self.place.clamp_min(0), self.padded) * (self.place >= 0).unsqueeze(-1)
        expert = F.one_hot(self.expert, self.num_experts)
        return torch.einsum("tk,tke,tkc->tec", values, expert.to(values), place.to(values))


def assign_slots(
    ids: torch.Tensor,
    num_experts: int,
    capacity: int | None = None,
    *,
    kept: torch.Tensor | None = None,
    multiple: int = 1,
) -> Slots:
    """ids int64 [T, k] (and kept bool [T, k], from the gate's drop rule) -> the slots of one rank's tokens.

    An expert's slots fill with first choices in token order, then second choices, and so on (GShard, Tutel); what comes
    after the C-th is left out. Where ``kept`` already holds at most C an expert, nothing more is. ``capacity`` None: C
    is the most that any expert of this rank has (a system must then agree on one C over all ranks). C_pad is C rounded
    up to a multiple of ``multiple`` and at least that: FSMoE's least common multiple of its two pipeline degrees.
    """
    num_tokens, k = ids.shape
    expert = ids.T.flatten()  # first choices first
    taken = torch.ones_like(expert, dtype=torch.bool) if kept is None else kept.T.flatten()
    key = torch.where(taken, expert, num_experts)  # what is left out comes last
    order = stable_order(key, num_experts + 1)
    counts = torch.bincount(key, minlength=num_experts + 1)
    place = torch.empty_like(key)
    place[order] = torch.arange(len(key), device=ids.device) - (counts.cumsum(0) - counts)[key[order]]
    if capacity is None:
        capacity = int(counts[:num_experts].max())
    place = torch.where(taken & (place < capacity), place, -1)
    padded = max(1, -(-capacity // multiple)) * multiple
    return Slots(ids, place.view(k, num_tokens).T, num_experts, capacity, padded)


def order_einsum(x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """GShard's: x [T, M] -> [E, C_pad, M], a matrix product with the mask of slots."""
    return torch.einsum("tec,tm->ecm", slots.mask(torch.ones_like(slots.place, dtype=x.dtype)), x)


def restore_einsum(buffer: torch.Tensor, weights: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Its inverse: expert outputs [E, C_pad, M], weights [T, k] -> weighted sums per token [T, M]."""
    return torch.einsum("tec,ecm->tm", slots.mask(weights.to(buffer.dtype)), buffer)


def order_sparse(x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Tutel's: x [T, M] -> [E, C_pad, M], one copied row per assignment."""
    return _Order.apply(x, slots)


def restore_sparse(buffer: torch.Tensor, weights: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Its inverse: expert outputs [E, C_pad, M], weights [T, k] -> weighted sums per token [T, M], added in float32
    (float64 for float64)."""
    return _Restore.apply(buffer, weights, slots)


#: name -> (order, restore)
ORDERS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "gshard": (order_einsum, restore_einsum),
    "tutel": (order_sparse, restore_sparse),
}


def _at_slots(rows: torch.Tensor, slots: Slots) -> torch.Tensor:
    """rows [R, M] -> [E, C_pad, M], zero elsewhere."""
    buffer = rows.new_zeros(slots.num_experts * slots.padded, rows.shape[1])
    buffer[slots.spread.place] = rows
    return buffer.view(slots.num_experts, slots.padded, -1)


class _Order(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slots):  # type: ignore[no-untyped-def, override]
        ctx.slots = slots
        return _at_slots(slots.spread.spread(x), slots)

    @staticmethod
    def backward(ctx, dbuffer):  # type: ignore[no-untyped-def, override]
        return ctx.slots.spread.gather(dbuffer.flatten(0, 1)), None


class _Restore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer, weights, slots):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(buffer, weights)
        ctx.slots = slots
        return slots.spread.gather(buffer.flatten(0, 1), weights.flatten()[slots.taken])

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        buffer, weights = ctx.saved_tensors
        slots = ctx.slots
        item, chosen = slots.spread.item, weights.flatten()[slots.taken]
        dweights = torch.zeros_like(weights).flatten()
        dots = dot_rows(dy, item, buffer.flatten(0, 1)[slots.spread.place])
        dweights[slots.taken] = dots.to(weights.dtype)
        return _at_slots(scale_rows(dy, item, chosen), slots), dweights.view_as(weights), None
