"""Tutel's MoE layer: its gate, its dispatch kernels, linear and two-dimensional hierarchical (2DH) all-to-all.

Without drops every expert's buffer is padded to the largest count of any expert on any rank. Dispatch and combine
kernels are float32 on both sides of the exchange; on the wire rows have the experts' dtype. On CPU Tutel ignores
``a2a_ffn_overlap_degree``, so there it is refused rather than timed as if it did something.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from baselines import _packages
from harness.comm.job import Job
from harness.dtypes import MOST
from harness.errors import bad
from harness.layer.weights import Weights
from harness.routing.certificate import expert_counts
from harness.specs import DTYPE_BYTES, Dtype
from harness.system import Case, Gradients, MoELayer, System

REMEDY = (
    "it is on no package index; its repository is github.com/microsoft/tutel: "
    "pip install --no-build-isolation git+https://github.com/microsoft/tutel@main (compiles, needs a C++ compiler)"
)
OVERLAP = "a2a_ffn_overlap_degree"


class Tutel(System):
    name: ClassVar[str] = "tutel"
    title: ClassVar[str] = "Tutel MoE layer, linear all-to-all, without drops (real package)"
    kind = "package"
    source: ClassVar[str] = "github.com/microsoft/tutel; Hwang et al., Tutel, MLSys 2023"
    preload: ClassVar[tuple[str, ...]] = ("tutel.impls.moe_layer",)
    options: ClassVar[dict[str, str]] = {OVERLAP: "chunks that pipeline all-to-all and experts, CUDA only (1)"}
    use_2dh: ClassVar[bool] = False

    @classmethod
    def missing(cls) -> str | None:
        return _packages.missing("tutel", "tutel", REMEDY)

    @classmethod
    def version(cls) -> str | None:
        return _packages.version("tutel")

    @classmethod
    def tolerance(cls, dtype: Dtype) -> float:
        """Its gate and kernels are float32, so float64 runs agree to float32 only."""
        return MOST[dtype]

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        if (reason := _packages.refuse_placement(case, "tutel")) is not None:
            return reason
        if (reason := _packages.refuse_gate(case, "tutel")) is not None:
            return reason
        if case.model.hidden % 2:
            return f"tutel needs an even hidden size, not {case.model.hidden}"
        if min(case.routing.tokens) == 0:
            return "tutel's gate divides by a rank's token count and fails on a rank without tokens"
        degree, device = _overlap(case), torch.device(case.device).type
        if device == "cuda" and cls.missing() is None and not _built_for_cuda():
            return "this Tutel was built without CUDA; build it again where nvcc is found"
        if degree > 1 and device == "cpu":
            return f"tutel ignores {OVERLAP} on CPU, so {OVERLAP} = {degree} would not be what it says"
        return None

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray]:
        """C rows for each expert, four times; C is the largest count, up to a multiple of the overlap degree. It is
        agreed by an all-reduce of one int64 (and one more for ragged tokens), counted as sent to every other rank."""
        capacity = cls.capacity(case)
        parts = _two_stages(case, capacity) if cls.use_2dh else _packages.padded_bytes(case, capacity)
        metadata = np.full_like(parts["dispatch"], 16 if case.ragged else 8)
        return {"metadata": _packages.off_diagonal(metadata), **parts}

    @classmethod
    def capacity(cls, case: Case) -> int:
        """Rows C that a rank's buffer holds for every expert."""
        rows, degree = int(expert_counts(case.routing).max()), _overlap(case)
        return -(-rows // degree) * degree

    @classmethod
    def planned_rows(cls, case: Case) -> np.ndarray:
        return _packages.padded_rows(case, cls.capacity(case))

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        return _Layer(case, job, weights, cls.use_2dh)


class Tutel2DH(Tutel):
    """An exchange between the nodes' like ranks, then one within each node: fewer and larger messages, more bytes.

    With one node, or one rank a node, one of the two stages is empty and it is the linear all-to-all."""

    name: ClassVar[str] = "tutel-2dh"
    title: ClassVar[str] = "Tutel MoE layer, two-dimensional hierarchical all-to-all (real package)"
    use_2dh: ClassVar[bool] = True
    stages: ClassVar[tuple[str, ...]] = ("inter", "intra")


class _Layer(MoELayer):
    gate_in_exchange = True  # Tutel's layer has no seam between gate and dispatch

    def __init__(self, case: Case, job: Job, weights: Weights, use_2dh: bool):
        super().__init__()
        from tutel.impls import communicate
        from tutel.impls.moe_layer import moe_layer

        if use_2dh:
            ranks_per_node = case.topology.num_ranks // case.topology.shape[0]
            os.environ["LOCAL_SIZE"] = str(ranks_per_node)  # read by its CUDA kernels
            communicate.PrimAllToAll2D.LOCAL_SIZE = ranks_per_node
            communicate.create_groups_from_world(-ranks_per_node)  # else made within the first forward
        model = case.model
        self.ragged, self.swiglu = case.ragged, model.ffn_type == "swiglu"
        self.local = [int(e) for e in case.placement.local(job.rank)]
        experts: dict[str, Any] = {"num_experts_per_device": len(self.local)}
        if case.identity_experts:
            experts |= {"type": "custom", "module": _IdentityExperts}
        elif self.swiglu:
            experts |= {"type": "llama_ffn", "hidden_size_per_expert": model.ffn, "activation_fn": F.silu}
        else:
            experts |= {"type": "ffn", "hidden_size_per_expert": model.ffn, "activation_fn": F.gelu}
            experts |= {"has_fc1_bias": False, "has_fc2_bias": False}
        self.moe = moe_layer(
            gate_type={"type": "top", "k": model.top_k, "fp32_gate": True, "capacity_factor": 0.0, "gate_noise": 0.0},
            model_dim=model.hidden,
            experts=experts,
            group=job.world,
            use_2dh=use_2dh,
            a2a_ffn_overlap_degree=_overlap(case),
        ).to(job.device)
        self.moe.experts.to(case.torch_dtype)
        self.router: nn.Parameter = self.moe.gates[0].wg.weight  # [E, M], float32
        with torch.no_grad():
            self.router.copy_(weights.router.T)
            for name, stacked in self._matrices().items():
                drawn = torch.stack([weights.expert(e)[name] for e in self.local])
                stacked.copy_(drawn)

    def _matrices(self, gradient: bool = False) -> dict[str, torch.Tensor]:
        """w1 [E_local, M, H], w2 [E_local, H, M] (and w3) as views of Tutel's parameters or their gradients."""
        parameters = dict(self.moe.experts.named_parameters())
        if not parameters:
            return {}
        data = {name: _packages.grad(p) if gradient else p.data for name, p in parameters.items()}
        if self.swiglu:  # flat parameters, each with the shape that it is used in beside it
            shape = {name: getattr(self.moe.experts, f"{name}_full_shape") for name in data}
            names = {"w1": "W_fc1", "w3": "W_fc2", "w2": "W_fc3"}
            return {ours: data[theirs].view(shape[theirs]) for ours, theirs in names.items()}
        return {"w1": data["batched_fc1_w"].transpose(1, 2), "w2": data["batched_fc2_w"]}

    def how(self) -> str:
        return "one batched GEMM over padded slots"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x, inequivalent_tokens=self.ragged)

    def gradients(self) -> Gradients:
        matrices = self._matrices(gradient=True)
        experts = {e: {name: stacked[i] for name, stacked in matrices.items()} for i, e in enumerate(self.local)}
        return Gradients(gate={"router": _packages.grad(self.router).T}, experts=experts if matrices else {})

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.router]


