from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from harness import memory
from harness.errors import UserError
from harness.layer import gates
from harness.layer.oracle import Oracle, keep_strongest
from harness.layer.weights import Weights
from harness.routing import make_routing, planned_routing
from harness.specs import Model, Workload
from harness.topology import Topology

BASE = Model(name="gates", num_layers=1, hidden=32, ffn=8, num_experts=16, top_k=4)


def gate_of(weights: Weights, max_tokens: int = 1) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in weights.gate(max_tokens).items()}


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


@pytest.mark.parametrize(
    "gate",
    [
        {"gate": "gshard"},
        {"gate": "softmax_topk"},
        {"gate": "sigmoid"},
        {"gate": "sigmoid", "normalise_weights": False, "selection_bias": False},
        {"gate": "xmoe"},
        {"gate": "moge", "num_groups": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [1, 3, 16])
def test_route_equals_the_dense_oracle(gate: dict[str, Any], k: int) -> None:
    if gate["gate"] == "moge":
        k = {1: 4, 3: 8}.get(k, k)
    model = BASE.model_copy(update=gate | {"top_k": k, "routed_scale": 1.5})
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


def test_moge_takes_as_many_experts_from_each_group_with_their_shares_of_all() -> None:
    model = BASE.model_copy(update={"gate": "moge", "num_groups": 2})
    logits = torch.randn(200, 16, dtype=torch.float64)
    ids, weights = gates.route(model, logits)
    for token, row in enumerate(logits.tolist()):
        wanted = {g + place for g in (0, 8) for place in np.argsort(row[g : g + 8])[-2:]}
        assert set(ids[token].tolist()) == wanted
    exp = logits.exp()
    torch.testing.assert_close(weights, exp.gather(1, ids) / exp.sum(1, keepdim=True))  # not renormalised
    assert (weights.diff(dim=1) <= 0).all()  # best first
    free, _ = gates.route(model.model_copy(update={"gate": "gshard"}), logits)
    assert (free // 8).float().mean(1).ne(0.5).any()  # so the groups did something


def test_moge_drops_the_weakest_of_an_expert_and_leaves_the_other_weights_alone() -> None:
    model = BASE.model_copy(update={"gate": "moge", "num_groups": 2, "capacity_factor": 1.0})
    logits = torch.randn(40, 16, dtype=torch.float64) + torch.linspace(0, 2, 16, dtype=torch.float64)
    ids, weights, kept = gates.gate(model, logits)
    assert kept is not None
    assert not kept.all()
    assert torch.equal(
        torch.zeros(40, 16, dtype=torch.bool).scatter(-1, ids, kept), keep_strongest(model, logits.softmax(-1))
    )
    torch.testing.assert_close(weights, torch.where(kept, logits.softmax(-1).gather(1, ids), 0.0))


@pytest.mark.parametrize(
    "gate", [{"gate": "gshard"}, {"gate": "softmax_topk"}, {"gate": "moge", "num_groups": 2}], ids=str
)
def test_what_a_gate_keeps_for_its_backward_is_as_planned(gate: dict[str, Any]) -> None:
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor is not rows:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = torch.ones(30, 4, requires_grad=True)  # what the weights are multiplied with
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, weights = gates.route(BASE.model_copy(update=gate), torch.randn(30, 16, requires_grad=True))
        product = weights * rows
    every, chosen, once = memory.GATES[gate["gate"]]
    assert product.requires_grad
    assert sum(tensor.numel() for tensor in kept.values()) == 30 * (16 * every + 4 * chosen + once)


def test_gradients_reach_all_logits_of_moge() -> None:
    model = BASE.model_copy(update={"gate": "moge", "num_groups": 4})
    logits = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: gates.route(model, values)[1], logits)


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


def test_the_sigmoid_gate_of_base_is_neither_normalised_nor_biased() -> None:
    model = BASE.model_copy(update={"gate": "sigmoid", "normalise_weights": False, "selection_bias": False})
    logits = torch.randn(50, 16, dtype=torch.float64)
    ids, weights = gates.route(model, logits, bias=torch.full((16,), 100.0).cumsum(0))
    assert torch.equal(ids, logits.topk(4).indices)
    torch.testing.assert_close(weights, 1 / (1 + (-logits.gather(1, ids)).exp()))
    limited = model.model_copy(update={"capacity_factor": 0.5})
    ids, weights, kept = gates.gate(limited, logits)
    assert kept is not None
    assert not kept.all()
    torch.testing.assert_close(weights, torch.where(kept, logits.gather(1, ids).sigmoid(), 0.0))


def test_xmoe_sees_directions_alone_and_half_as_many_dimensions_as_experts() -> None:
    model = BASE.model_copy(update={"gate": "xmoe"})
    weights = Weights(model, "float64")
    parameters = gate_of(weights)
    assert {name: tuple(value.shape) for name, value in parameters.items()} == {"proj": (32, 8), "router": (8, 16)}
    x = torch.randn(20, 32, dtype=torch.float64)
    logits = gates.logits(model, x, parameters)
    assert logits.abs().max() <= 1 / 0.3
    torch.testing.assert_close(gates.logits(model, 1e3 * x, parameters), logits)
    cosine = F.cosine_similarity(x[7] @ parameters["proj"], parameters["router"][:, 3], dim=0)
    torch.testing.assert_close(logits[7, 3], cosine / 0.3)
    torch.testing.assert_close(logits, Oracle(weights).logits(x).detach())


def test_a_wide_enough_xmoe_takes_a_prescribed_routing() -> None:
    model = BASE.model_copy(update={"gate": "xmoe", "gate_dim": 24})
    weights, ids = Weights(model, "bfloat16"), draw_ids(40, BASE, 5)
    x = gates.steer(torch.randn(40, 32, dtype=torch.float64), weights.directions, ids).bfloat16()
    chosen, _ = gates.route(model, gates.logits(model, x.double(), gate_of(weights)))
    assert torch.equal(chosen.sort(-1).values, ids.sort(-1).values)


@pytest.mark.parametrize("factor", [None, 0.5, 2.5, 100.0])
def test_experts_choose_their_best_tokens_up_to_the_capacity(factor: float | None) -> None:
    model = BASE.model_copy(update={"gate": "expert_choice", "capacity_factor": factor})
    tokens = (30, 0, 7)
    logits = torch.randn(37, 16, dtype=torch.float64)
    dense = []
    for part in logits.split(tokens):
        ids, weights, kept = gates.gate(model, part)
        assert kept is not None
        load = min(len(part), math.ceil((factor or 1.0) * 4 * len(part) / 16))
        assert kept.sum(0).tolist() == [load] * 16
        share = part.softmax(-1)
        for expert in range(16 if load else 0):
            assert share[kept[:, expert], expert].min() == share[:, expert].sort(descending=True).values[load - 1]
        dense.append(torch.zeros_like(part).scatter(-1, ids, weights))
    expected = Oracle(Weights(model, "float64"), tokens=tokens).gates(logits)
    torch.testing.assert_close(torch.cat(dense), expected, atol=1e-12, rtol=0)


def test_soft_slots_are_means_of_tokens_and_tokens_means_of_slots() -> None:
    model = BASE.model_copy(update={"gate": "softmoe"})
    weights = Weights(model, "float64")
    parameters = gate_of(weights, 21)
    assert parameters["router"].shape == (32, 16, 6)  # ceil(4 * 21 / 16)
    torch.testing.assert_close(parameters["router"][..., :2], gate_of(weights, 5)["router"])  # the same first slots
    x = torch.randn(10, 32, dtype=torch.float64)
    soft = gates.choose(model, x, parameters)
    assert soft.mix is not None
    assert soft.unmix is not None
    assert soft.ids.flatten().bincount().tolist() == [3] * 16
    torch.testing.assert_close(soft.mix.sum(1), torch.ones(48, dtype=torch.float64))
    torch.testing.assert_close(soft.unmix.sum(1), torch.ones(10, dtype=torch.float64))
    expected = Oracle(weights, identity_experts=True, tokens=(10,))(x).detach()
    torch.testing.assert_close(soft.unmix @ (soft.mix @ x), expected, atol=1e-12, rtol=0)


def test_noise_differs_by_step_rank_and_layer_and_moves_choices() -> None:
    model = BASE.model_copy(update={"gate_noise": True})
    weights = Weights(model, "float64", seed=3)
    draws = [weights.normal_noise(step, rank, 400) for step, rank in ((0, 0), (0, 1), (1, 0))]
    draws.append(Weights(model, "float64", seed=3, layer=1).normal_noise(0, 0, 400))
    assert len({float(draw.sum()) for draw in draws}) == 4
    assert torch.equal(draws[0], weights.normal_noise(0, 0, 400))
    assert float(draws[0].mean()) == pytest.approx(0, abs=0.05)
    assert float(draws[0].std()) == pytest.approx(1, abs=0.05)
    x = torch.randn(400, 32, dtype=torch.float64)
    clean, noisy = (gates.choose(model, x, gate_of(weights), normal=normal) for normal in (None, draws[0]))
    assert (clean.ids != noisy.ids).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "expert_choice"}, r"model gates.gate: .?expert_choice.*takes no prescribed routing; use a natural"),
        ({"gate": "softmoe"}, r"model gates.gate: .?softmoe.*takes no prescribed routing; use a natural workload"),
        ({"gate_noise": True}, r"model gates.gate_noise: True: takes no prescribed routing; use a natural workload"),
        ({"gate": "xmoe", "gate_dim": 15}, r"model gates.gate_dim: 15: must be at least num_experts = 16"),
    ],
    ids=str,
)
def test_a_gate_that_takes_no_prescribed_routing_says_so(change: dict[str, Any], message: str) -> None:
    model, topology = Model.model_validate(BASE.model_dump() | change), Topology((2, 2))
    with pytest.raises(UserError, match=message):
        make_routing(Workload(name="w", tokens_per_rank=8), model, topology)
    natural = Workload(name="w", tokens_per_rank=8, generator="natural")
    assert make_routing(natural, model, topology) is None
    assert planned_routing(natural, model, topology).tokens == (8, 8, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_noise": True, "gate": "xmoe"}, "gate_noise belongs to gate = gshard, not to gate = xmoe"),
        ({"gate_dim": 4}, "gate_dim belongs to gate = xmoe"),
        ({"normalise_weights": False}, "normalise_weights = False belongs to gate = sigmoid"),
        ({"selection_bias": False}, "selection_bias = False belongs to gate = sigmoid"),
        ({"gate": "moge"}, "gate = moge takes as many experts from each of num_groups groups; give 2 or more"),
        ({"gate": "moge", "num_groups": 3}, "num_groups = 3 does not divide num_experts = 16"),
        ({"gate": "moge", "num_groups": 8}, "num_groups = 8 does not divide top_k = 4.*change one of the two"),
        ({"gate": "moge", "num_groups": 4, "topk_groups": 2}, "topk_groups belongs to gate = sigmoid"),
        ({"gate": "moge", "num_groups": 4, "gate_noise": True}, "gate_noise belongs to gate = gshard"),
    ],
    ids=str,
)
def test_an_option_of_another_gate_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Model.parse(BASE.model_dump() | change, "model")
