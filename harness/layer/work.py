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


def expert_parameters(model: Model) -> int:
    """Of one expert."""
    return GEMMS[model.ffn_type] * model.hidden * model.ffn


def expert_macs(model: Model) -> int:
    """Of one row through one expert: one for each parameter."""
    return expert_parameters(model)


def expert_products(model: Model) -> tuple[tuple[int, int], ...]:
    """[K, N] of an expert's matrix products as they are launched: gate and up together, then down."""
    return ((model.hidden, (GEMMS[model.ffn_type] - 1) * model.ffn), (model.ffn, model.hidden))


def gate_macs(model: Model) -> int:
    """Of one token: its E scores, and GShard's noise; the xmoe gate's projection to d, and cosines there."""
    if model.gate == "xmoe":
        return model.projection_dim * (model.hidden + model.num_experts)
    return (2 if model.gate_noise else 1) * model.hidden * model.num_experts


def head_macs(model: Model) -> int:
    """Of one token: its logits."""
    return model.hidden * model.vocab
