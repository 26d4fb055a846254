"""Memory of a training step by arithmetic: what a rank keeps of parameters, gradients and AdamW's state."""

from __future__ import annotations

from harness.specs import DTYPE_BYTES, GEMMS, Dtype, Experiment, Model
from harness.system import Case, System
from harness.topology import Topology


def expert_bytes(model: Model, dtype: Dtype) -> int:
    """Parameters of one expert."""
    return GEMMS[model.ffn_type] * model.hidden * model.ffn * DTYPE_BYTES[dtype]


def state_bytes(experiment: Experiment, topology: Topology, num_own: int) -> dict[str, float]:
    """``parameters``, ``gradients`` (with the buffer in which the attentions' are summed) and ``optimizer`` of a rank
    that owns ``num_own`` experts over all layers. The GPT's other parameters are replicated, or the attention's shared
    out inside nodes; a prescribed workload trains no routers. Of the gates GShard's."""
    model, width = experiment.model, DTYPE_BYTES[experiment.dtype]
    parts = topology.num_ranks // topology.shape[0] if experiment.model_parallel else 1
    head = model.hidden // model.num_heads
    attention = model.hidden * head * (2 * model.num_heads + 2 * (model.num_kv_heads or model.num_heads)) // parts
    rest = (model.vocab + model.seq + 1 + 2 * model.num_layers) * model.hidden
    dense = (rest + model.num_layers * attention) * width
    gate = model.num_layers * model.hidden * model.num_experts * (8 if experiment.dtype == "float64" else 4)
    experts = num_own * expert_bytes(model, experiment.dtype)
    routers = gate if experiment.workload.generator == "natural" else 0
    return {
        "parameters": float(dense + gate + experts),
        "gradients": float(dense + gate + experts + model.num_layers * attention * width),
        "optimizer": float(2 * (dense + experts + routers)),
    }


def refusal(experiment: Experiment, system: type[System], case: Case) -> str | None:
    """Why a native system's training step cannot fit the memory that the cluster states for a device, with the
    arithmetic; None if it may. Activations are not in it, so what passes may still run out."""
    limit = experiment.cluster.device_memory_bytes
    if limit is None or experiment.phase != "train_step" or system.kind == "package":
        return None
    model, each = experiment.model, expert_bytes(experiment.model, experiment.dtype)
    num_own = -(-model.num_layers * model.num_experts // case.topology.num_ranks)
    found = state_bytes(experiment, case.topology, num_own)
    if copies := system.copies_kept(case):
        found["copies and their gradients"] = 2.0 * copies * each
    total = sum(found.values())
    if total <= limit:
        return None
    sums = " + ".join(f"{value / 1e9:.3g} GB {name}" for name, value in found.items())
    return (
        f"a shard of {num_own} experts of {each / 1e6:.3g} MB does not fit: {sums} = {total / 1e9:.3g} GB, "
        f"{limit / 1e9:.3g} GB a device; take more ranks or a smaller model"
    )
