"""A small GPT whose feed-forward network in every block is an MoE layer that the caller provides.

Used where a whole language model is needed: to record routing and for the ``train_step`` phase, where everything but
the experts is replicated on every rank (data parallel).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from harness.comm.rows import accumulator
from harness.errors import bad
from harness.layer.standin import wait
from harness.layer.work import ATTENTION_GEMMS, model_attention_macs
from harness.specs import Gemm, Model

INIT_STD = 0.02  # of embeddings and projections, as in GPT-2


class Cache:
    """Keys and values of the tokens so far of B sequences, [B, kv heads, seq, head] each; ``length`` are there.
    ``parts``: over how many ranks the heads are shared out."""

    def __init__(
        self, model: Model, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu", parts: int = 1
    ):
        heads = (model.num_kv_heads or model.num_heads) // parts
        shape = (batch, heads, model.seq, model.head)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [B, kv heads, new, head] -> those of all tokens so far."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = k, v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Causal self-attention; ``num_kv_heads`` < ``num_heads`` shares keys and values (grouped-query attention)."""

    def __init__(self, model: Model):
        super().__init__()
        if model.head_dim is None and model.hidden % model.num_heads:
            raise bad("model.num_heads", model.num_heads, f"does not divide hidden = {model.hidden}; or give head_dim")
        self.model, self.num_heads = model, model.num_heads
        self.num_kv_heads = model.num_kv_heads or model.num_heads
        self.head = model.head
        self.qkv = nn.Linear(model.hidden, (self.num_heads + 2 * self.num_kv_heads) * self.head, bias=False)
        self.out = nn.Linear(model.num_heads * model.head, model.hidden, bias=False)
        self.stand_in: Gemm | None = None  # instead of computing, wait as long as these costs say

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """x [B, L, M] -> [B, L, M]. With a ``cache`` x are the next tokens: all, or one of each sequence."""
        batch, length, _ = x.shape
        if self.stand_in is not None:
            macs = model_attention_macs(self.model, batch * length, causal=False)
            part = self.num_heads / self.model.num_heads  # of the heads
            return wait(x, self.stand_in, ATTENTION_GEMMS, float(part * macs), self.parameters())
        of_all = self.num_heads + 2 * self.num_kv_heads
        heads = self.qkv(x).view(batch, length, of_all, self.head).transpose(1, 2)  # [B, q + k + v heads, L, head]
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if cache is not None:
            assert cache.length == 0 or length == 1
            k, v = cache.extend(k, v)
        grouped = self.num_kv_heads != self.num_heads
        y = q  # of no sequence, which kernels of a GPU refuse
        if batch:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=k.shape[2] == length, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def keep_heads(self, index: int, count: int) -> None:
        """Model parallelism: keep part ``index`` of ``count`` of the heads. ``forward`` then gives partial sums, which
        the ``count`` ranks that share the attention add up."""
        for field, heads in (("num_heads", self.num_heads), ("num_kv_heads", self.num_kv_heads)):
            if heads % count:
                raise bad(f"model.{field}", heads, f"does not divide over {count} model-parallel ranks")
        q, k, v = self.qkv.weight.split([n * self.head for n in (self.num_heads, *[self.num_kv_heads] * 2)])
        own = torch.cat([part.chunk(count)[index] for part in (q, k, v)])
        self.qkv.weight = nn.Parameter(own)
        self.out.weight = nn.Parameter(self.out.weight.chunk(count, dim=1)[index].contiguous())
        self.num_heads, self.num_kv_heads = self.num_heads // count, self.num_kv_heads // count


class Ffn(nn.Module):
    """A feed-forward network of the type of the model's experts, where a layer has none: x [T, M] -> [T, M]."""

    def __init__(self, model: Model, size: int):
        super().__init__()
        self.stand_in: Gemm | None = None  # as ``Attention.stand_in``
        self.w1, self.w2 = nn.Linear(model.hidden, size, bias=False), nn.Linear(size, model.hidden, bias=False)
        self.w3 = nn.Linear(model.hidden, size, bias=False) if model.ffn_type == "swiglu" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.stand_in is not None:
            of = list(self.parameters())
            return wait(x, self.stand_in, len(of), float(len(x) * sum(p.numel() for p in of)), of)
        h = self.w1(x)
        return self.w2(F.gelu(h) if self.w3 is None else F.silu(h) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the MoE layer or an FFN, each added to its input."""

    def __init__(self, model: Model, moe: nn.Module):
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.hidden)
        self.attention = Attention(model)
        self.moe_norm = nn.RMSNorm(model.hidden)
        self.moe = moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, L, M] -> [B, L, M]."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x).flatten(0, 1)).view_as(x)


class GPT(nn.Module):
    """``moe(layer)`` gives the MoE layer of block ``layer`` among those that have experts, [T, M] -> [T, M], already in
    ``dtype`` on ``device``.

    All other parameters are drawn from (seed, parameter name) alone, so that they are the same on every rank and
    with every MoE layer. ``tied``: the output head is the token embedding.
    """

    def __init__(
        self,
        model: Model,
        moe: Callable[[int], nn.Module],
        *,
        seed: int = 0,
        tied: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.model = model
        self.token = nn.Embedding(model.vocab, model.hidden)
        self.position = nn.Embedding(model.seq, model.hidden)
        with_experts = set(model.moe_layers)
        self.blocks = nn.ModuleList(
            Block(model, nn.Identity() if i in with_experts else Ffn(model, model.dense_ffn or 0))
            for i in range(model.num_layers)
        )
        self.norm = nn.RMSNorm(model.hidden)
        self.head = nn.Linear(model.hidden, model.vocab, bias=False)
        if tied:
            self.head.weight = self.token.weight
        self._draw(seed)
        self.to(device, dtype)
        #: of every block that has experts, first block first
        self.moe_layers = [moe(layer) for layer in range(model.num_moe_layers)]
        for block, layer in zip(model.moe_layers, self.moe_layers, strict=True):
            self.blocks[block].moe = layer

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue  # norms start at 1
            generator = torch.Generator().manual_seed(seed * 4_294_967_311 + zlib.crc32(name.encode()))
            std = INIT_STD / (2 * self.model.num_layers) ** 0.5 if name.endswith("attention.out.weight") else INIT_STD
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))

    def replicated_parameters(self) -> list[nn.Parameter]:
        """Everything that is not in an MoE layer."""
        inside = {id(parameter) for layer in self.moe_layers for parameter in layer.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in inside]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [B, L], L <= seq -> logits [B, L, vocab]."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of predicting tokens[:, 1:] from tokens[:, :-1]; tokens int64 [B, L + 1]."""
        logits = self(tokens[:, :-1]).flatten(0, 1)
        return F.cross_entropy(logits.to(accumulator(logits.dtype)), tokens[:, 1:].flatten())
