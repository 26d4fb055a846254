"""Tokens of every rank for every expert, step by step: what planners and the simulator see of a training.

Real loads are skewed and drift slowly. The generated ones have a stated skew at every step and layer: popularity
scores of experts wander (an autoregressive process that forgets half of itself in ``half_life`` steps), an expert's
share is exp(c score) over their sum, and c is such that max over mean is the skew exactly; tokens of a rank are drawn
by the shares. The recorded ones are those of the trace in ``results/traces``: each rank has a passage of the text of
its own, and draws its tokens by what that passage chose; they do not drift.
"""

from __future__ import annotations

import numpy as np

from harness.errors import bad
from harness.routing.trace import find_trace, read_trace
from harness.specs import Model

Array = np.ndarray
HALF_LIFE = 100  # steps
TRACE = "record-e64k8.parquet"


def shares(num_steps: int, num_layers: int, model: Model, skew: float, half_life: float, seed: int) -> Array:
    """Share of all assignments that each expert gets, float64 [steps, layers, E]; max over mean is ``skew``.

    Errors: a skew below 1 or beyond E / k, which k distinct experts a token allow at most."""
    limit = model.num_experts / model.top_k
    if not 1 <= skew <= limit:
        raise bad("skew", skew, f"{model.top_k} distinct of {model.num_experts} experts allow 1 to {limit:g}")
    rng = np.random.default_rng([seed, model.num_experts])
    keep = 0.5 ** (1 / half_life)
    scores = rng.normal(size=(num_steps, num_layers, model.num_experts))
    for step in range(1, num_steps):
        scores[step] = keep * scores[step - 1] + np.sqrt(1 - keep**2) * scores[step]
    below = scores - scores.max(-1, keepdims=True)
    low, high = np.zeros((*below.shape[:2], 1)), np.full((*below.shape[:2], 1), 1e3)
    for _ in range(60):  # bisection; max over mean rises with c
        c = (low + high) / 2
        steep = model.num_experts / np.exp(c * below).sum(-1, keepdims=True) > skew
        low, high = np.where(steep, low, c), np.where(steep, c, high)
    found = np.exp(high * below) if skew > 1 else np.ones_like(below)
    return np.asarray(found / found.sum(-1, keepdims=True))


def drifting(
    num_steps: int,
    num_layers: int,
    num_ranks: int,
    tokens: int,
    model: Model,
    skew: float,
    half_life: float = HALF_LIFE,
    seed: int = 0,
) -> Array:
    """Assignments of each rank to each expert, float32 [steps, layers, W, E], ``tokens`` of every rank."""
    of_step = shares(num_steps, num_layers, model, skew, half_life, seed)
    rng = np.random.default_rng([seed, 1])
    drawn = rng.multinomial(tokens * model.top_k, of_step[:, :, None, :], size=(num_steps, num_layers, num_ranks))
    return drawn.astype(np.float32)


def recorded(num_steps: int, num_layers: int, num_ranks: int, tokens: int, model: Model, seed: int = 0) -> Array:
    """As ``drifting``, of the recorded trace's last step. Layers beyond the trace's are its layers again, with the
    experts in another order. Errors: a model of another number of experts than the trace's."""
    trace = read_trace(find_trace(TRACE))
    if trace.header.num_experts != model.num_experts:
        raise bad("model.num_experts", model.num_experts, f"the trace {TRACE} has {trace.header.num_experts} experts")
    rng = np.random.default_rng([seed, 2])
    found = np.empty((num_layers, num_ranks, model.num_experts))
    for layer in range(num_layers):
        ids = trace[trace.steps[-1], trace.layers[layer % len(trace.layers)]].ids[:, : model.top_k]
        passages = np.array_split(ids, num_ranks)
        counts = np.stack([np.bincount(each.ravel(), minlength=model.num_experts) for each in passages])
        order = np.arange(model.num_experts) if layer < len(trace.layers) else rng.permutation(model.num_experts)
        found[layer] = counts[:, order] / counts.sum(-1, keepdims=True)
    drawn = rng.multinomial(tokens * model.top_k, found[None], size=(num_steps, num_layers, num_ranks))
    return drawn.astype(np.float32)


def max_over_mean(loads: Array) -> float:
    """Of tokens per expert, mean over steps and layers."""
    total = loads.sum(-2)
    return float((total.max(-1) / total.mean(-1)).mean())


def predicted(loads: Array, window: int) -> Array:
    """F [steps, layers, E]: mean tokens per expert over the ``window`` steps before each (of those that there are; at
    the first step none, so balanced)."""
    total = loads.sum(-2, dtype=np.float64)
    sums = np.concatenate([np.zeros_like(total[:1]), total.cumsum(0)])
    at = np.arange(len(total))
    first = np.maximum(at - window, 0)
    found = (sums[at] - sums[first]) / np.maximum(at - first, 1)[:, None, None]
    found[0] = total[0].mean(-1, keepdims=True)
    return found
