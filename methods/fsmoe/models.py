"""Whole training steps of FSMoE's real models (arXiv 2501.10714, section 6) as one plan, under FSMoE and its rivals:
forward of all layers, backward of all, each schedule's slices of the gradient all-reduce in between, what is left of it
after the backward, and the optimizer.

Layers are counted in backward order wherever gradients are placed, as in ``methods.fsmoe.partition``: a slice holds
gradients of layers whose backward is done.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from harness.layer.work import expert_parameters, kv_fraction
from harness.memory import optimizer_accesses
from harness.plan.cost import Compute, Even, Hold
from harness.plan.gradients import GradientBytes
from harness.plan.graph import Timeline, Work
from harness.plan.machine import Contention, Machine
from harness.plan.passage import Direction, plan_alone
from harness.plan.simulate import simulate
from harness.plan.step import TrainingTasks
from harness.specs import GEMMS, Cluster, Model
from harness.topology import Topology
from methods.fsmoe.costs import Array, attention_gradient_elements, reduce_costs
from methods.fsmoe.grid import ELEMENT_BYTES, Generalized, Layers, layers
from methods.fsmoe.place import Slices, place
from methods.fsmoe.sizes import Sizes
from methods.fsmoe.step import LINA_CHUNK_BYTES, POLICIES, Policy, reduction

#: Interpretation, after a block that is commented out in the authors' driver: tokens are not split over the
#: model-parallel ranks before the dispatch, so that each of them sends all; experts are whole, not sharded in the node.
DS_MOE = "ds-moe"
SCHEDULES: dict[str, Policy] = {
    DS_MOE: Policy(
        "DeepSpeed-MoE as the paper seems to build it: one chunk, tokens sent N_MP times", False, "one", "after"
    ),
    **POLICIES,
}
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def model_layer(model: Model, cluster: Cluster, *, batch: float = 1, num_ranks: int | None = None) -> Layers:
    """One generalized layer of ``model``: ``batch`` samples per node of ``cluster``, whose ranks share them.

    ``num_ranks`` picks constants that the cluster lists for that many ranks."""
    return layers(
        cluster,
        batch=batch,
        seq=model.seq,
        hidden=model.hidden,
        ffn=model.ffn,
        copies=model.top_k * (model.capacity_factor or 1.0),
        num_gemms=GEMMS[model.ffn_type],
        kv_fraction=kv_fraction(model),
        biased=model.ffn_type == "gpt",
        num_ranks=num_ranks,
    )


def duplicated(layer: Layers) -> Layers:
    """The layer as ``ds-moe`` runs it: N_MP times the slots and the experts' work, nothing gathered in the node."""
    times = layer.cluster.shape[-1]

    def whole(sizes: Sizes) -> Sizes:
        return dataclasses.replace(sizes, slot_bytes=times * sizes.slot_bytes, macs=times * sizes.macs, num_local=0)

    return dataclasses.replace(layer, forward=whole(layer.forward), backward=whole(layer.backward))


def optimizer_s(model: Model, cluster: Cluster) -> float | None:
    """Adam over one rank's float32 weights of a layer, as long as its memory traffic takes; None if the cluster does
    not say how fast that is. One expert per node, sharded over its ranks."""
    if cluster.device_bytes_per_s is None:
        return None
    num_mp = cluster.shape[-1]
    attention = attention_gradient_elements(
        model.hidden, num_mp, biased=model.ffn_type == "gpt", kv_fraction=kv_fraction(model)
    )
    experts = expert_parameters(model) / num_mp
    return float((attention + experts) * optimizer_accesses("float32") * ELEMENT_BYTES / cluster.device_bytes_per_s)


def place_gradients(policy: Policy, layer: Layers, num_layers: int, *, chunk_bytes: float = LINA_CHUNK_BYTES) -> Slices:
    """What ``policy`` does with ``num_layers`` layers equal to ``layer``, at ideal lanes."""
    reduce = reduce_costs(layer.cluster, layer.num_ranks)
    gradient, dense_s = [int(layer.gradient_bytes)] * num_layers, float(layer.dense_backward_s())
    costs = layer.costs
    return place(policy, costs, costs.backward(), reduce, gradient, dense_s, chunk_bytes=chunk_bytes)


class ModelStep(TrainingTasks):
    """A step of layers ``of_layer``, first layer first. Embedding, head, norms and sums have no published cost;
    ``optimizer_s`` seconds a layer, if known; ``gate`` as ``Generalized``."""

    shares_attention, moves = True, False

    def __init__(
        self,
        of_layer: Sequence[Layers],
        policy: Policy,
        slices: Slices,
        optimizer_s: float | None = None,
        gate: Compute | None = None,
    ):
        self.of_layer, self.optimizer_s, self.tail_chunks = of_layer, optimizer_s, slices.tail_chunks
        self.passages = [
            Generalized(layer, policy, (slices.degree_forward, degree), gate=gate)
            for layer, degree in zip(of_layer, slices.degree_backward[::-1].tolist(), strict=True)
        ]
        self.layers_of = [range(i, i + 1) for i in range(len(of_layer))]
        gradients = [int(layer.gradient_bytes) for layer in reversed(of_layer)]
        self.stream, self.slices = GradientBytes(gradients, ELEMENT_BYTES, "inter"), slices.as_slices(ELEMENT_BYTES)

    def work(self, task: str) -> Work:
        if task != "optimizer" or self.optimizer_s is None:
            return Work()
        return Work(Hold(self.optimizer_s * len(self.of_layer)))

    def dense_work(self, layer: int, direction: Direction, task: str) -> Work:
        return self.of_layer[layer].dense_work(direction, task)

    def tail(self, of_stream: Work | None) -> Work:
        if of_stream is None:
            return Work()
        assert isinstance(of_stream.cost, Even)
        return Work(dataclasses.replace(of_stream.cost, messages=self.tail_chunks))


