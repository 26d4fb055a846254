"""Planned bytes of the sharded layer: who sends how much to whom."""

from __future__ import annotations

import numpy as np

from harness.routing.types import Routing
from harness.specs import DTYPE_BYTES
from harness.system import Case
from methods.fsmoe.cut import padded_capacity
from methods.fsmoe.layer import Cut


def sharded_bytes(case: Case, routing: Routing, cut: Cut) -> dict[str, np.ndarray]:
    """Payload bytes [num_ranks, num_ranks] by part (``System.planned_bytes``).

    Every rank sends each node the slots of its experts, to the rank there with its own local index; an all-gather gives
    every other rank of a node all that this one received, a reduce-scatter as much back. The gradient all-reduce
    between nodes is a ring: each rank sends its buffer 2 (nodes - 1) / nodes times to the next."""
    topology = case.topology
    nodes, num_ranks = topology.shape[0], topology.num_ranks
    capacity = padded_capacity(case, routing, cut)
    slot_bytes = case.model.num_experts * capacity * case.model.hidden * DTYPE_BYTES[case.dtype]
    unit, place = topology.unit_of(0), np.arange(num_ranks) % (num_ranks // nodes)
    across = (place[:, None] == place) & (unit[:, None] != unit)
    inside = (unit[:, None] == unit) & (place[:, None] != place)
    walk = across * (slot_bytes / nodes) + inside * float(slot_bytes)
    following = across & ((unit[:, None] + 1) % nodes == unit)
    gradients = following * (sum(cut.reduced_bytes) * 2 * (nodes - 1) / nodes)
    return {
        "dispatch": walk,
        "combine": walk,
        "combine_grad": walk,
        "dispatch_grad": walk,
        "gradients": gradients,
    }
