from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from harness.errors import UserError
from harness.layer.gpt import GPT, Attention
from harness.specs import Model


def model(**fields) -> Model:
    shapes = {"num_layers": 2, "hidden": 32, "ffn": 16, "num_experts": 4, "top_k": 2}
    return Model(**({"name": "m", "num_heads": 4, "seq": 16, "vocab": 256} | shapes | fields))


@pytest.fixture(autouse=True)
def _one_thread():
    """Operators this small only wait for each other on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Dense(nn.Module):
    def __init__(self, layer: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(32, 32, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.ndim == 2  # [T, M]
        return self.linear(x)


def tokens(batch: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_loss_and_gradients_in_every_format(dtype, num_kv_heads):
    gpt = GPT(model(num_kv_heads=num_kv_heads), lambda layer: Dense(layer, dtype), dtype=dtype)
    loss = gpt.loss(tokens())
    loss.backward()
    assert loss.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)  # knows nothing yet
    for name, parameter in gpt.named_parameters():
        assert parameter.dtype == dtype, name
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_token_sees_only_the_past():
    gpt = GPT(model(), lambda layer: Dense(layer, torch.float64), dtype=torch.float64)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.mul_(5)  # attention that matters
    x = tokens(1, 16)
    changed = x.clone()
    changed[0, 9] += 1
    difference = (gpt(x) - gpt(changed % 256)).abs().amax(-1)[0]
    assert difference[:9].max() == 0
    assert (difference[9:] > 1e-9).all()


def test_the_seed_alone_sets_everything_but_the_moe_layers():
    first = GPT(model(), Dense, seed=4)
    torch.manual_seed(99)
    again = GPT(model(), lambda layer: nn.Sequential(Dense(layer), nn.ReLU()), seed=4)
    other = GPT(model(), Dense, seed=5)
    assert len(first.replicated_parameters()) == len(again.replicated_parameters())
    for a, b in zip(first.replicated_parameters(), again.replicated_parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.token.weight, other.token.weight)
    assert not torch.equal(first.blocks[0].attention.qkv.weight, first.blocks[1].attention.qkv.weight)


def test_replicated_and_moe_parameters_are_all_there_are():
    gpt = GPT(model(), Dense)
    inside = {id(p) for layer in gpt.moe_layers for p in layer.parameters()}
    outside = {id(p) for p in gpt.replicated_parameters()}
    assert not inside & outside
    assert inside | outside == {id(p) for p in gpt.parameters()}
    assert [layer.layer for layer in gpt.moe_layers] == [0, 1]
    assert all(block.moe is layer for block, layer in zip(gpt.blocks, gpt.moe_layers, strict=True))


def test_the_head_may_be_its_own():
    tied, untied = GPT(model(), Dense), GPT(model(), Dense, tied=False)
    assert tied.head.weight is tied.token.weight
    assert not torch.equal(untied.head.weight, untied.token.weight)
    assert len(untied.replicated_parameters()) == len(tied.replicated_parameters()) + 1


def test_it_learns():
    gpt = GPT(model(), Dense)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    x = tokens(4)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = gpt.loss(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(UserError, match=r"model\.num_heads: 5.*hidden = 32"):
        GPT(model(num_heads=5), Dense)


def test_attention_of_no_sequence_asks_no_kernel(monkeypatch):
    """Those of a GPU refuse an empty batch; a rank may have no tokens."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def refuses(q, *rest, **more):
        assert len(q), "batch size must be positive"
        return attend(q, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuses)
    attention = Attention(model(num_kv_heads=2))
    x = torch.empty(0, 16, 32, requires_grad=True)
    y = attention(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 16, 32)
    assert all(not parameter.grad.any() for parameter in attention.parameters())