#: kinds of task that have no published cost
UNPRICED = {"embedding", "norm", "residual", "head", "restore"}


@dataclasses.dataclass(frozen=True)
class Gate:
    """A gate's matrix products on one rank: how many, and multiply-adds in all."""

    num_gemms: int
    macs: float


def prepare(name: str, layer: Layers, num_layers: int) -> tuple[Layers, Slices]:
    """The layer as the schedule ``name`` runs it, and where it sends the gradients."""
    slices = place_gradients(SCHEDULES[name], layer, num_layers)
    return (duplicated(layer) if name == DS_MOE else layer), slices


def step_times(
    model: Model,
    cluster: Cluster,
    *,
    batch: float = 1,
    num_ranks: int | None = None,
    contention: Contention | None = None,
    schedules: Iterable[str] = tuple(SCHEDULES),
    gate: Gate | None = None,
) -> list[dict[str, Any]]:
    """A training step of ``model`` under each schedule: one row each with seconds, what was decided, and busy seconds
    by kind of task. Without a ``gate`` the routing costs nothing."""
    rows = []
    machine = Machine.published(cluster, num_ranks, contention or {})
    for name in schedules:
        layer = model_layer(model, cluster, batch=batch, num_ranks=num_ranks)
        layer, slices = prepare(name, layer, model.num_layers)
        times = cluster.shape[-1] if name == DS_MOE else 1  # the tokens that a rank gates are those that it dispatches
        gating = None if gate is None else Compute(times * gate.macs, gate.num_gemms)
        of_layer = [layer] * model.num_layers
        step = ModelStep(of_layer, SCHEDULES[name], slices, optimizer_s(model, cluster), gating)
        timeline = simulate(step.lay_out(), machine)
        rows.append(
            {
                "model": model.name,
                "schedule": name,
                "step_s": float(timeline.total_s),
                "degree_forward": slices.degree_forward,
                "degrees_backward": " ".join(map(str, sorted(set(slices.degree_backward.tolist())))),
                "in_moe_bytes": float(np.sum(slices.moe_bytes)),
                "beside_dense_bytes": float(np.sum(slices.dense_bytes)),
                "tail_bytes": float(slices.tail_bytes),
                "busy_s": {kind: float(seconds) for kind, seconds in timeline.busy_s().items() if kind not in UNPRICED},
            }
        )
    return rows


def expert_loads(num_nodes: int, num_layers: int, *, sigma: float, capacity: float, seed: int = 0) -> Array:
    """Share of its capacity that each node's expert fills in each layer, [num_layers, num_nodes] in 0 to 1: log-normal
    loads of mean 1, cut where the capacity factor drops tokens. ``sigma`` 0: all equal."""
    drawn = np.exp(sigma * np.random.default_rng(seed).standard_normal((num_layers, num_nodes)))
    return np.minimum(drawn / drawn.mean(1, keepdims=True), capacity) / capacity


def loaded(layer: Layers, loads: Array) -> Layers:
    """``layer`` on every rank of every node, with experts that compute only the slots that are filled: ``loads``
    [num_nodes] of the capacity. Empty slots still travel."""
    share = np.repeat(loads, layer.cluster.shape[-1])

    def filled(sizes: Sizes) -> Sizes:
        return dataclasses.replace(sizes, macs=sizes.macs * share)

    return dataclasses.replace(layer, forward=filled(layer.forward), backward=filled(layer.backward))


def many_ranks(model: Model, cluster: Cluster, name: str, loads: Array) -> tuple[Timeline, float]:
    """A step of ``model`` under the schedule ``name`` on all ranks of ``cluster``, with ``loads`` [num_layers,
    num_nodes]: the timeline [num_tasks, num_ranks], and the seconds that it took to plan and simulate."""
    began = time.perf_counter()
    layer, slices = prepare(name, model_layer(model, cluster), model.num_layers)
    of_layer = [loaded(layer, each) for each in loads]
    plan = ModelStep(of_layer, SCHEDULES[name], slices, optimizer_s(model, cluster)).lay_out()
    return simulate(plan, layer.machine(), Topology(cluster.shape)), time.perf_counter() - began


def busy_by_kind(layer: Layers) -> dict[str, dict[str, float]]:
    """Busy seconds by kind of task in one layer's forward and backward, nothing cut or overlapped."""
    way = Generalized(layer, POLICIES["no-overlap"], (1, 1), (None, None, reduction(layer.gradient_bytes)))
    busy = {each: simulate(plan_alone(way, each), layer.machine()).busy_s() for each in DIRECTIONS}
    return {each: {kind: float(seconds) for kind, seconds in found.items()} for each, found in busy.items()}
