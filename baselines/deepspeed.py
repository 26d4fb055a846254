"""DeepSpeed's MoE layer (deepspeed.moe): its gate, its padded all-to-all, around experts of the user's own.

Every expert's buffer is padded to one capacity C, so an exchange moves E / num_ranks * C rows between every two ranks
whatever the routing. Without drops C is the largest count of any expert on any rank: cost follows the maximum load.
The gate computes in float32 always. Its random defaults (sampling of the second expert, random token selection) are
off.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from baselines import _packages
from harness.comm.job import Job
from harness.dtypes import MOST
from harness.layer.weights import Weights
from harness.routing.certificate import expert_counts
from harness.specs import DTYPE_BYTES, Dtype
from harness.system import Case, Gradients, MoELayer, System

REMEDY = 'pip install "deepspeed==0.19.8"'


class DeepSpeed(System):
    name: ClassVar[str] = "deepspeed"
    title: ClassVar[str] = "DeepSpeed MoE layer without drops, padded to the largest count (real package)"
    kind = "package"
    preload: ClassVar[tuple[str, ...]] = ("deepspeed.moe.layer",)
    source: ClassVar[str] = "deepspeed on PyPI: deepspeed.moe; Rajbhandari et al., DeepSpeed-MoE, ICML 2022"
    drops: ClassVar[bool] = False

    @classmethod
    def missing(cls) -> str | None:
        return _packages.missing("deepspeed", "deepspeed", REMEDY)

    @classmethod
    def version(cls) -> str | None:
        return _packages.version("deepspeed")

    @classmethod
    def tolerance(cls, dtype: Dtype) -> float:
        """The gate rounds its input to float32, so float64 runs agree to float32 only."""
        return MOST[dtype]

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        if (reason := _packages.refuse_placement(case, "deepspeed")) is not None:
            return reason
        if (reason := _packages.refuse_gate(case, "deepspeed")) is not None:
            return reason
        rows = expert_counts(case.routing)
        if case.model.top_k == 1 and rows.max() > min(case.routing.tokens):
            return (
                "deepspeed's top-1 gate caps the padding at a rank's own token count, so its ranks would disagree: "
                f"{rows.max()} rows for one expert, {min(case.routing.tokens)} tokens on the smallest rank"
            )
        return None

    @classmethod
    def capacities(cls, case: Case) -> list[int]:
        """Rows C that each rank's buffer holds for every expert."""
        return [int(expert_counts(case.routing).max())] * case.topology.num_ranks

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray]:
        """C rows for each of the receiver's experts, four times. Without drops one int64 maximum is all-reduced,
        counted as if every rank sent it to every other."""
        parts = _packages.padded_bytes(case, cls.capacities(case)[0])
        metadata = 0 if cls.drops else DTYPE_BYTES["float64"]
        return {"metadata": _packages.off_diagonal(np.full_like(parts["dispatch"], metadata)), **parts}

    @classmethod
    def planned_rows(cls, case: Case) -> np.ndarray:
        return _packages.padded_rows(case, cls.capacities(case)[0])

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        return _Layer(case, job, weights, cls.drops)


