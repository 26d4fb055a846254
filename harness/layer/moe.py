"""The unified MoE layer: gate -> order -> dispatch -> experts -> combine -> restore, over any exchange."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import nn

from harness.comm.exchange import Exchange
from harness.comm.job import Job
from harness.comm.rows import accumulator
from harness.layer import gates
from harness.layer.experts import Experts, IdentityExperts
from harness.layer.oracle import keep_strongest
from harness.layer.weights import Weights
from harness.specs import Dtype
from harness.system import Case, Gradients, MoELayer, System


class NativeLayer(MoELayer):
    """What every native system builds; systems differ in the exchange (and later in placement and schedule)."""

    gate_in_exchange = False

    def __init__(self, case: Case, exchange: Exchange, weights: Weights, rank: int):
        super().__init__()
        self.model = case.model
        self.exchange_ = exchange
        # The gate computes in the accumulator's format, as Megatron, Tutel and DeepSpeed can: top-k needs the digits.
        self.router = nn.Parameter(weights.router.to(case.device, accumulator(case.torch_dtype)))
        self.bias: torch.Tensor
        self.register_buffer("bias", weights.bias.to(self.router.detach()))
        if case.identity_experts:
            self.experts: Experts | IdentityExperts = IdentityExperts()
        else:
            self.experts = Experts(weights, case.placement.local(rank).tolist(), case.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights, kept = self._gate(x)
        return self._exchange(x, ids, weights, kept)

    def prepare(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            ids, weights, kept = self._gate(x)
        return ids, weights.requires_grad_(), kept

    def exchange(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        return self._exchange(x, *state)

    def _gate(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return gates.gate(self.model, x.to(self.router.dtype) @ self.router, self.bias)

    def _exchange(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None
    ) -> torch.Tensor:
        plan = self.exchange_.plan(ids, weights, kept)
        rows = self.exchange_.dispatch(x, plan)
        rows = self.experts(rows, plan.counts)
        return self.exchange_.combine(rows, plan)

    def gradients(self) -> Gradients:
        return Gradients(self.router.grad, self.experts.gradients())

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.router]


class NativeSystem(System):
    """A native system: the unified layer over an exchange of its own."""

    kind = "native"

    @classmethod
    @abc.abstractmethod
    def exchange(cls, case: Case, job: Job) -> Exchange:
        """Collective: the exchange of this rank."""

    @classmethod
    def tolerance(cls, dtype: Dtype) -> float:
        # float64 and float32: 1e-10 and 1e-5 are promised. bfloat16 has 8 bits: a few roundings of 2^-8 in a row.
        return {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}[dtype]

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> NativeLayer:
        return NativeLayer(case, cls.exchange(case, job), weights, job.rank)

    @classmethod
    def kept(cls, case: Case, probabilities: list[torch.Tensor]) -> list[torch.Tensor] | None:
        if case.model.capacity_factor is None:
            return None
        return [keep_strongest(case.model, p) for p in probabilities]
