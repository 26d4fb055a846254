"""Time of a training step with Hecate and its rivals on a published cluster, from shapes, rates and loads.

Of every layer and step: attention, two all-to-alls and experts forward, the same backward (twice the computation),
and what a system adds: gathers and reductions of experts, as much of them as the attention beside does not hide, and
moves of experts at the boundaries between steps.

    all-to-all      what the busiest port carries, of a node or of a GPU, over its rate; tokens go to the nearest copy
    gather, reduce  an expert crosses a node's port once and then spreads inside, as broadcasts and reductions in a
                    chain do: the experts that come to the busiest node over its rate (lambda S / bw of the paper)
    experts         FLOPs of the busiest rank at a stated share of the device's rate

Everything is an array over steps and layers. Interpretations: rates are the data sheets', without start-up times
(``start_s`` adds one to every message); ``bw`` of the paper is the node's port, through which all GPUs of a node go;
the optimizer's own time is left out.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from harness.layer.work import attention_macs, expert_macs, expert_parameters, head_macs
from harness.plan.cost import Compute, Even
from harness.plan.links import Ports
from harness.plan.machine import Machine
from harness.specs import Cluster, Model
from harness.topology import Topology
from methods.hecate.memory_model import ACTIVATION, OPTIMIZER, PARAMETER, Copies, dense_parameters

Array = np.ndarray
#: of what a device can do, that computation reaches; no paper states it
EFFICIENCY = 0.4
PARTS = ("attention", "all-to-all", "experts", "fused", "gather", "reduce", "move")


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model on a cluster, ``samples`` sequences a rank. ``bw_ranks``: GPUs that share the paper's bw, where t is
    computed (1: it is the node's port, 8: each GPU has its part)."""

    model: Model
    cluster: Cluster
    samples: float
    efficiency: float = EFFICIENCY
    start_s: float = 0.0
    bw_ranks: int = 1

    @property
    def tokens(self) -> int:
        return int(self.samples * self.model.seq)

    @property
    def topology(self) -> Topology:
        return Topology(self.cluster.shape)

    @functools.cached_property
    def machine(self) -> Machine:
        return Machine.data_sheet(self.cluster, self.efficiency, self.start_s)

    @property
    def links(self) -> Ports:
        assert isinstance(self.machine.links, Ports)
        return self.machine.links

    def compute_s(self, macs: float) -> float:
        return float(self.machine.seconds(Compute(macs)))

    @property
    def num_nodes(self) -> int:
        return self.cluster.shape[0]

    @property
    def node_bytes_per_s(self) -> float:
        rate = self.cluster.levels[0].unit_bytes_per_s
        assert rate is not None
        return rate

    @property
    def gpu_bytes_per_s(self) -> float:
        rate = self.cluster.levels[-1].bandwidth_bytes_per_s
        assert rate is not None
        return rate

    @property
    def flops_per_s(self) -> float:
        assert self.cluster.device_flops_per_s is not None
        return self.efficiency * self.cluster.device_flops_per_s

    @property
    def expert_bytes(self) -> int:
        return PARAMETER * expert_parameters(self.model)

    @property
    def move_bytes(self) -> int:
        """Of an expert that goes elsewhere with its optimizer state."""
        return (PARAMETER + OPTIMIZER) * expert_parameters(self.model)

    @property
    def row_bytes(self) -> int:
        return ACTIVATION * self.model.hidden

    @property
    def attention_s(self) -> float:
        """T_non-MoE, forward: projections and scores."""
        return self.compute_s(attention_macs(self.model.hidden, self.tokens, self.model.seq, causal=False))

    @property
    def assignment_s(self) -> float:
        """Of one token through one expert, forward."""
        return self.compute_s(expert_macs(self.model))

    @property
    def rest_s(self) -> float:
        """What a step has beside its layers: the head, and the all-reduce of replicated gradients."""
        head = self.compute_s(3 * self.tokens * head_macs(self.model))
        gradients = Even("ar", "flat", PARAMETER * dense_parameters(self.model), messages=0)
        return head + float(self.links.seconds(gradients))

    @property
    def overlap_degree(self) -> int:
        """t = T_non-MoE bw / expert_size."""
        return int(self.attention_s * self.node_bytes_per_s / self.bw_ranks / self.expert_bytes)


# ------------------------------------------------------------------------------------------------ what things take


def arrivals(loads: Array, hosts: Array, num_nodes: int) -> Array:
    """Rows from rank to rank [..., W, W] (the diagonal: those that stay) of ``loads`` [..., W, E] under ``hosts``
    [..., E, W]: to the rank itself, else evenly to the holders in its node, else evenly to all holders."""
    hosts = hosts.astype(np.float32)
    num_ranks = hosts.shape[-1]
    node = np.arange(num_ranks) // (num_ranks // num_nodes)
    in_node = hosts.reshape(*hosts.shape[:-1], num_nodes, -1).sum(-1)  # [..., E, nodes]
    local = np.swapaxes(hosts, -1, -2)  # [..., W, E]
    near = np.swapaxes(in_node, -1, -2)[..., node, :]
    copies = hosts.sum(-1)[..., None, :]
    staying = loads * local
    travelling = loads - staying
    close = np.divide(travelling, near, out=np.zeros_like(travelling), where=near > 0)
    far = np.divide(travelling, copies, out=np.zeros_like(travelling), where=near == 0)
    rows = (close @ hosts) * (node[:, None] == node) + far @ hosts
    rank = np.arange(num_ranks)
    rows[..., rank, rank] = staying.sum(-1)
    return rows