class _IdentityExperts(nn.Module):
    def __init__(self, model_dim: int, num_experts_per_device: int, sharded_count: int):
        super().__init__()

    def forward(self, x: torch.Tensor, layer: Any) -> torch.Tensor:
        return x


def _overlap(case: Case) -> int:
    degree = int(case.options.get(OVERLAP, 1))
    if not 1 <= degree <= 32:
        raise bad(f"options.{OVERLAP}", degree, "must be in 1..32")
    return degree


def _two_stages(case: Case, capacity: int) -> dict[str, np.ndarray]:
    """2DH: a rank's whole buffer goes over its rail in equal parts, and again within its node."""
    num_ranks = case.topology.num_ranks
    ranks_per_node = num_ranks // case.topology.shape[0]
    buffer_bytes = case.model.num_experts * capacity * case.model.hidden * DTYPE_BYTES[case.dtype]
    rank = np.arange(num_ranks)
    same_node = rank[:, None] // ranks_per_node == rank // ranks_per_node
    same_rail = rank[:, None] % ranks_per_node == rank % ranks_per_node
    part = same_rail * (buffer_bytes * ranks_per_node / num_ranks) + same_node * (buffer_bytes / ranks_per_node)
    return dict.fromkeys(("dispatch", "combine", "combine_grad", "dispatch_grad"), _packages.off_diagonal(part))


def _built_for_cuda() -> bool:
    """Whether its extension can compile kernels."""
    import tutel_custom_kernel

    return hasattr(tutel_custom_kernel, "inject_source")
