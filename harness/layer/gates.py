"""Gates: from tokens to (expert ids, weights), which assignments a capacity drops, and inputs with a given routing.

Tokens choose their experts:

- ``gshard`` (GShard top-k): softmax over all E, the k largest, renormalised over them when k > 1. With ``gate_noise``
  the logits are (x W_g) + N(0, 1) * softplus(x W_noise).
- ``softmax_topk`` (Mixtral): the k largest logits, softmax over these.
- ``sigmoid`` (DeepSeek-V3): scores sigmoid(logits); selection by score + bias, limited to ``topk_groups`` of
  ``num_groups`` expert groups ranked by the sum of their two best biased scores; weights are the chosen unbiased
  scores, normalised to 1, times ``routed_scale``. With neither bias nor normalisation it is the sigmoid gate of BASE
  and StableMoE.
- ``moge`` (Mixture of Grouped Experts, Pangu Pro MoE): softmax over all E; of each of ``num_groups`` groups of E /
  num_groups consecutive experts the k / num_groups largest, weighted by their shares, not renormalised. So each group
  gets as many assignments as every other, whatever the tokens are. (DeepSeek-V3's limit is another rule: there a token
  uses few groups, here all.)
- ``xmoe`` (X-MoE): logits cos(x W_proj, W_g column) / temperature, then as gshard. The temperature is fixed at 0.3;
  X-MoE learns it.

Experts choose, on each rank among its own T tokens; with C = ceil(f k T / E) an expert's load is the same from every
rank:

- ``expert_choice`` (Zhou et al., 2022): softmax over the experts, each takes the C tokens where its share is largest,
  weighted by that share, not renormalised. FSMoE prints a softmax over the chosen tokens instead.
- ``softmoe`` (Soft MoE): each of C slots per expert is a mean of all tokens, weighted by a softmax of x W_g over the
  tokens; a token is a mean of all slots' outputs, weighted by the softmax over the slots. Without that paper's
  normalisation of x and W_g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from harness.errors import bad
from harness.layer.weights import capacity
from harness.specs import Model

XMOE_TEMPERATURE = 0.3
Parameters = Mapping[str, torch.Tensor] | nn.ParameterDict  # by the names of ``Weights.gate``


class Gated(NamedTuple):
    """What a gate hands to an exchange: of each row that travels its experts and their weights.

    The rows are the T tokens, except in softmoe: there they are E C slots, made as ``mix`` @ x, and ``unmix`` @ their
    outputs is y."""

    ids: torch.Tensor  # int64 [rows, k]
    weights: torch.Tensor  # [rows, k]
    kept: torch.Tensor | None = None  # bool [rows, k]; None: nothing is left out
    mix: torch.Tensor | None = None  # [rows, T]
    unmix: torch.Tensor | None = None  # [T, rows]


def choose(
    model: Model,
    x: torch.Tensor,
    parameters: Parameters,
    bias: torch.Tensor | None = None,
    normal: torch.Tensor | None = None,
) -> Gated:
    """The whole gate on one rank: x [T, M] and ``parameters`` (``Weights.gate``), all in the gate's format; ``bias``
    [E] of the sigmoid gate, ``normal`` N(0, 1) [T, E] of the noisy one."""
    if model.gate == "softmoe":
        return _soft(model, x, parameters["router"])
    return Gated(*gate(model, logits(model, x, parameters, normal), bias))


def logits(model: Model, x: torch.Tensor, parameters: Parameters, normal: torch.Tensor | None = None) -> torch.Tensor:
    """What tokens and experts are compared by, [T, E]; arguments as ``choose`` has them."""
    if model.gate == "xmoe":
        projected = F.normalize(x @ parameters["proj"], dim=-1)
        return projected @ F.normalize(parameters["router"], dim=0) / XMOE_TEMPERATURE
    clean = x @ parameters["router"]
    return clean if normal is None else clean + normal.to(clean) * F.softplus(x @ parameters["noise"])


def route(model: Model, logits: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens choose: logits [T, E] (and bias [E] for ``sigmoid``) -> ids int64 [T, k] best first, weights [T, k]."""
    k = model.top_k
    if model.gate in ("gshard", "xmoe"):
        weights, ids = logits.softmax(-1).topk(k, dim=-1)
        if k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return ids, weights
    if model.gate == "softmax_topk":
        chosen, ids = logits.topk(k, dim=-1)
        return ids, chosen.softmax(-1)
    if model.gate == "moge":
        shares = logits.softmax(-1)
        ids = _best_of_each_group(shares.detach(), model.num_groups, k // model.num_groups)
        return ids, shares.gather(-1, ids)
    assert model.gate == "sigmoid", model.gate
    scores = logits.sigmoid()
    biased = (scores + bias if model.selection_bias and bias is not None else scores).detach()
    if model.topk_groups is not None and model.topk_groups < model.num_groups:
        grouped = biased.unflatten(-1, (model.num_groups, -1))  # [T, groups, E / groups]
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(strength, dtype=torch.bool)
        kept.scatter_(-1, strength.topk(model.topk_groups, dim=-1).indices, True)
        biased = grouped.masked_fill(~kept.unsqueeze(-1), -math.inf).flatten(-2)
    ids = biased.topk(k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if model.normalise_weights:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * model.routed_scale


def _best_of_each_group(shares: torch.Tensor, num_groups: int, num_each: int) -> torch.Tensor:
    """shares [T, E] -> int64 [T, num_groups num_each], the best of all first."""
    best, place = shares.unflatten(-1, (num_groups, -1)).topk(num_each, dim=-1)  # [T, groups, each]
    first = torch.arange(num_groups, device=shares.device) * (shares.shape[-1] // num_groups)
    order = best.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    return (place + first[:, None]).flatten(-2).gather(-1, order)


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
    """Every gate but softmoe: logits [T, E] -> ids, weights, kept (None: nothing left out), each [T, k].

    Tokens choose: ``route`` and, with a capacity factor, ``drop``. Weights of dropped assignments are 0 and the others
    renormalised as before the drop (DeepSpeed's rule). Experts choose: as if k were E, and all but the choices dropped.
    """
    if model.gate == "expert_choice":
        return _expert_choice(model, logits)
    ids, weights = route(model, logits, bias)
    if model.capacity_factor is None:
        return ids, weights, None
    kept = drop(model, ids, weights, logits.softmax(-1))
    weights = weights * kept
    if model.top_k > 1 and model.normalises:
        total = model.routed_scale if model.gate == "sigmoid" else 1.0
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).eps) * total
    return ids, weights, kept


def _expert_choice(model: Model, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = logits.shape
    shares = logits.softmax(-1)
    chosen = shares.topk(min(capacity(model, num_tokens), num_tokens), dim=0).indices  # [C, E]
    kept = torch.zeros_like(shares, dtype=torch.bool).scatter(0, chosen, True)
    ids = torch.arange(num_experts, device=logits.device).expand(num_tokens, num_experts)
    return ids.contiguous(), shares * kept, kept


def _soft(model: Model, x: torch.Tensor, router: torch.Tensor) -> Gated:
    num_slots = capacity(model, len(x))
    affinity = x @ router[..., :num_slots].flatten(1)  # [T, E C]
    ids = torch.arange(model.num_experts, device=x.device).repeat_interleave(num_slots).unsqueeze(1)
    return Gated(ids, x.new_ones(ids.shape), None, affinity.softmax(0).T, affinity.softmax(1))


def steer(
    z: torch.Tensor, directions: torch.Tensor, ids: torch.Tensor, inverse: torch.Tensor | None = None
) -> torch.Tensor:
    """Move z by the smallest amount so that the real gate, by x @ directions, chooses ``ids`` in that order.

    z [T, M] (float64 or float32), ``Weights.directions`` [M, E], ids [T, k] best first -> x [T, M], differentiable in
    z. ``inverse``: the directions' pseudo-inverse [E, M], if it is known. Of x @ directions the chosen run from 3 down
    to just above 2, the others stay within -2 +- 0.5: margins that bfloat16 keeps. So a real package's own gate takes a
    prescribed routing without being touched.
    """
    hidden, num_experts = directions.shape
    if hidden < num_experts:
        raise bad("model.hidden", hidden, f"must be at least num_experts = {num_experts} to prescribe a routing")
    directions = directions.detach().to(z.dtype)
    k = ids.shape[1]
    found = z @ directions
    target = -2 + 0.5 * torch.tanh(found)
    chosen = 3 - torch.arange(k, device=z.device, dtype=z.dtype) / k
    target = target.scatter(-1, ids.to(z.device, torch.int64), chosen.expand(len(z), k))
    return z + (target - found) @ (torch.linalg.pinv(directions) if inverse is None else inverse)