class DeepSpeedDrop(DeepSpeed):
    """Every expert takes at most C = ceil(f k T / E) of a rank's assignments; f is the model's capacity factor."""

    name: ClassVar[str] = "deepspeed-drop"
    title: ClassVar[str] = "DeepSpeed MoE layer with its capacity limit, dropping tokens (real package)"
    drops: ClassVar[bool] = True

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        if (reason := super().refuse(case)) is not None:
            return reason
        if case.model.capacity_factor is None:
            return "deepspeed-drop drops what is over the model's capacity_factor, and the model has none"
        capacities = cls.capacities(case)
        if len(set(capacities)) > 1:
            return (
                f"deepspeed sizes its buffers by each rank's own tokens; with drops they must agree, not {capacities}"
            )
        if case.model.top_k == 1 and expert_counts(case.routing).max() > capacities[0]:
            return (
                "deepspeed's top-1 gate without random token selection leaves which tokens to drop to the order of "
                "ties in torch.topk, so no rule can be stated"
            )
        return None

    @classmethod
    def capacities(cls, case: Case) -> list[int]:
        assert case.model.capacity_factor is not None  # else refused
        factor = np.float32(case.model.capacity_factor * case.model.top_k)  # DeepSpeed rounds in float32
        return [int(np.ceil(np.float32(tokens / case.model.num_experts) * factor)) for tokens in case.routing.tokens]

    @classmethod
    def kept(cls, case: Case, probabilities: list[torch.Tensor]) -> list[torch.Tensor]:
        """k = 2 (GShard): first choices in token order, then second choices in token order, until C.
        k > 2: the C assignments of highest probability of every expert. k = 1: nothing (else refused)."""
        kept = []
        for p, capacity in zip(probabilities, cls.capacities(case), strict=True):
            ids = p.topk(case.model.top_k, dim=1).indices
            chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, ids, True)
            if case.model.top_k == 2:
                first, second = (F.one_hot(ids[:, i], p.shape[1]) for i in range(2))
                place_first = first.cumsum(0) - 1
                place_second = second.cumsum(0) - 1 + first.sum(0)  # after all first choices, dropped ones too
                place = torch.where(first.bool(), place_first, place_second)
            else:
                order = p.masked_fill(~chosen, -1.0).argsort(dim=0, descending=True, stable=True)
                place = order.argsort(dim=0)
            kept.append(chosen & (place < capacity))
        return kept


class _Layer(MoELayer):
    gate_in_exchange = True  # DeepSpeed's layer has no seam between gate and dispatch

    def __init__(self, case: Case, job: Job, weights: Weights, drops: bool):
        super().__init__()
        import deepspeed

        if deepspeed.get_accelerator().device_name() == "cpu":
            # Compiling its shared-memory collectives needs a C++ compiler, and they would bypass torch.distributed.
            # Only CPUs have them, and on a GPU this table is made by asking for nvcc and for every kernel.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        deepspeed.init_distributed(verbose=False)  # wraps the process group that exists
        from deepspeed.moe.layer import MoE

        model = case.model
        capacity_factor = model.capacity_factor or 1.0  # unused where nothing is dropped
        expert = nn.Identity() if case.identity_experts else _Expert(case)
        self.local = [int(e) for e in case.placement.local(job.rank)]
        self.moe = MoE(
            model.hidden,
            expert,
            num_experts=model.num_experts,
            ep_size=job.num_ranks,
            k=model.top_k,
            capacity_factor=capacity_factor,
            eval_capacity_factor=capacity_factor,
            min_capacity=0,
            drop_tokens=drops,
            use_rts=False,
            use_tutel=False,
            top2_2nd_expert_sampling=False,
        ).to(job.device)
        self.moe.deepspeed_moe._set_ep_group(job.world)
        self.gate_weight: nn.Parameter = self.moe.deepspeed_moe.gate.wg.weight  # [E, M], float32
        self.experts = self.moe.deepspeed_moe.experts.deepspeed_experts
        with torch.no_grad():
            self.gate_weight.copy_(weights.router.T)
            for index, module in zip(self.local, self.experts, strict=True):
                for name, parameter in module.named_parameters():
                    parameter.copy_(weights.expert(index)[name])

    def how(self) -> str:
        return "one module an expert, as DeepSpeed calls its users'"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x)[0]

    def gradients(self) -> Gradients:
        experts = {
            index: {name: _packages.grad(parameter) for name, parameter in module.named_parameters()}
            for index, module in zip(self.local, self.experts, strict=True)
        }
        return Gradients(gate={"router": _packages.grad(self.gate_weight).T}, experts=experts)

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.gate_weight]


class _Expert(nn.Module):
    """The user's part of a DeepSpeed MoE layer: one FFN, in the oracle's layout."""

    def __init__(self, case: Case):
        super().__init__()
        m, h, dtype = case.model.hidden, case.model.ffn, case.torch_dtype
        self.w1 = nn.Parameter(torch.empty(m, h, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(h, m, dtype=dtype))
        self.w3 = nn.Parameter(torch.empty(m, h, dtype=dtype)) if case.model.ffn_type == "swiglu" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(x @ self.w1) if self.w3 is None else F.silu(x @ self.w1) * (x @ self.w3)
        return hidden @ self.w2
