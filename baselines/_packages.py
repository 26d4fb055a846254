"""What the adapters of real packages share: are they there, and how many rows the routing sends where."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import numpy as np
import torch
from torch import nn

from harness.placement import Placement
from harness.specs import DTYPE_BYTES
from harness.system import Case


def missing(module: str, distribution: str, remedy: str) -> str | None:
    """None if ``distribution`` is installed and top-level ``module`` can be found; else what to do about it."""
    if importlib.util.find_spec(module) is None:
        return f"{distribution} is not installed; {remedy}"
    return None


def version(distribution: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def refuse_placement(case: Case, package: str) -> str | None:
    """The packages can only hold E / num_ranks consecutive experts a rank."""
    num_experts, num_ranks = case.model.num_experts, case.topology.num_ranks
    if case.exchange_dtype is not None:
        return f"{package} is not driven here with rows that travel as {case.exchange_dtype}"
    if num_experts % num_ranks:
        return f"{package} needs num_experts divisible by the ranks: {num_experts} % {num_ranks} != 0"
    if not np.array_equal(case.placement.hosts, Placement.contiguous(num_experts, num_ranks).hosts):
        return f"{package} places E / num_ranks consecutive experts on a rank and cannot follow another placement"
    return None


def refuse_shared(case: Case, package: str) -> str | None:
    """Of packages without shared experts."""
    if not case.model.num_shared_experts or case.identity_experts:
        return None
    return f"{package} has no shared experts beside those that the gate chooses"


def refuse_gate(case: Case, package: str) -> str | None:
    """DeepSpeed and Tutel take a softmax over all experts, renormalised over the chosen ones when k > 1, and no shared
    ones."""
    if (reason := refuse_rare_gate(case, package) or refuse_shared(case, package)) is not None:
        return reason
    if case.model.gate == "sigmoid":
        return f"{package} has no sigmoid gate"
    if case.model.gate == "softmax_topk" and case.model.top_k == 1:
        return f"{package} weights a single expert by its probability over all experts, not by 1"
    return None


def refuse_rare_gate(case: Case, package: str) -> str | None:
    """Gates that no package has as moebench defines them."""
    if case.model.gate == "xmoe":
        if package == "tutel":
            return "tutel's cosine gate adds a bias to the projection and learns the temperature, which here is fixed"
        return f"{package} has no gate of cosines (X-MoE)"
    if case.model.gate == "moge":
        said = f"{package} has no gate that takes as many experts from each group (MoGE)"
        limit = "its moe_router_num_groups and moe_router_group_topk limit which groups a token uses (DeepSeek-V3)"
        return f"{said}; {limit}" if package == "megatron-core" else said
    if case.model.gate == "expert_choice":
        return f"{package} has no gate in which experts choose tokens"
    if case.model.gate == "softmoe":
        return f"{package} has no gate that mixes tokens into slots (Soft MoE)"
    if case.model.gate_noise:
        return f"{package} has no trainable noise on the logits (GShard)"
    return None


def padded_bytes(case: Case, capacity: int) -> dict[str, np.ndarray]:
    """Parts of an exchange whose every expert buffer holds ``capacity`` rows, on a direct all-to-all."""
    num_ranks = case.topology.num_ranks
    rows = case.model.num_experts // num_ranks * capacity
    part = off_diagonal(np.full((num_ranks, num_ranks), rows * case.model.hidden * DTYPE_BYTES[case.dtype]))
    return dict.fromkeys(("dispatch", "combine", "combine_grad", "dispatch_grad"), part)


def padded_rows(case: Case, capacity: int) -> np.ndarray:
    """Rows that experts compute whose buffers hold ``capacity`` rows of every rank, float64 [num_ranks, E]."""
    return case.placement.hosts.T * float(capacity * case.topology.num_ranks)


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """``matrix`` [num_ranks, num_ranks] as float64 without what a rank sends to itself."""
    return np.where(np.eye(len(matrix), dtype=bool), 0.0, matrix.astype(np.float64))


def grad(parameter: nn.Parameter) -> torch.Tensor:
    """Its gradient; zeros where backward did not reach it (an expert without tokens)."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