def exchange_s(setup: Setup, rows: Array) -> Array:
    """One all-to-all of ``rows`` [..., W, W]."""
    return setup.start_s + setup.links.of(rows) * setup.row_bytes


def experts_s(setup: Setup, rows: Array) -> Array:
    """Forward, of the busiest rank."""
    return rows.sum(-2).max(-1) * setup.assignment_s


def sparse_s(setup: Setup, owners: Array, hosts: Array) -> Array:
    """spAG(P, P'), or spRS(P', P): seconds [...]; ``owners`` and ``hosts`` bool [..., E, W]."""
    nodes = (setup.num_nodes, hosts.shape[-1] // setup.num_nodes)
    at = hosts.reshape(*hosts.shape[:-1], *nodes).any(-1)  # [..., E, nodes]
    home = owners.reshape(*owners.shape[:-1], *nodes).any(-1)
    coming = (at & ~home).sum(-2).max(-1)
    going = (home & (at.sum(-1, keepdims=True) > 1)).sum(-2).max(-1)
    inside = (hosts & ~owners).sum(-2).max(-1)
    num_messages = (hosts.sum(-1) > 1).sum(-1)
    wire = np.maximum(np.maximum(coming, going) / setup.node_bytes_per_s, inside / setup.gpu_bytes_per_s)
    return wire * setup.expert_bytes + num_messages * setup.start_s


def all_reduce_s(setup: Setup, hosts: Array) -> Array:
    """Gradients of all copies summed on all of them: a reduction and a broadcast, 2 (n - 1) / n of an expert each."""
    hosts = hosts.astype(bool)
    at = hosts.reshape(*hosts.shape[:-1], setup.num_nodes, -1).any(-1)
    num_nodes, copies = at.sum(-1, keepdims=True), hosts.sum(-1, keepdims=True)
    between = (at * 2 * (num_nodes - 1) / num_nodes).sum(-2).max(-1) / setup.node_bytes_per_s
    inside = (hosts * 2 * (copies - 1) / copies).sum(-2).max(-1) / setup.gpu_bytes_per_s
    return np.maximum(between, inside) * setup.expert_bytes + (copies[..., 0] > 1).sum(-1) * setup.start_s


def move_s(setup: Setup, before: Array, after: Array) -> Array:
    """Experts with their optimizer state to where ``after`` [..., E, W] has them and ``before`` has not."""
    new = after & ~before
    num_copies = np.maximum(before.sum(-1, keepdims=True), 1)
    source = (before / num_copies).astype(np.float32)  # any of the holders
    rows = np.swapaxes(source, -1, -2) @ new.astype(np.float32)
    return setup.links.of(rows) * setup.move_bytes + new.any((-1, -2)) * setup.start_s


# ------------------------------------------------------------------------------------------------------- the result


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """Seconds [steps, layers] on the critical path, by part (``fused``: all-to-alls, experts and shadows in one
    schedule). ``collectives``: of gathers and reductions, hidden or not. ``busiest``: most assignments that a rank
    computes in a step over the mean, all layers together. ``copies``: the experts on the rank that has most."""

    parts: dict[str, Array]
    collectives: Array
    busiest: float
    copies: Copies

    @property
    def layers_s(self) -> Array:
        """Of every layer [layers], mean over steps, moves with it."""
        return np.asarray(sum(part.mean(0) for part in self.parts.values()))

    @property
    def moe_s(self) -> Array:
        """Of every layer without its attention [layers]."""
        return np.asarray(self.layers_s - self.parts["attention"].mean(0))

    def step_s(self, setup: Setup) -> float:
        """Mean over steps, of as many layers as the model has."""
        return float(self.layers_s.mean() * setup.model.num_layers + setup.rest_s)

    def seconds(self) -> dict[str, float]:
        """Of every part, mean over steps and layers."""
        return {name: float(part.mean()) for name, part in self.parts.items()}


def result(
    setup: Setup,
    rows: Array,
    copies: Copies,
    *,
    fused: Array | None = None,
    gather: Array | float = 0.0,
    reduce: Array | float = 0.0,
    move: Array | float = 0.0,
    collectives: Array | float = 0.0,
) -> Result:
    """Of ``rows`` [steps, layers, W, W] as they travel; ``gather``, ``reduce`` and ``move``: exposed seconds.
    ``fused``: instead of plain all-to-alls and experts."""
    shape = rows.shape[:2]
    parts = {
        "attention": 3 * setup.attention_s,
        "all-to-all": 4 * exchange_s(setup, rows) if fused is None else 0.0,
        "experts": 3 * experts_s(setup, rows) if fused is None else 0.0,
        "fused": 0.0 if fused is None else fused,
        "gather": gather,
        "reduce": reduce,
        "move": move,
    }
    received = rows.sum(-2).sum(1)  # [steps, W]
    return Result(
        {name: np.broadcast_to(np.asarray(part, dtype=np.float64), shape) for name, part in parts.items()},
        np.broadcast_to(np.asarray(collectives, dtype=np.float64), shape),
        float((received.max(-1) / received.mean(-1)).max()),
        copies,
    )
