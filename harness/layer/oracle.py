"""The dense float64 oracle: every expert on every token, weighted by a dense gate matrix.

Written apart from the code it judges: no ids, no permutation, no exchange. Only for shapes where T * E * M * H fits.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from harness.layer.rounding import rounded
from harness.layer.weights import Weights, shared_names
from harness.specs import ExchangeDtype, Model


class Oracle(nn.Module):
    """One MoE layer in float64; parameters ``router`` [M, E], ``w1`` [E, M, H], ``w2`` [E, H, M], ``w3`` [E, M, H],
    what ``Weights.gate`` has beside the router, and the shared experts' (``shared_names``).

    ``tokens``: of each rank, summing to T. They matter where experts choose (each rank by itself) and for noise
    (another at every ``step``); None: all tokens are one rank's.

    ``exchange_dtype``: in which rows have travelled to the routed experts; the gate sees them as they were."""

    def __init__(
        self,
        weights: Weights,
        identity_experts: bool = False,
        tokens: tuple[int, ...] | None = None,
        exchange_dtype: ExchangeDtype | None = None,
    ):
        super().__init__()
        self.weights, self.model, self.tokens = weights, weights.model, tokens
        self.identity_experts, self.exchange_dtype = identity_experts, exchange_dtype
        self.step = 0
        self.bias: torch.Tensor
        self.router: torch.Tensor
        self.w1: torch.Tensor
        self.w2: torch.Tensor
        self.w3: torch.Tensor
        self.proj: torch.Tensor
        self.noise: torch.Tensor
        #: what of the parameters is the gate's, replicated on every rank
        self.gate_names: list[str] = []
        for name, value in weights.gate(max(tokens) if tokens else 1).items():
            self.register_parameter(name, nn.Parameter(value.double()))
            self.gate_names.append(name)
        self.register_buffer("bias", weights.bias.double())
        #: and of the shared experts, replicated as well
        self.shared = {} if identity_experts else shared_names(self.model)
        for name, of in self.shared.items():
            self.register_parameter(name, nn.Parameter(weights.expert(self.model.num_experts)[of].double()))
        if not identity_experts:
            experts = [weights.expert(e) for e in range(self.model.num_experts)]
            for name in experts[0]:
                stacked = torch.stack([expert[name] for expert in experts]).double()
                self.register_parameter(name, nn.Parameter(stacked))

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None, constant_gate: bool = False) -> torch.Tensor:
        """x float64 [T, M] -> y [T, M]. ``kept`` bool [T, E]: assignments that a capacity left. ``constant_gate``: no
        gradient through the gate."""
        y = self._routed(x, kept, constant_gate)
        if not self.shared:
            return y
        w1, w2, *w3 = (getattr(self, name) for name in self.shared)
        h = x @ w1
        return y + (F.silu(h) * (x @ w3[0]) if w3 else F.gelu(h)) @ w2

    def _routed(self, x: torch.Tensor, kept: torch.Tensor | None, constant_gate: bool) -> torch.Tensor:
        """Without shared experts."""
        seen = x.detach() if constant_gate else x  # by the gate
        if self.model.gate == "softmoe":
            sizes = self._tokens_of_ranks(x)
            return torch.cat([self._soft(*part) for part in zip(x.split(sizes), seen.split(sizes), strict=True)])
        gates = self.gates(self.logits(seen), kept)  # [T, E]
        rows = rounded(x, self.exchange_dtype)
        if self.identity_experts:
            return gates.sum(-1, keepdim=True) * rows
        return torch.einsum("te,etm->tm", gates, self._experts(rows))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """What the gate compares tokens and experts by, [T, E]."""
        if self.model.gate == "xmoe":
            inner = torch.einsum("tm,md,de->te", x, self.proj, self.router)
            lengths = (x @ self.proj).square().sum(1).sqrt()[:, None] * self.router.square().sum(0).sqrt()
            return inner / lengths / 0.3
        logits = x @ self.router
        if self.model.gate_noise:
            sizes = enumerate(self._tokens_of_ranks(x))
            normal = torch.cat([self.weights.normal_noise(self.step, rank, size) for rank, size in sizes])
            logits = logits + normal.to(x.device) * torch.log1p((x @ self.noise).exp())
        return logits

    def gates(self, logits: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Dense gate matrix [T, E]: zero outside the chosen experts."""
        model = self.model
        if model.gate == "expert_choice":
            parts = logits.softmax(-1).split(self._tokens_of_ranks(logits))
            return torch.cat([p * _is_among_largest(p.t(), self._num_slots(len(p))).t() for p in parts])
        scores = logits.sigmoid() if model.gate == "sigmoid" else logits.softmax(-1)
        chosen = self._chosen(scores)
        if kept is not None:
            chosen = chosen & kept
        gates = torch.where(chosen, scores, torch.zeros_like(scores))
        scale = model.routed_scale if model.gate == "sigmoid" else 1.0
        as_they_are = model.gate == "moge" or (model.gate in ("gshard", "xmoe") and model.top_k == 1)
        if as_they_are or not model.normalise_weights:
            return scale * gates
        total = gates.sum(-1, keepdim=True)
        return scale * gates / torch.where(total > 0, total, torch.ones_like(total))

    def _chosen(self, scores: torch.Tensor) -> torch.Tensor:
        model = self.model
        if model.gate == "sigmoid":
            if model.selection_bias:
                scores = scores + self.bias
            if model.topk_groups is not None:
                groups = scores.unflatten(-1, (model.num_groups, -1)).sort(-1, descending=True).values
                best_two = groups[..., :2].sum(-1)
                allowed = _is_among_largest(best_two, model.topk_groups)
                allowed = allowed.repeat_interleave(model.num_experts // model.num_groups, dim=-1)
                scores = torch.where(allowed, scores, torch.full_like(scores, -torch.inf))
        return _chosen_by_tokens(model, scores)

    def _soft(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Soft MoE of one rank's tokens: every slot a mean of tokens, every token a mean of slots."""
        affinity = torch.einsum("tm,mec->tec", seen, self.router[..., : self._num_slots(len(x))])
        exp = affinity.exp()
        slots = torch.einsum("tec,tm->ecm", exp / exp.sum(0), x)
        outputs = slots if self.identity_experts else self._experts(slots)
        return torch.einsum("tec,ecm->tm", exp / exp.sum((1, 2), keepdim=True), outputs)

    def _experts(self, x: torch.Tensor) -> torch.Tensor:
        """f_e(x) for every expert: x [T, M], or [E, C, M] with each expert's own -> [E, T or C, M]."""
        h = x @ self.w1
        h = F.silu(h) * (x @ self.w3) if self.model.ffn_type == "swiglu" else F.gelu(h)
        return h @ self.w2

    def _num_slots(self, num_tokens: int) -> int:
        model = self.model
        return math.ceil((model.capacity_factor or 1.0) * model.top_k * num_tokens / model.num_experts)

    def _tokens_of_ranks(self, x: torch.Tensor) -> list[int]:
        return [len(x)] if self.tokens is None else list(self.tokens)


def _is_among_largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the ``count`` largest entries of every row (ties: lowest index first)."""
    place = values.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return place < count


def _chosen_by_tokens(model: Model, scores: torch.Tensor) -> torch.Tensor:
    """Of scores [T, E] the k largest of each token; of moge the k / num_groups largest in each group: bool [T, E]."""
    if model.gate != "moge":
        return _is_among_largest(scores, model.top_k)
    groups = scores.chunk(model.num_groups, dim=1)
    return torch.cat([_is_among_largest(group, model.top_k // model.num_groups) for group in groups], dim=1)


def keep_strongest(model: Model, probabilities: torch.Tensor) -> torch.Tensor:
    """The drop rule in words: of one rank's tokens an expert takes the ``ceil(f k T / E)`` with the highest softmax
    probability among those that chose it. probabilities float64 [T, E] -> kept bool [T, E]."""
    assert model.capacity_factor is not None
    num_tokens = len(probabilities)
    limit = math.ceil(model.capacity_factor * model.top_k * num_tokens / model.num_experts)
    chosen = _chosen_by_tokens(model, probabilities)
    strength = torch.where(chosen, probabilities, torch.full_like(probabilities, -torch.inf))
    return chosen & _is_among_largest(strength.t(), limit).t()
