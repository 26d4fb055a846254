"""What HierD-AlltoAll will send, from the routing alone (pure numpy)."""

from __future__ import annotations

import numpy as np

from harness.placement import Placement
from harness.routing.types import Routing
from harness.topology import Topology


def hier_bytes(
    routing: Routing,
    placement: Placement,
    topology: Topology,
    row_bytes: int,
    weight_bytes: int,
    levels: tuple[int, ...] = (0,),
    num_chunks: int = 4,
) -> dict[str, np.ndarray]:
    """Planned bytes [num_ranks, num_ranks] from -> to, by part (see ``System.planned_bytes``), O(D T k log)."""
    num_ranks = topology.num_ranks
    owner = placement.owner[routing.ids]  # [T, k]
    token = np.broadcast_to(np.arange(len(owner))[:, None], owner.shape)
    holder = np.broadcast_to(routing.source[:, None], owner.shape)
    rows = np.zeros((num_ranks, num_ranks))
    entries, tables, index_bytes = np.zeros_like(rows), np.zeros_like(rows), np.zeros_like(rows)
    coordinates = topology.coordinates
    for level in (*levels, None):
        if level is None:
            unit_level, target = topology.num_levels - 1, owner
        else:
            unit_level = level
            place = coordinates[holder].copy()
            place[..., level] = coordinates[owner][..., level]
            target = np.ravel_multi_index(np.moveaxis(place, -1, 0), topology.shape)
        for rank in range(num_ranks):
            peers = topology.rail(rank, level) if level is not None else topology.inner_group(rank, levels[-1])
            tables[rank, peers] += 4.0 * (num_chunks + 1)
        experts_of_unit = np.bincount(topology.unit_of(unit_level)[placement.owner])
        width = np.where(experts_of_unit[topology.unit_of(unit_level)] <= 256, 1.0, 2.0)  # per receiving rank
        sent = np.zeros_like(rows)
        np.add.at(sent, (holder.ravel(), target.ravel()), 1.0)
        entries += sent
        index_bytes += sent * width[None, :]
        _, first = np.unique(token.ravel() * num_ranks + target.ravel(), return_index=True)
        np.add.at(rows, (holder.ravel()[first], target.ravel()[first]), 1.0)
        holder = target
    parts = {
        "metadata": tables + rows + index_bytes + entries * weight_bytes,
        "dispatch": rows * row_bytes,
        "combine": rows.T * row_bytes,
        "combine_grad": rows * row_bytes,
        "dispatch_grad": rows.T * row_bytes,
        "metadata_grad": entries.T * weight_bytes,
    }
    for matrix in parts.values():
        np.fill_diagonal(matrix, 0)
    return parts
