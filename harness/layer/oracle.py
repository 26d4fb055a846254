"""The dense float64 oracle: every expert on every token, weighted by a dense gate matrix.

Written apart from the code it judges: no ids, no permutation, no exchange. Only for shapes where T * E * M * H fits.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from harness.layer.weights import Weights
from harness.specs import Model


class Oracle(nn.Module):
    """One MoE layer in float64; parameters ``router`` [M, E], ``w1`` [E, M, H], ``w2`` [E, H, M], ``w3`` [E, M, H]."""

    def __init__(self, weights: Weights, identity_experts: bool = False):
        super().__init__()
        self.model: Model = weights.model
        self.identity_experts = identity_experts
        self.router = nn.Parameter(weights.router.double())
        self.bias: torch.Tensor
        self.w1: torch.Tensor
        self.w2: torch.Tensor
        self.w3: torch.Tensor
        self.register_buffer("bias", weights.bias.double())
        if not identity_experts:
            experts = [weights.expert(e) for e in range(self.model.num_experts)]
            for name in experts[0]:
                stacked = torch.stack([expert[name] for expert in experts]).double()
                self.register_parameter(name, nn.Parameter(stacked))

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """x float64 [T, M] -> y [T, M]. ``kept`` bool [T, E]: assignments that a capacity left."""
        gates = self.gates(x @ self.router, kept)  # [T, E]
        if self.identity_experts:
            return gates.sum(-1, keepdim=True) * x
        return torch.einsum("te,etm->tm", gates, self._experts(x))

    def gates(self, logits: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Dense gate matrix [T, E]: zero outside the chosen experts."""
        model = self.model
        scores = logits.sigmoid() if model.gate == "sigmoid" else logits.softmax(-1)
        chosen = self._chosen(scores)
        if kept is not None:
            chosen = chosen & kept
        gates = torch.where(chosen, scores, torch.zeros_like(scores))
        if model.gate == "gshard" and model.top_k == 1:
            return gates
        scale = model.routed_scale if model.gate == "sigmoid" else 1.0
        total = gates.sum(-1, keepdim=True)
        return scale * gates / torch.where(total > 0, total, torch.ones_like(total))

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        model = self.model
        if model.gate == "sigmoid":
            scores = scores + self.bias
            if model.topk_groups is not None:
                groups = scores.unflatten(-1, (model.num_groups, -1)).sort(-1, descending=True).values
                best_two = groups[..., :2].sum(-1)
                allowed = _is_among_largest(best_two, model.topk_groups)
                allowed = allowed.repeat_interleave(model.num_experts // model.num_groups, dim=-1)
                scores = torch.where(allowed, scores, torch.full_like(scores, -torch.inf))
        return _is_among_largest(scores, model.top_k)

    def _experts(self, x: torch.Tensor) -> torch.Tensor:
        """f_e(x_t) for every expert and token, [E, T, M]."""
        h = torch.einsum("tm,emh->eth", x, self.w1)
        if self.model.ffn_type == "swiglu":
            h = F.silu(h) * torch.einsum("tm,emh->eth", x, self.w3)
        else:
            h = F.gelu(h)
        return torch.einsum("eth,ehm->etm", h, self.w2)


def _is_among_largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the ``count`` largest entries of every row (ties: lowest index first)."""
    place = values.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return place < count


def keep_strongest(model: Model, probabilities: torch.Tensor) -> torch.Tensor:
    """The drop rule in words: of one rank's tokens an expert takes the ``ceil(f k T / E)`` with the highest softmax
    probability among those that chose it. probabilities float64 [T, E] -> kept bool [T, E]."""
    assert model.capacity_factor is not None
    num_tokens = len(probabilities)
    limit = math.ceil(model.capacity_factor * model.top_k * num_tokens / model.num_experts)
    chosen = _is_among_largest(probabilities, model.top_k)
    strength = torch.where(chosen, probabilities, torch.full_like(probabilities, -torch.inf))
    return chosen & _is_among_largest(strength.t(), limit).t()
