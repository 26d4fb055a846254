"""Megatron-Core's MoE layer: its router, its all-to-all token dispatcher, its experts.

On CPU Megatron asks for CUDA devices and streams in its MoE path, although nothing there needs them. ``_use_cpu``
swaps the *name* ``torch`` inside four of Megatron's own modules for a proxy whose ``cuda`` answers "cpu" and whose
streams do nothing; torch itself and every other module of the process stay as they are. Tokens, probabilities and
gradients then take the same path as on a GPU, through ``torch.distributed.all_to_all_single``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from baselines import _packages
from harness.comm.job import Job
from harness.dtypes import MOST
from harness.layer.weights import Weights
from harness.options import yes
from harness.plan.slots import OVERLAP
from harness.routing.certificate import expert_counts
from harness.specs import DTYPE_BYTES, Dtype
from harness.system import Case, Gradients, MoELayer, System

REMEDY = 'pip install "megatron-core==0.16.1" (the newest for Python 3.11)'


class Megatron(System):
    name: ClassVar[str] = "megatron"
    title: ClassVar[str] = "Megatron-Core MoE layer, all-to-all dispatcher (real package)"
    kind = "package"
    source: ClassVar[str] = "megatron-core on PyPI: megatron.core.transformer.moe"
    preload: ClassVar[tuple[str, ...]] = ("megatron.core.transformer.moe.moe_layer",)
    options: ClassVar[dict[str, str]] = {
        OVERLAP: "moe_shared_expert_overlap: shared experts on a stream of their own, beside the exchange (false)"
    }
    dispatcher: ClassVar[dict[str, str]] = {
        "moe_token_dispatcher_type": "alltoall"
    }  # what Megatron's configuration says

    @classmethod
    def missing(cls) -> str | None:
        return _packages.missing("megatron", "megatron-core", REMEDY)

    @classmethod
    def version(cls) -> str | None:
        return _packages.version("megatron-core")

    @classmethod
    def tolerance(cls, dtype: Dtype) -> float:
        """Its softmax and sigmoid are float32 whatever the router's dtype, so float64 runs agree to float32 only."""
        return MOST[dtype]

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        model = case.model
        if (reason := _packages.refuse_placement(case, "megatron-core")) is not None:
            return reason
        if (reason := _packages.refuse_rare_gate(case, "megatron-core")) is not None:
            return reason
        if min(case.routing.tokens) == 0:
            return "megatron-core's router cannot reshape the logits of a rank without tokens"
        if model.top_k == 1 and model.gate == "softmax_topk":
            return "megatron-core weights a single expert by its probability over all experts, not by 1"
        if model.gate == "sigmoid":
            if model.top_k == 1 and model.normalise_weights:
                return "megatron-core does not normalise the sigmoid score of a single expert"
            if model.top_k > 1 and not model.normalise_weights:
                return "megatron-core always normalises the sigmoid scores of several experts"
            if _group_limited(case) and model.top_k // (model.topk_groups or 1) != 2:
                return (
                    "megatron-core scores a group by its k // topk_groups best experts, DeepSeek-V3 by its 2 best: "
                    f"{model.top_k} // {model.topk_groups} != 2"
                )
        return None

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray]:
        """Counts of all experts are gathered from every rank (int64); a row and its router probability travel per
        (token, expert) pair, by two all-to-alls; rows alone come back. Gradients retrace both."""
        model, num_ranks = case.model, case.topology.num_ranks
        rows = expert_counts(case.routing).reshape(num_ranks, num_ranks, -1).sum(2)  # [from, to]
        row_bytes = model.hidden * DTYPE_BYTES[case.dtype]
        probability_bytes = 8 if case.dtype == "float64" else 4
        there = rows * (row_bytes + probability_bytes)
        return {
            "metadata": _packages.off_diagonal(np.full((num_ranks, num_ranks), 8 * model.num_experts)),
            "dispatch": _packages.off_diagonal(there),
            "combine": _packages.off_diagonal(rows.T * row_bytes),
            "combine_grad": _packages.off_diagonal(rows * row_bytes),
            "dispatch_grad": _packages.off_diagonal(there.T),
        }

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        return _Layer(case, job, weights, cls.dispatcher)


