"""What HierD-AlltoAll will send, from the routing alone (pure numpy)."""

from __future__ import annotations

import dataclasses

import numpy as np

from harness.placement import Placement
from harness.routing.types import Routing
from harness.topology import Topology
from methods.hiermoe.counts import Array, Stage, count, stages


@dataclasses.dataclass(frozen=True)
class Wire:
    """How an exchange sends. ``row_bytes``: of a token; ``weight_bytes``: of a gate weight;"""

    row_bytes: float
    weight_bytes: int
    num_chunks: int = 4
    deduplicate: bool = True
    padded: bool = False


def hier_bytes(
    routing: Routing, placement: Placement, topology: Topology, dimension: int, wire: Wire, *, chosen: bool = False
) -> dict[str, Array]:
    """Planned bytes [num_ranks, num_ranks] from -> to, by part (see ``System.planned_bytes``), O(D T k). ``chosen``:
    the ranks told each other their counts to choose the dimension."""
    num_ranks = topology.num_ranks
    counts = count(routing, placement.owner, topology)
    metadata, entries, rows, payload = (np.zeros((num_ranks, num_ranks)) for _ in range(4))
    if chosen:
        metadata += 4.0 * sum(topology.num_units(level) for level in range(topology.num_levels))
    for stage in stages(dimension, topology.num_levels):
        peers = _peers(topology, stage)
        sent = counts.rows(stage, deduplicated=False)
        experts_of_unit = np.bincount(topology.unit_of(stage.b - 1)[placement.owner])
        width = np.where(experts_of_unit[topology.unit_of(stage.b - 1)] <= 256, 1.0, 2.0)  # per receiving rank
        there = counts.rows(stage, deduplicated=wire.deduplicate)
        metadata += peers * 4.0 * (wire.num_chunks + 1) + there + sent * (width + wire.weight_bytes)
        entries += sent
        rows += there
        payload += peers * _longest(routing, placement, topology, stage, wire) if wire.padded else there
    parts = {
        "metadata": metadata,
        "dispatch": payload * wire.row_bytes,
        "combine": payload.T * wire.row_bytes,
        "combine_grad": payload * wire.row_bytes,
        "dispatch_grad": payload.T * wire.row_bytes,
        "metadata_grad": entries.T * wire.weight_bytes,
    }
    for matrix in parts.values():
        np.fill_diagonal(matrix, 0)
    return parts


def _peers(topology: Topology, stage: Stage) -> Array:
    """1 between ranks of one all-to-all of the stage, [num_ranks, num_ranks]."""
    outside = np.delete(topology.coordinates, np.s_[stage.a : stage.b], axis=1)
    return (outside[:, None] == outside[None]).all(-1).astype(np.float64)


def _longest(routing: Routing, placement: Placement, topology: Topology, stage: Stage, wire: Wire) -> int:
    """Rows of a padded message of the stage, summed over chunks."""
    total = 0
    for chunk in range(wire.num_chunks):
        kept, tokens = [], []
        for rank, length in enumerate(routing.tokens):
            first, last = (length * c // wire.num_chunks for c in (chunk, chunk + 1))
            kept.append(routing.of_rank(rank)[first:last])
            tokens.append(last - first)
        part = Routing(np.concatenate(kept), tuple(tokens), routing.num_experts)
        rows = count(part, placement.owner, topology).rows(stage, deduplicated=wire.deduplicate)
        total += int(rows.max(initial=0))
    return total
