"""Multiply-adds of a layer's parts: those that torch counts when they are computed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.layer.experts import Experts
from harness.layer.gpt import Attention
from harness.layer.weights import Weights
from harness.layer.work import attention_macs, expert_macs, gate_macs, head_macs, kv_fraction
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
