"""Memory of a training step by arithmetic: what a rank keeps of parameters, gradients and AdamW's state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from harness.layer.work import attention_parameters, expert_parameters, ffn_parameters
from harness.routing.certificate import expert_counts
from harness.specs import DTYPE_BYTES, Dtype, Experiment, Model
from harness.topology import Topology

if TYPE_CHECKING:
    from harness.system import Case, System

#: of the memory of a training step; the last holds the others
PARTS = ("parameters", "gradients", "optimizer", "materialised", "activations", "peak")

#: of AdamW, as many times as large as a parameter: two moments; of float16 both and the weight itself, in float32
OPTIMIZER_STATES: dict[Dtype, int] = {"float64": 2, "float32": 2, "bfloat16": 2, "float16": 6}


def optimizer_accesses(dtype: Dtype) -> int:
    """Of AdamW to memory, in parameters: it reads a parameter, its gradient and their state, and writes all but the
    gradient."""
    return 3 + 2 * OPTIMIZER_STATES[dtype]


def expert_bytes(model: Model, dtype: Dtype) -> int:
    """Parameters of one expert."""
    return expert_parameters(model) * DTYPE_BYTES[dtype]


def state_bytes(experiment: Experiment, topology: Topology, num_own: int) -> dict[str, float]:
    """``parameters``, ``gradients`` (with the buffer in which the attentions' are summed) and ``optimizer`` of a rank
    that owns ``num_own`` experts over all layers. The GPT's other parameters are replicated, or the attention's shared
    out inside nodes; a prescribed workload trains no routers. Of the gates GShard's."""
    model, width = experiment.model, DTYPE_BYTES[experiment.dtype]
    parts = topology.num_ranks // topology.shape[0] if experiment.model_parallel else 1
    attention = attention_parameters(model) // parts
    dense = (rest_parameters(model) + model.num_layers * attention) * width
    gate = model.num_moe_layers * model.hidden * model.num_experts * (8 if experiment.dtype == "float64" else 4)
    experts = num_own * expert_bytes(model, experiment.dtype)
    routers = gate if experiment.workload.generator == "natural" else 0
    return {
        "parameters": float(dense + gate + experts),
        "gradients": float(dense + gate + experts + model.num_layers * attention * width),
        "optimizer": float(OPTIMIZER_STATES[experiment.dtype] * (dense + experts) + 2 * routers),
    }


def rest_parameters(model: Model) -> int:
    """Of the GPT that every rank has whole, whatever becomes of its attention: embeddings, norms, the FFNs of layers
    without experts, and shared experts."""
    tables = (model.vocab + model.seq + 1 + 2 * model.num_layers) * model.hidden
    dense = (model.num_layers - model.num_moe_layers) * ffn_parameters(model, model.dense_ffn or 0)
    return tables + dense + model.num_moe_layers * ffn_parameters(model, model.shared_size)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Of one layer on one rank: assignments of its own tokens, and rows that its experts compute; ``grouped``: whether
    several parts of any tokens came home apart."""

    sent: int
    computed: int
    grouped: bool = False


def activation_bytes(
    experiment: Experiment, num_tokens: int, layers: Sequence[Rows], gpu: bool | None = None
) -> float | None:
    """What the forward of a step leaves for its backward on a rank with ``num_tokens`` tokens, copies of experts
    excepted, of native layers whose rows travel as they are, in one all-to-all-v. None where a layer keeps more or
    other things: gates that no routing can be prescribed to, a capacity, model parallelism. ``gpu``: whether ranks
    compute on GPUs; None: where the cluster is a physical one."""
    gpu = experiment.cluster.kind == "physical" if gpu is None else gpu
    model, width = experiment.model, DTYPE_BYTES[experiment.dtype]
    if model.gate not in GATES or model.capacity_factor is not None or experiment.model_parallel:
        return None
    real, wide = experiment.compute == "real", max(4, width)  # wide: of the gate, of steering, inside norms
    hidden, top_k, num_experts = model.hidden, model.top_k, model.num_experts
    copy = wide * hidden if wide > width else 0
    # The residual behind the attention, what enters the MoE part or the FFN, and what leaves it.
    token = 3 * width * hidden
    token += 2 * wide if gpu else 2 * (wide * hidden + copy + wide)  # norms, on GPUs fused
    if real:  # what enters the projections, what they make, what attention makes of it and its log-sum-exp
        queries, keys = (model.head * heads for heads in (model.num_heads, model.num_kv_heads or model.num_heads))
        token += width * (hidden + 2 * queries + 2 * keys) + wide * model.num_heads
    inner = {"gpt": 2, "swiglu": 4}[model.ffn_type] * width * real  # of an FFN, for each of its columns
    num_dense = model.num_layers - model.num_moe_layers
    of_dense = num_dense * (token + inner * (model.dense_ffn or 0))
    token += copy + inner * model.shared_size  # the gate's copy, and what is inside the shared experts
    token += 2 * width * hidden * (model.num_shared_experts > 0)  # what these make, and what it is added to
    if experiment.workload.generator != "natural":
        token += wide * num_experts
    every, chosen, once = GATES[model.gate]
    token += wide * (every * num_experts + chosen * top_k + once) + _INDEX * top_k
    token += _INDEX  # where each token's rows begin
    sent = width * hidden + 3 * _INDEX + wide  # what came home, its ways and weights
    row = width * (hidden + hidden * real) + inner * model.ffn + _INDEX
    # Of the embedding; later layers add what the MoE part made to it, and norms in the same format keep that.
    sums = 1 if copy else model.num_layers
    unsorted = sum(_INDEX * (each.sent + num_tokens) for each in layers if each.grouped)  # until all parts are home
    return float(
        num_tokens * (sums * width * hidden + of_dense + len(layers) * token)
        + sum(sent * each.sent + row * each.computed for each in layers)
        - unsorted
    )


def peak_bytes(experiment: Experiment, num_tokens: int, parts: Mapping[str, float]) -> float:
    """The most that a rank holds in a step, of what it holds by part (``state_bytes``, ``materialised``,
    ``activations``): around the loss, or when all gradients are there, as AdamW takes nothing beside; of float16 the
    largest parameter and its gradient, in float32."""
    model, width = experiment.model, DTYPE_BYTES[experiment.dtype]
    wide = max(4, width)
    attention = model.num_layers * attention_parameters(experiment.model) * width
    copies, numbers = (2, 6) if wide > width else (1, 8)  # of each in the last norm's backward, which is not fused
    of_loss = num_tokens * (model.vocab * (width + wide * copies) + model.hidden * (2 * width + wide * copies))
    of_norm = num_tokens * model.hidden * wide * numbers + model.vocab * model.hidden * width
    at_loss = attention + parts["materialised"] + parts["activations"] + max(of_norm, of_loss)
    holders = experiment.groups.size if experiment.groups else experiment.cluster.num_ranks
    of_rank = model.num_experts / holders * model.hidden * model.ffn
    beside = 8 * max(model.vocab * model.hidden, of_rank) if experiment.dtype == "float16" else 0.0
    if experiment.groups is not None:  # the gradients of a layer's experts once more, as they are summed over replicas
        beside = max(beside, model.num_experts / holders * expert_bytes(model, experiment.dtype))
    return parts["parameters"] + parts["optimizer"] + max(at_loss, parts["gradients"] + beside)


def room_bytes(experiment: Experiment, case: Case) -> float | None:
    """What the cluster's stated memory of a device leaves beside the state and activations of a training step, at
    least 0; None where none is stated."""
    limit = experiment.cluster.device_memory_bytes
    if limit is None:
        return None
    num_own = -(-experiment.model.num_moe_layers * experiment.model.num_experts // case.num_holders)
    kept = sum(state_bytes(experiment, case.topology, num_own).values())
    return max(0.0, limit - kept - _activations(experiment, case))


def _activations(experiment: Experiment, case: Case) -> float:
    """Of the busiest rank, as far as they are known; as if every layer had ``case``'s routing."""
    counts = expert_counts(case.routing)
    computed = max(int((expert_counts(part.routing).sum(0) @ part.placement.hosts).max()) for part in case.parts)
    rows = Rows(int(counts.sum(1).max()), computed)
    return activation_bytes(experiment, max(case.routing.tokens), [rows] * experiment.model.num_moe_layers) or 0.0


_INDEX = 8  # bytes of one
#: what a gate keeps of each token, in numbers: of every expert, of each chosen one, and once
GATES = {"gshard": (1, 2, 1), "softmax_topk": (0, 1, 0), "sigmoid": (1, 3, 1), "moge": (1, 1, 0)}


def refusal(experiment: Experiment, system: type[System], case: Case) -> str | None:
    """Why a native system's training step cannot fit the memory that the cluster states for a device, with the
    arithmetic; None if it may. What single tasks need is not in it, so what passes may still run out."""
    limit = experiment.cluster.device_memory_bytes
    if limit is None or experiment.phase != "train_step" or system.kind == "package":
        return None
    model, each = experiment.model, expert_bytes(experiment.model, experiment.dtype)
    num_own = -(-model.num_moe_layers * model.num_experts // case.num_holders)
    found = state_bytes(experiment, case.topology, num_own)
    found["activations"] = _activations(experiment, case)
    if copies := system.copied_parameters(case):
        found["copies and their gradients"] = float(copies * each)
    total = sum(found.values())
    if total <= limit:
        return None
    sums = " + ".join(f"{value / 1e9:.3g} GB {name}" for name, value in found.items())
    return (
        f"a shard of {num_own} experts of {each / 1e6:.3g} MB does not fit: {sums} = {total / 1e9:.3g} GB, "
        f"{limit / 1e9:.3g} GB a device; take more ranks or a smaller model"
    )
