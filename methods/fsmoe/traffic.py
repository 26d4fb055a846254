"""Planned bytes of the sharded layer: who sends how much to whom."""

from __future__ import annotations

import numpy as np

from harness.routing.types import Routing
from harness.specs import DTYPE_BYTES
from harness.system import Case
from methods.fsmoe.cut import padded_capacity, sharded
from methods.fsmoe.layer import Cut


def sharded_bytes(case: Case, routing: Routing, cut: Cut) -> dict[str, np.ndarray]:
    """Payload bytes [num_ranks, num_ranks] by part (``System.planned_bytes``).

    Sharded experts: every rank sends each node the slots of its experts, to the rank there with its own local index; an
    all-gather gives every other rank of a node all that this one received, a reduce-scatter as much back. Whole ones:
    by the all-to-all's algorithm. The gradient all-reduce between nodes is a ring: each rank sends its buffer
    2 (nodes - 1) / nodes times to the next."""
    topology = case.topology
    nodes, num_ranks = topology.shape[0], topology.num_ranks
    num_local = num_ranks // nodes
    capacity = padded_capacity(case, routing, cut)
    slot_bytes = float(case.model.num_experts * capacity * case.model.hidden * DTYPE_BYTES[case.dtype])
    node, place = topology.unit_of(0), np.arange(num_ranks) % num_local
    inside = (node[:, None] == node) & (place[:, None] != place)
    rails = (place[:, None] == place) & (node[:, None] != node)
    algorithm = case.options.get("all_to_all", "flat")
    if sharded(case):
        walk = rails * (slot_bytes / nodes) + inside * slot_bytes
    elif algorithm == "2dh":
        walk = inside * (slot_bytes / num_local) + rails * (slot_bytes / nodes)
    elif algorithm == "1dh" and num_local > 1:
        leads = place == 0
        walk = (
            inside * (leads[:, None] ^ leads) * slot_bytes
            + rails * (leads[:, None] & leads) * slot_bytes * num_local / nodes
        )
    else:
        walk = (1 - np.eye(num_ranks)) * (slot_bytes / num_ranks)
    following = rails & ((node[:, None] + 1) % nodes == node)
    gradients = following * (sum(cut.reduced_bytes) * 2 * (nodes - 1) / nodes)
    return {"dispatch": walk, "combine": walk, "combine_grad": walk, "dispatch_grad": walk, "gradients": gradients}
