"""Both orders are the same linear maps, and the inverse of each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.layer import gates
from harness.layer.order import ORDERS, Slots, assign_slots
from harness.specs import Model

BASE = Model(name="order", num_layers=1, hidden=8, ffn=8, num_experts=6, top_k=2)


def through(name: str, slots: Slots, x: torch.Tensor, weights: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Order, experts of different slopes, restore: buffer, y, dx, dweights."""
    order, restore = ORDERS[name]
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    buffer = order(x, slots)
    slope = torch.arange(1.0, slots.num_experts + 1, dtype=x.dtype).view(-1, 1, 1)
    y = restore(buffer * slope, weights, slots)
    y.backward(dy)
    assert x.grad is not None
    assert weights.grad is not None
    return [buffer.detach(), y.detach(), x.grad, weights.grad]


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(0, 20),
    k=st.integers(1, 6),
    capacity=st.sampled_from([None, 0, 1, 3]),
    multiple=st.integers(1, 4),
    drops=st.booleans(),
    num_used=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@example(num_tokens=0, k=2, capacity=None, multiple=3, drops=False, num_used=6, seed=0)
@example(num_tokens=20, k=2, capacity=3, multiple=4, drops=True, num_used=2, seed=0)
def test_the_two_orders_agree_in_values_and_gradients(
    num_tokens: int, k: int, capacity: int | None, multiple: int, drops: bool, num_used: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    k = min(k, num_used)  # the other experts stay empty
    ids = torch.rand(num_tokens, num_used, generator=rng).topk(k).indices
    kept = torch.rand(num_tokens, k, generator=rng) < 0.6 if drops else None
    slots = assign_slots(ids, 6, capacity, kept=kept, multiple=multiple)
    x, dy = torch.randn(2, num_tokens, 5, generator=rng, dtype=torch.float64)
    weights = torch.rand(num_tokens, k, generator=rng, dtype=torch.float64)

    dense, sparse = (through(name, slots, x, weights, dy) for name in ("gshard", "tutel"))
    for one, other in zip(dense, sparse, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    taken = slots.place >= 0
    expected = (weights * taken * (ids + 1)).sum(1, keepdim=True) * x
    torch.testing.assert_close(dense[1], expected, atol=1e-12, rtol=1e-12)
    assert slots.padded % multiple == 0
    assert slots.padded >= max(1, slots.capacity)
    assert dense[0].shape == (6, slots.padded, 5)
    assert dense[0][:, slots.capacity :].abs().sum() == 0


def test_an_expert_fills_with_first_choices_in_token_order() -> None:
    ids = torch.tensor([[1, 0], [0, 1], [0, 2], [0, 1]])
    slots = assign_slots(ids, 3, 2, multiple=math.lcm(2, 3))
    assert slots.place.tolist() == [[0, -1], [0, 1], [1, 0], [-1, -1]]
    assert (slots.capacity, slots.padded) == (2, 6)
    free = assign_slots(ids, 3, kept=torch.tensor([[True, True]] * 3 + [[False, True]]))
    assert free.place.tolist() == [[0, 2], [0, 1], [1, 0], [-1, 2]]
    assert free.capacity == 3


def test_the_gates_own_drops_need_no_others() -> None:
    model = BASE.model_copy(update={"capacity_factor": 1.0})
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 2, 6)
    for gate in ("gshard", "expert_choice"):
        model = model.model_copy(update={"gate": gate})
        ids, _, kept = gates.gate(model, logits)
        assert kept is not None
        slots = assign_slots(ids, 6, gates.capacity(model, 30), kept=kept)
        assert torch.equal(slots.place >= 0, kept)


@pytest.mark.parametrize("name", ORDERS)
def test_bfloat16_stays_bfloat16(name: str) -> None:
    ids = torch.rand(12, 6, generator=torch.Generator().manual_seed(1)).topk(2).indices
    slots = assign_slots(ids, 6)
    x, dy = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.rand(12, 2, generator=torch.Generator().manual_seed(3))
    order, restore = ORDERS[name]
    rows = x.bfloat16().requires_grad_()
    y = restore(order(rows, slots), weights, slots)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert rows.grad is not None
    torch.testing.assert_close(y.double(), weights.double().sum(1, keepdim=True) * x, atol=5e-2, rtol=2e-2)
