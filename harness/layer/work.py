"""Multiply-adds of a transformer layer's parts, written once; of the forward, a backward takes twice as many.

Symbols: M hidden, H FFN of one expert, E experts, L context. Amounts may be arrays over configurations. Norms, softmax
and activation functions are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.specs import GEMMS, Model

#: matrix products of an attention, by which its start-up times are counted: projections of queries with keys and
#: values, scores, sums of values, output
ATTENTION_GEMMS = 4


def attention_macs(hidden: Any, tokens: Any, context: Any, *, causal: bool, kv_fraction: Any = 1.0) -> Any:
    """Of ``tokens`` queries, each against ``context`` keys, or ``causal``: against half of them in the mean. Heads of
    queries make up ``hidden``; ``kv_fraction``: heads of keys and values over theirs."""
    hidden = np.asarray(hidden, dtype=np.float64)
    seen = context / 2 if causal else context
    return tokens * (2 * (1 + kv_fraction) * hidden**2 + 2 * seen * hidden)


def kv_fraction(model: Model) -> float:
    """1 where every head has keys and values of its own, less with grouped-query attention."""
    return (model.num_kv_heads or model.num_heads) / model.num_heads


def attention_parameters(model: Model) -> int:
    """Of one layer, without biases."""
    hidden, heads, head = model.hidden, model.num_heads, model.head
    if model.kv_lora_rank is None:
        return hidden * head * (2 * heads + 2 * (model.num_kv_heads or heads))
    rope, values = model.qk_rope_head_dim or 0, model.v_head_dim or head
    rank, queries = model.q_lora_rank, heads * (head + rope)
    of_queries = hidden * queries if rank is None else rank * (hidden + queries)
    of_keys = hidden * (model.kv_lora_rank + rope) + model.kv_lora_rank * heads * (head + values)
    return of_queries + of_keys + heads * values * hidden


def model_attention_macs(model: Model, tokens: Any, *, causal: bool, layer: int = 0) -> Any:
    """Of ``tokens`` of one of all the model's layers, as ``attention_macs``, with its heads, window and latent ranks.
    Latent attention that is not causal, of a decoded token, stays among the latent vectors that are cached
    (DeepSeek-V2, arXiv 2405.04434, Sec. 2.1: the projections of keys and values are absorbed)."""
    context, window = model.seq, model.attention_window
    if window is None or window >= context or layer % model.window_every:
        window = context
    seen = window * (1 - window / (2 * context)) if causal else window  # a causal one's first tokens see fewer
    width = 2 * model.head
    if model.kv_lora_rank is not None:
        rope = model.qk_rope_head_dim or 0
        width = model.head + rope + (model.v_head_dim or model.head) if causal else 2 * model.kv_lora_rank + rope
    return np.asarray(tokens, dtype=np.float64) * (attention_parameters(model) + seen * model.num_heads * width)


def parameters(model: Model, *, active: bool = False, embeddings: int = 2) -> int:
    """Of a whole model, without norms, biases and what marks positions; ``active``: those that one token goes through.
    ``embeddings``: how many of the two tables of the vocabulary count, as publications differ."""
    experts = model.top_k if active else model.num_experts
    moe = experts * expert_parameters(model) + ffn_parameters(model, model.shared_size) + gate_macs(model)
    num_dense = model.num_layers - model.num_moe_layers
    dense = num_dense * ffn_parameters(model, model.dense_ffn or 0)
    attention = model.num_layers * attention_parameters(model)
    return attention + dense + model.num_moe_layers * moe + embeddings * model.hidden * model.vocab


def ffn_parameters(model: Model, size: int) -> int:
    """Of a feed-forward network of ``size``, of the type of the model's experts."""
    return GEMMS[model.ffn_type] * model.hidden * size


def expert_parameters(model: Model) -> int:
    """Of one expert."""
    return ffn_parameters(model, model.ffn)


def expert_macs(model: Model) -> int:
    """Of one row through one expert: one for each parameter."""
    return expert_parameters(model)


def expert_products(model: Model, size: int | None = None) -> tuple[tuple[int, int], ...]:
    """[K, N] of an expert's matrix products as they are launched: gate and up together, then down. ``size``: of another
    FFN of its type."""
    size = model.ffn if size is None else size
    return ((model.hidden, (GEMMS[model.ffn_type] - 1) * size), (size, model.hidden))


def gate_macs(model: Model) -> int:
    """Of one token: its E scores, and GShard's noise; the xmoe gate's projection to d, and cosines there."""
    if model.gate == "xmoe":
        return model.projection_dim * (model.hidden + model.num_experts)
    return (2 if model.gate_noise else 1) * model.hidden * model.num_experts


def head_macs(model: Model) -> int:
    """Of one token: its logits."""
    return model.hidden * model.vocab
