"""The unified MoE layer: the gate in front, and what all native systems promise. How tokens travel is theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from harness.comm.rows import accumulator
from harness.dtypes import EXACT
from harness.layer import gates
from harness.layer.experts import shared_expert
from harness.layer.gates import Gated
from harness.layer.oracle import keep_strongest
from harness.layer.weights import Weights
from harness.routing.types import Routing
from harness.specs import EXPERTS_CHOOSE, Dtype
from harness.system import Case, Gradients, MoELayer, System


class UnifiedLayer(MoELayer):
    """The gate; how tokens travel is left to the system."""

    gate_in_exchange = False
    experts: Any  # a module with ``gradients()``, as ``Experts``

    def __init__(self, case: Case, weights: Weights, rank: int):
        super().__init__()
        self.model, self.weights, self.rank = case.model, weights, rank
        # The gate computes in the accumulator's format, as Megatron, Tutel and DeepSpeed can: top-k needs the digits.
        self.gate_dtype = accumulator(case.torch_dtype)
        parameters = weights.gate(max(case.routing.tokens)).items()
        self.gate = nn.ParameterDict({name: value.to(case.device, self.gate_dtype) for name, value in parameters})
        self.bias: torch.Tensor
        self.register_buffer("bias", weights.bias.to(case.device, self.gate_dtype))
        self.shared = shared_expert(case, weights)

    def prepare(self, x: torch.Tensor) -> Gated:
        with torch.no_grad():
            gated = self.choose(x)
        if gated.mix is None:  # slots weigh 1
            gated.weights.requires_grad_()
        return gated

    def choose(self, x: torch.Tensor) -> Gated:
        """What the gate makes of tokens [T, M], differentiable."""
        normal = None
        if self.model.gate_noise:
            normal = self.weights.normal_noise(self.step, self.rank, len(x)).to(x.device)
        return gates.choose(self.model, x.to(self.gate_dtype), self.gate, self.bias, normal)

    def gradients(self) -> Gradients:
        found = {name: parameter.grad for name, parameter in self.gate.items() if parameter.grad is not None}
        return Gradients(found | (self.shared.gradients() if self.shared else {}), self.experts.gradients())

    def shared_parameters(self) -> list[nn.Parameter]:
        return [*self.gate.values(), *(self.shared.parameters() if self.shared else ())]

    def router_parameters(self) -> list[nn.Parameter]:
        return list(self.gate.values())


class UnifiedSystem(System):
    """A native system: the unified layer, exact to the last digits."""

    kind = "native"

    @classmethod
    def tolerance(cls, dtype: Dtype) -> float:
        return EXACT[dtype]

    @classmethod
    def planned_routing(cls, case: Case) -> Routing | None:
        """The routing that the exchange is given, for planning its bytes; None where the gate alone knows it."""
        model, tokens = case.model, case.routing.tokens
        if model.gate == "softmoe":  # C slots of every rank for every expert
            num_slots = [gates.capacity(model, count) for count in tokens]
            ids = [np.repeat(np.arange(model.num_experts, dtype=np.int32), count)[:, None] for count in num_slots]
            return Routing(np.concatenate(ids), tuple(map(len, ids)), model.num_experts)
        if model.capacity_factor is not None or not model.takes_routing:
            return None
        return case.routing

    @classmethod
    def kept(cls, case: Case, probabilities: list[torch.Tensor]) -> list[torch.Tensor] | None:
        if case.model.capacity_factor is None or case.model.gate in EXPERTS_CHOOSE:
            return None
        return [keep_strongest(case.model, p) for p in probabilities]
