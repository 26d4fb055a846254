"""Gates: from logits to (expert ids, weights), which assignments a capacity drops, and inputs with a given routing.

- ``gshard`` (GShard top-k without noise): softmax over all E, the k largest, renormalised over them when k > 1.
- ``softmax_topk`` (Mixtral): the k largest logits, softmax over these.
- ``sigmoid`` (DeepSeek-V3): scores sigmoid(logits); selection by score + bias, limited to ``topk_groups`` of
  ``num_groups`` expert groups ranked by the sum of their two best biased scores; weights are the chosen unbiased
  scores, normalised to 1, times ``routed_scale``.
"""

from __future__ import annotations

import math

import torch

from harness.errors import bad
from harness.specs import Model


def route(model: Model, logits: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] (and bias [E] for ``sigmoid``) -> ids int64 [T, k] best first, weights [T, k]."""
    k = model.top_k
    if model.gate == "gshard":
        weights, ids = logits.softmax(-1).topk(k, dim=-1)
        if k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights
    if model.gate == "softmax_topk":
        chosen, ids = logits.topk(k, dim=-1)
        return ids, chosen.softmax(-1)
    scores = logits.sigmoid()
    biased = (scores if bias is None else scores + bias).detach()
    if model.topk_groups is not None and model.topk_groups < model.num_groups:
        grouped = biased.unflatten(-1, (model.num_groups, -1))  # [T, groups, E / groups]
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(strength, dtype=torch.bool)
        kept.scatter_(-1, strength.topk(model.topk_groups, dim=-1).indices, True)
        biased = grouped.masked_fill(~kept.unsqueeze(-1), -math.inf).flatten(-2)
    ids = biased.topk(k, dim=-1).indices
    weights = scores.gather(-1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * model.routed_scale


def capacity(model: Model, num_tokens: int) -> int:
    """Assignments that one expert takes from one rank's ``num_tokens`` tokens: ceil(f k T / E)."""
    assert model.capacity_factor is not None
    return math.ceil(model.capacity_factor * model.top_k * num_tokens / model.num_experts)


def drop(model: Model, ids: torch.Tensor, weights: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Which assignments survive the capacity on this rank: per expert those of highest probability.

    ids, weights [T, k], probabilities [T, E] -> kept bool [T, k].
    """
    num_tokens, k = ids.shape
    limit = capacity(model, num_tokens)
    flat = ids.flatten()
    strength = probabilities.detach().gather(-1, ids).flatten()
    order = strength.argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]  # by expert, strongest first
    counts = torch.bincount(flat, minlength=model.num_experts)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
    return (place < limit).view(num_tokens, k)


def gate(
    model: Model, logits: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``route`` and, with a capacity factor, ``drop``: ids, weights, kept (None: nothing dropped).

    Weights of dropped assignments are 0 and the others renormalised as before the drop (DeepSpeed's rule).
    """
    ids, weights = route(model, logits, bias)
    if model.capacity_factor is None:
        return ids, weights, None
    kept = drop(model, ids, weights, logits.softmax(-1))
    weights = weights * kept
    if model.top_k > 1:
        total = model.routed_scale if model.gate == "sigmoid" else 1.0
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps) * total
    return ids, weights, kept


def steer(z: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Move z by the smallest amount so that the real gate, x @ router, chooses ``ids`` in that order.

    z [T, M] (float64 or float32), router [M, E], ids [T, k] best first -> x [T, M], differentiable in z.
    Chosen logits run from 3 down to just above 2, the others stay within -2 +- 0.5: margins that bfloat16 keeps.
    So a real package's own gate takes a prescribed routing without being touched.
    """
    hidden, num_experts = router.shape
    if hidden < num_experts:
        raise bad("model.hidden", hidden, f"must be at least num_experts = {num_experts} to prescribe a routing")
    router = router.detach().to(z.dtype)
    k = ids.shape[1]
    logits = z @ router
    target = -2 + 0.5 * torch.tanh(logits)
    chosen = 3 - torch.arange(k, device=z.device, dtype=z.dtype) / k
    target = target.scatter(-1, ids.to(z.device, torch.int64), chosen.expand(len(z), k))
    return z + (target - logits) @ torch.linalg.pinv(router)
