from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.layer import gates
from harness.layer.oracle import Oracle, keep_strongest
from harness.layer.weights import Weights
from harness.specs import Model

BASE = Model(name="gates", num_layers=1, hidden=32, ffn=8, num_experts=16, top_k=4)


def draw_ids(count: int, model: Model, seed: int) -> torch.Tensor:
    return torch.rand(count, model.num_experts, generator=torch.Generator().manual_seed(seed)).topk(model.top_k).indices


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), k=st.integers(1, 16), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_steer_makes_the_real_gate_choose_the_given_experts(seed: int, k: int, dtype: torch.dtype) -> None:
    model = BASE.model_copy(update={"top_k": k})
    weights = Weights(model, "bfloat16" if dtype == torch.bfloat16 else "float64", seed=seed)
    ids = draw_ids(20, model, seed)
    z = torch.randn(20, model.hidden, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    x = gates.steer(z, weights.router.double(), ids).to(dtype)
    chosen, _ = gates.route(model, x.float() @ weights.router.float())
    assert torch.equal(chosen.sort(-1).values, ids.sort(-1).values)


def test_steer_is_differentiable_and_names_the_limit() -> None:
    weights = Weights(BASE, "float64")
    z = torch.randn(6, BASE.hidden, dtype=torch.float64, requires_grad=True)
    ids = draw_ids(6, BASE, 0)
    assert torch.autograd.gradcheck(lambda v: gates.steer(v, weights.router, ids), z)
    with pytest.raises(UserError, match=r"model.hidden: 8: must be at least num_experts = 16"):
        gates.steer(torch.randn(2, 8), torch.randn(8, 16), torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize("gate", ["gshard", "softmax_topk", "sigmoid"])
@pytest.mark.parametrize("k", [1, 3, 16])
def test_route_equals_the_dense_oracle(gate: str, k: int) -> None:
    model = BASE.model_copy(update={"gate": gate, "top_k": k, "routed_scale": 1.5})
    oracle = Oracle(Weights(model, "float64"))
    logits = torch.randn(50, 16, dtype=torch.float64)
    ids, weights = gates.route(model, logits, oracle.bias)
    dense = torch.zeros_like(logits).scatter(-1, ids, weights)
    torch.testing.assert_close(dense, oracle.gates(logits).detach(), atol=1e-12, rtol=0)


def test_deepseek_group_limit_keeps_every_token_inside_its_groups() -> None:
    model = BASE.model_copy(update={"gate": "sigmoid", "num_groups": 4, "topk_groups": 2})
    oracle = Oracle(Weights(model, "float64"))
    logits = torch.randn(200, 16, dtype=torch.float64)
    ids, weights = gates.route(model, logits, oracle.bias)
    assert max(len(set(row)) for row in (ids // 4).tolist()) <= 2
    free, _ = gates.route(model.model_copy(update={"topk_groups": None}), logits, oracle.bias)
    assert max(len(set(row)) for row in (free // 4).tolist()) > 2  # so the limit did something
    torch.testing.assert_close(torch.zeros_like(logits).scatter(-1, ids, weights), oracle.gates(logits).detach())


def test_drops_keep_the_strongest_within_the_capacity() -> None:
    model = BASE.model_copy(update={"capacity_factor": 1.0})
    logits = torch.randn(40, 16, dtype=torch.float64) + torch.linspace(0, 2, 16, dtype=torch.float64)
    ids, weights, kept = gates.gate(model, logits)
    assert kept is not None
    assert not kept.all()
    per_expert = np.bincount(ids[kept].numpy(), minlength=16)
    assert per_expert.max() == gates.capacity(model, 40) == 10
    dense = torch.zeros(40, 16, dtype=torch.bool).scatter(-1, ids, kept)
    assert torch.equal(dense, keep_strongest(model, logits.softmax(-1)))
    sums = weights.sum(-1)[kept.any(-1)]
    torch.testing.assert_close(sums, torch.ones_like(sums))
