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
from harness.plan.cost import Compute, Hold
from harness.plan.graph import COMPUTE, INTER, Plan, Timeline, Work
from harness.plan.machine import Contention, Machine
from harness.plan.passage import Dense
from harness.plan.simulate import simulate
from harness.specs import GEMMS, Cluster, Model
from harness.topology import Topology
from methods.fsmoe.costs import Array, attention_gradient_elements, reduce_costs
from methods.fsmoe.grid import ELEMENT_BYTES, Layers, layers
from methods.fsmoe.place import Slices, place
from methods.fsmoe.schedule import Priced, Sizes
from methods.fsmoe.step import LINA_CHUNK_BYTES, POLICIES, Policy, backward_layer, forward_layer, reduction

#: Interpretation, after a block that is commented out in the authors' driver: tokens are not split over the
#: model-parallel ranks before the dispatch, so that each of them sends all; experts are whole, not sharded in the node.
DS_MOE = "ds-moe"
SCHEDULES: dict[str, Policy] = {
    DS_MOE: Policy(
        "DeepSpeed-MoE as the paper seems to build it: one chunk, tokens sent N_MP times", False, "one", "after"
    ),
    **POLICIES,
}
OPTIMIZER_ACCESSES = 7  # Adam reads weight, gradient and two moments, writes all but the gradient


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
    kv_fraction = (model.num_kv_heads or model.num_heads) / model.num_heads
    attention = attention_gradient_elements(
        model.hidden, num_mp, biased=model.ffn_type == "gpt", kv_fraction=kv_fraction
    )
    experts = expert_parameters(model) / num_mp
    return float((attention + experts) * OPTIMIZER_ACCESSES * ELEMENT_BYTES / cluster.device_bytes_per_s)


def place_gradients(policy: Policy, layer: Layers, num_layers: int, *, chunk_bytes: float = LINA_CHUNK_BYTES) -> Slices:
    """What ``policy`` does with ``num_layers`` layers equal to ``layer``, at ideal lanes."""
    machine = Machine.published(layer.cluster, layer.num_ranks)
    dense_s = float(sum(np.asarray(machine.seconds(part.work.cost)) for part in layer.dense_backward))
    reduce = reduce_costs(layer.cluster, layer.num_ranks)
    gradient = [int(layer.gradient_bytes)] * num_layers
    costs = layer.costs
    return place(policy, costs, costs.backward(), reduce, gradient, dense_s, chunk_bytes=chunk_bytes)


def training_step(
    of_layer: Sequence[Layers],
    policy: Policy,
    slices: Slices,
    *,
    optimizer_s: float | None = None,
    plan: Plan | None = None,
) -> Plan:
    """A step of layers ``of_layer`` (forward order) as a plan; ``optimizer_s`` seconds a layer, if known."""
    plan = plan or Plan()
    done = forward(plan, of_layer, policy, slices)
    done = backward(plan, of_layer, policy, slices, after=done)
    finish(plan, slices, len(of_layer), optimizer_s, after=done)
    return plan


def forward(
    plan: Plan,
    of_layer: Sequence[Layers],
    policy: Policy,
    slices: Slices,
    *,
    prefix: str = "",
    after: Iterable[str] = (),
) -> list[str]:
    """Add the forward of all layers; returns the last tasks."""
    done = list(after)
    for i, layer in enumerate(of_layer):
        walk = Priced(layer.forward, slices.degree_forward)
        done = forward_layer(plan, policy, walk, layer.dense_forward, prefix=f"{prefix}layer{i}.", after=done)
    return done


def backward(
    plan: Plan,
    of_layer: Sequence[Layers],
    policy: Policy,
    slices: Slices,
    *,
    prefix: str = "",
    after: Iterable[str] = (),
    reduce: bool = True,
) -> list[str]:
    """Add the backward of all layers, with the slices of the gradient all-reduce if they are to ``reduce``."""
    done = list(after)
    for back, layer in enumerate(reversed(of_layer)):
        in_moe, beside, behind = slices.moe_bytes[back], slices.dense_bytes[back], slices.after_bytes[back]
        degree = int(slices.degree_backward[back]) if reduce else slices.degree_plain
        done = backward_layer(
            plan,
            policy,
            Priced(layer.backward, degree),
            layer.dense_backward,
            in_moe=reduction(in_moe, slices.moe_chunks[back]) if reduce and in_moe else None,
            beside_dense=reduction(beside, slices.dense_chunks[back]) if reduce and beside else None,
            after_layer=reduction(behind) if reduce and behind else None,
            prefix=f"{prefix}layer{len(of_layer) - 1 - back}.",
            after=done,
        )
    return done


def finish(
    plan: Plan,
    slices: Slices,
    num_layers: int,
    optimizer_s: float | None,
    *,
    prefix: str = "",
    after: Iterable[str] = (),
) -> None:
    """Add what comes after the backward: the rest of the reduction, and the optimizer."""
    tail = reduction(slices.tail_bytes, slices.tail_chunks)
    done = plan.add(f"{prefix}gradients-tail", INTER, after, tail.cost, kind="gradients")
    if optimizer_s is not None:
        plan.add(f"{prefix}optimizer", COMPUTE, [done], Hold(optimizer_s * num_layers))


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
        if gate is not None:  # the tokens that a rank gates are those that it dispatches
            times = cluster.shape[-1] if name == DS_MOE else 1
            layer = with_gate(layer, Gate(gate.num_gemms, times * gate.macs))
        plan = training_step(
            [layer] * model.num_layers, SCHEDULES[name], slices, optimizer_s=optimizer_s(model, cluster)
        )
        timeline = simulate(plan, machine)
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
                "busy_s": {kind: float(seconds) for kind, seconds in timeline.busy_s().items()},
            }
        )
    return rows


def with_gate(layer: Layers, gate: Gate) -> Layers:
    """``layer`` with a gate between attention and dispatch; backward, twice of it between combine and attention."""

    def task(times: int) -> Dense:
        return Dense("gate", COMPUTE, Work(Compute(times * gate.macs, times * gate.num_gemms)))

    return dataclasses.replace(
        layer, dense_forward=[*layer.dense_forward, task(1)], dense_backward=[task(2), *layer.dense_backward]
    )


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
    plan = training_step(
        [loaded(layer, each) for each in loads], SCHEDULES[name], slices, optimizer_s=optimizer_s(model, cluster)
    )
    return simulate(plan, Machine.published(cluster), Topology(cluster.shape)), time.perf_counter() - began


def busy_by_kind(layer: Layers) -> dict[str, dict[str, float]]:
    """Busy seconds by kind of task in one layer's forward and backward, nothing cut or overlapped."""
    policy = POLICIES["no-overlap"]
    machine = Machine.published(layer.cluster, layer.num_ranks)
    ahead, back = Plan(), Plan()
    forward_layer(ahead, policy, Priced(layer.forward, 1), layer.dense_forward)
    after = reduction(layer.gradient_bytes)
    backward_layer(back, policy, Priced(layer.backward, 1), layer.dense_backward, after_layer=after)
    plans = {"forward": ahead, "backward": back}
    return {
        phase: {kind: float(seconds) for kind, seconds in simulate(plan, machine).busy_s().items()}
        for phase, plan in plans.items()
    }