class _Layer(MoELayer):
    gate_in_exchange = False

    def __init__(self, case: Case, job: Job, weights: Weights, dispatcher: dict[str, str]):
        super().__init__()
        _adapt(case.device)
        from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
        from megatron.core.transformer.moe.moe_layer import MoESubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec

        self.gated = case.model.ffn_type == "swiglu"
        self.local = [int(e) for e in case.placement.local(job.rank)]
        grouped, self.path = (None, "") if case.identity_experts else _expert_path(case)
        if case.identity_experts:
            submodules = MoESubmodules(experts=ModuleSpec(module=_IdentityExperts))
        else:
            from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

            submodules = get_moe_module_spec(
                use_te=grouped == "te",
                num_experts=case.model.num_experts,
                moe_grouped_gemm=grouped is not None,
                moe_use_legacy_grouped_gemm=grouped == "legacy",
            ).submodules
        self.moe = MegatronMoELayer(
            _config(case, job, grouped is not None, dispatcher), submodules, layer_number=1, pg_collection=_groups(job)
        ).to(job.device)
        self._load(weights)

    @property
    def shared(self) -> tuple[nn.Parameter, ...]:
        """Of the shared experts [H or 2 H, M], [M, H]; none where there are none."""
        mlp = getattr(self.moe, "shared_experts", None)
        return () if mlp is None else (mlp.linear_fc1.weight, mlp.linear_fc2.weight)

    def _load(self, weights: Weights) -> None:
        with torch.no_grad():
            self.moe.router.weight.copy_(weights.router.T)
            if self.moe.router.expert_bias is not None:
                self.moe.router.expert_bias.copy_(weights.bias)
            pairs = dict(zip(self.local, self._matrices(lambda p: p.data), strict=False))
            if self.shared:
                up, down = self.shared
                pairs[weights.model.num_experts] = up.data.T, down.data.T
            for expert, (fc1, fc2) in pairs.items():
                w = weights.expert(expert)
                fc1.copy_(torch.cat([w["w1"], w["w3"]], dim=1) if self.gated else w["w1"])
                fc2.copy_(w["w2"])

    def _matrices(self, pick: Callable[[nn.Parameter], torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(first [M, H or 2 H], second [H, M]) of every local expert, views of what ``pick`` takes of the parameters.

        Megatron has three classes of experts with three layouts: one module per expert, Transformer Engine's
        grouped linear with one weight per expert, and the legacy one with all experts in one weight."""
        experts, num_local = self.moe.experts, len(self.local)
        if isinstance(experts, _IdentityExperts):
            return []
        if hasattr(experts, "local_experts"):
            pairs = [(e.linear_fc1.weight, e.linear_fc2.weight) for e in experts.local_experts]
            return [(pick(fc1).T, pick(fc2).T) for fc1, fc2 in pairs]
        if hasattr(experts, "weight1"):
            first = pick(experts.weight1).view(num_local, experts.config.hidden_size, -1)
            second = pick(experts.weight2).view(num_local, -1, experts.config.hidden_size)
            return list(zip(first, second, strict=True))
        pairs = [
            (getattr(experts.linear_fc1, f"weight{i}"), getattr(experts.linear_fc2, f"weight{i}"))
            for i in range(num_local)
        ]
        return [(pick(fc1).T, pick(fc2).T) for fc1, fc2 in pairs]

    def how(self) -> str:
        return self.path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x.unsqueeze(1))[0].squeeze(1)  # Megatron wants [sequence, batch, M]

    def prepare(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            probabilities, routing_map = self.moe.route(x.unsqueeze(1))  # both [T, E]
        return probabilities.requires_grad_(), routing_map

    def exchange(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rows, probabilities = self.moe.preprocess(x.unsqueeze(1), *state)
        rows, probabilities = self.moe.dispatch(rows, probabilities)
        rows, _ = self.moe.routed_experts_compute(rows, probabilities)
        return self.moe.postprocess(self.moe.combine(rows), None).squeeze(1)

    def gradients(self) -> Gradients:
        experts = {}
        for expert, (fc1, fc2) in zip(self.local, self._matrices(_packages.grad), strict=False):
            parts = fc1.chunk(2, dim=1) if self.gated else (fc1,)
            experts[expert] = dict(zip(("w1", "w3"), parts, strict=False)) | {"w2": fc2}
        replicated = {"router": _packages.grad(self.moe.router.weight).T}
        if self.shared:
            fc1, fc2 = (_packages.grad(p).T for p in self.shared)
            parts = fc1.chunk(2, dim=1) if self.gated else (fc1,)
            replicated |= dict(zip(("shared_w1", "shared_w3"), parts, strict=False)) | {"shared_w2": fc2}
        return Gradients(gate=replicated, experts=experts)

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.moe.router.weight, *self.shared]

    def router_parameters(self) -> list[nn.Parameter]:
        return [self.moe.router.weight]


class _IdentityExperts(nn.Module):
    """Experts that return their input, weighted as Megatron's experts weight their hidden activations."""

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any = None):
        super().__init__()

    def forward(self, rows: torch.Tensor, tokens_per_expert: Any, probabilities: torch.Tensor) -> tuple[Any, None]:
        return (rows * probabilities.unsqueeze(-1)).to(rows.dtype), None


def _group_limited(case: Case) -> bool:
    return case.model.topk_groups is not None and case.model.topk_groups < case.model.num_groups


def _config(case: Case, job: Job, grouped_gemm: bool, dispatcher: dict[str, str]) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = case.model
    sigmoid = model.gate == "sigmoid"
    return TransformerConfig(
        num_layers=1,
        hidden_size=model.hidden,
        num_attention_heads=1,
        ffn_hidden_size=model.ffn,
        moe_ffn_hidden_size=model.ffn,
        moe_shared_expert_intermediate_size=None if case.identity_experts else model.shared_size or None,
        moe_shared_expert_overlap=yes(case, OVERLAP, False)
        and model.num_shared_experts > 0
        and not case.identity_experts,
        num_moe_experts=model.num_experts,
        expert_model_parallel_size=job.num_ranks,
        params_dtype=case.torch_dtype,
        bf16=case.dtype == "bfloat16",
        fp16=case.dtype == "float16",
        use_cpu_initialization=job.device.type == "cpu",
        perform_initialization=False,  # the weights are set from the oracle's
        activation_func=F.silu if model.ffn_type == "swiglu" else F.gelu,
        gated_linear_unit=model.ffn_type == "swiglu",
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        moe_grouped_gemm=grouped_gemm,
        **dispatcher,
        moe_router_topk=model.top_k,
        moe_router_dtype="fp64" if case.dtype == "float64" else "fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        # softmax over the chosen logits equals the renormalised softmax over all; only k = 1 needs the latter
        moe_router_pre_softmax=model.top_k == 1 and not sigmoid,
        moe_router_score_function="sigmoid" if sigmoid else "softmax",
        moe_router_enable_expert_bias=sigmoid and model.selection_bias,
        moe_router_num_groups=model.num_groups if sigmoid and _group_limited(case) else None,
        moe_router_group_topk=model.topk_groups if sigmoid and _group_limited(case) else None,
        moe_router_topk_scaling_factor=model.routed_scale if sigmoid else None,
    )


_GROUPED = {"te": "grouped GEMM of Transformer Engine", "legacy": "grouped GEMM of the grouped_gemm package"}
SEQUENTIAL, SLOW = "sequential, one expert after another", "slower than Megatron's users know it"


def _expert_path(case: Case) -> tuple[str | None, str]:
    """Which of Megatron's grouped GEMMs runs here, Transformer Engine's ("te"), the grouped_gemm package's ("legacy"),
    or None for one expert after the other; and the same in words, with the reason. Both are CUDA kernels; the legacy
    one is bfloat16 only."""
    if torch.device(case.device).type != "cuda":
        return None, f"{SEQUENTIAL}: Megatron's grouped GEMMs are for CUDA"
    if case.dtype != "bfloat16":
        return None, f"{SEQUENTIAL}, {SLOW}: its grouped GEMMs take bfloat16, not {case.dtype}"
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer.moe import grouped_gemm_util

    found = None
    if transformer_engine.HAVE_TE and getattr(transformer_engine, "TEColumnParallelGroupedLinear", None) is not None:
        found = "te"
    elif grouped_gemm_util.grouped_gemm_is_available():
        found = "legacy"
    if found is None:
        return None, f"{SEQUENTIAL}, {SLOW}: neither transformer-engine nor grouped_gemm is installed"
    return found, _GROUPED[found]


_alone: weakref.WeakKeyDictionary[Job, dist.ProcessGroup] = weakref.WeakKeyDictionary()


def _groups(job: Job) -> Any:
    """Expert parallelism over all ranks; every other kind of parallelism is a group of this rank alone."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import shared_experts

    if job not in _alone:
        alone, _ = dist.new_subgroups(1) if job.num_ranks > 1 else (job.world, None)
        _alone[job] = alone
    # 0.16 hands every group down but that of tensor parallelism to overlapped shared experts, which take the global one
    for name in ("copy_to_tensor_model_parallel_region", "reduce_from_tensor_model_parallel_region"):
        setattr(shared_experts, name, functools.partial(getattr(mappings, name), group=_alone[job]))
    groups = ProcessGroupCollection()
    for field in ("tp", "cp", "tp_cp", "expt_tp", "expt_dp"):
        setattr(groups, field, _alone[job])
    for field in ("ep", "tp_ep", "tp_dp_cp"):
        setattr(groups, field, job.world)
    return groups


@functools.cache
def _adapt(device: str) -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # what its all-gather gathers into
        parallel_state._set_global_memory_buffer()
    # 0.16 defines this name only where Transformer Engine is installed but reads it always
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    if torch.device(device).type == "cpu":
        _use_cpu()


_OF_MOE = ("router", "token_dispatcher", "shared_experts")


def _use_cpu() -> None:
    """Let Megatron's MoE path run without CUDA (see the module's docstring); once per process."""
    names = ("utils", "tensor_parallel.mappings", *(f"transformer.moe.{name}" for name in _OF_MOE))
    for name in names:
        importlib.import_module(f"megatron.core.{name}").torch = _CpuTorch("torch")  # type: ignore[attr-defined]

    from megatron.core.transformer.moe import router, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron's own leaves what is on the CPU as tensors, which all_to_all_single does not take as split sizes
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    # kept from import time; here the one that is installed (harness.comm.wire)
    mappings.dist_reduce_scatter_func = lambda *args, **kwargs: dist.reduce_scatter_tensor(*args, **kwargs)
    # compiled by default: on a CPU a compiler run of seconds for one counter
    router.TopKRouter._apply_expert_bias = inspect.unwrap(router.TopKRouter._apply_expert_bias)


class _NoStream:
    def wait_stream(self, stream: _NoStream) -> None: ...
    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None: ...


class _CpuTorch(types.ModuleType):
    """``torch`` with another ``cuda``; everything else is torch's own, looked up at call time."""

    cuda = types.SimpleNamespace(
        current_device=lambda: torch.device("cpu"),
        Stream=_NoStream,
        current_stream=_NoStream,
        stream=lambda stream: contextlib.nullcontext(),
        is_available=lambda: False,
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
