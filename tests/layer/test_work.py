"""Multiply-adds of a layer's parts: those that torch counts when they are computed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.layer.experts import Experts
from harness.layer.gpt import Attention
from harness.layer.weights import Weights
from harness.layer.work import (
    attention_macs,
    attention_parameters,
    expert_macs,
    gate_macs,
    head_macs,
    kv_fraction,
    model_attention_macs,
)
from harness.specs import Model

MODEL = Model(name="m", num_layers=1, hidden=32, ffn=48, num_experts=4, top_k=2, num_heads=4, seq=16, vocab=64)


def counted(run) -> float:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of other kernels it knows nothing
        run()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_attention_is_what_torch_counts(kv_heads):
    """Which counts every pair of tokens, causal or not, as a stand-in waits for."""
    model = MODEL.model_copy(update={"num_kv_heads": kv_heads})
    attention, x = Attention(model), torch.zeros(3, 16, 32)
    wanted = attention_macs(32, 3 * 16, 16, causal=False, kv_fraction=kv_fraction(model))
    assert counted(lambda: attention(x)) == wanted


def test_heads_of_any_size_are_what_torch_counts():
    model = MODEL.model_copy(update={"head_dim": 24, "num_kv_heads": 2})
    attention, x = Attention(model), torch.zeros(3, 16, 32)
    assert counted(lambda: attention(x)) == model_attention_macs(model, 3 * 16, causal=False)
    assert sum(p.numel() for p in attention.parameters()) == attention_parameters(model)


def test_a_model_without_more_has_the_attention_of_its_hidden_size():
    for causal in (False, True):
        found = model_attention_macs(MODEL, 48, causal=causal)
        assert found == attention_macs(32, 48, 16, causal=causal)


def test_a_window_hides_what_is_further_away():
    """A causal token at place i sees about min(i, w); scores and sums take 2 M for each."""
    model = MODEL.model_copy(update={"attention_window": 4, "window_every": 2})
    of_scores = model_attention_macs(model, 1, causal=True) - attention_parameters(model)
    assert of_scores == 2 * 32 * (4 * 2 + 12 * 4) / 16
    assert model_attention_macs(model, 1, causal=False) - attention_parameters(model) == 2 * 32 * 4
    assert model_attention_macs(model, 1, causal=True, layer=1) == model_attention_macs(MODEL, 1, causal=True)


def test_latent_attention_is_deepseek_v2s():
    """Its matrices one by one, of the whole model's shapes in small; a decoded token stays among latent vectors."""
    latent = {"q_lora_rank": 6, "kv_lora_rank": 8, "qk_rope_head_dim": 2, "v_head_dim": 5, "head_dim": 3}
    model = MODEL.model_copy(update=latent)
    shapes = [(32, 6), (6, 4 * (3 + 2)), (32, 8 + 2), (8, 4 * 3), (8, 4 * 5), (4 * 5, 32)]
    assert attention_parameters(model) == sum(rows * columns for rows, columns in shapes)
    assert model_attention_macs(model, 1, causal=True) == attention_parameters(model) + 8 * 4 * (3 + 2 + 5)
    assert model_attention_macs(model, 1, causal=False) == attention_parameters(model) + 16 * 4 * (8 + 2 + 8)
    whole = model.model_copy(update={"q_lora_rank": None})
    assert attention_parameters(whole) - attention_parameters(model) == 32 * 20 - (32 * 6 + 6 * 20)


def test_causal_attention_sees_half_of_its_context():
    whole, half = (attention_macs(32, 48, 16, causal=causal) for causal in (False, True))
    assert whole - half == 48 * 16 * 32
    assert half == attention_macs(32, 48, 8, causal=False)


@pytest.mark.parametrize("ffn_type", ["gpt", "swiglu"])
def test_experts_are_what_torch_counts(ffn_type):
    model = MODEL.model_copy(update={"ffn_type": ffn_type})
    experts = Experts(Weights(model, "float32"), [0, 1])
    rows = torch.zeros(10, 32, dtype=experts.w1.dtype)
    found = counted(lambda: experts(rows, torch.tensor([3, 7])))
    assert found == 10 * expert_macs(model)


def test_gates_and_the_head():
    assert gate_macs(MODEL) == 32 * 4
    assert gate_macs(MODEL.model_copy(update={"gate_noise": True})) == 2 * 32 * 4
    assert gate_macs(MODEL.model_copy(update={"gate": "xmoe"})) == 2 * (32 + 4)
    assert head_macs(MODEL) == 32 * 64
