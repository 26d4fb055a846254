"""Planned bytes of FSMoE's layer: who sends how much to whom."""

from __future__ import annotations

import numpy as np

from harness.plan.cost import Cost, Even, InTurn, Transfer
from harness.system import Case
from harness.topology import Topology
from methods.fsmoe.cut import Cut, LayerSizes
from methods.fsmoe.schedule import Priced


def planned(case: Case, sizes: LayerSizes, cut: Cut) -> dict[str, np.ndarray]:
    """Payload bytes [num_ranks, num_ranks] by part (``System.planned_bytes``), of what the layer's tasks cost.

    The gradient all-reduce between nodes is a ring: each rank sends its buffer 2 (nodes - 1) / nodes times to the
    next."""
    topology, walk = case.topology, Priced(sizes.forward, 1)
    nodes, ranks = topology.shape[0], np.arange(topology.num_ranks)
    there = _sent(walk.dispatch(0).cost, topology) + _sent(walk.gather(0).cost, topology)
    home = _sent(walk.scatter(0).cost, topology) + _sent(walk.combine(0).cost, topology)
    following = np.roll(ranks, -topology.num_ranks // nodes)
    gradients = np.zeros_like(there)
    if nodes > 1:
        gradients[ranks, following] = sum(cut.reduced_bytes) * 2 * (nodes - 1) / nodes
    return {"dispatch": there, "combine": home, "combine_grad": there, "dispatch_grad": home, "gradients": gradients}


def _sent(cost: Cost | None, topology: Topology) -> np.ndarray:
    """Of collectives in which every rank has something of equal size for, or of, every other of its group."""
    num_ranks, nodes = topology.num_ranks, topology.shape[0]
    match cost:
        case None:
            return np.zeros((num_ranks, num_ranks))
        case InTurn():
            return np.sum([_sent(part, topology) for part in cost.parts], axis=0)
        case Transfer():
            return cost.matrix
    assert isinstance(cost, Even), cost
    node, place = np.divmod(np.arange(num_ranks), num_ranks // nodes)
    alike = {"inter": place, "intra": node, "flat": np.zeros(num_ranks)}[cost.scope]
    group = alike[:, None] == alike
    return (group & ~np.eye(num_ranks, dtype=bool)) * (cost.num_bytes / group.sum(1))
