"""Exact bytes per link level, from who sends how much to whom (pure numpy)."""

from __future__ import annotations

import numpy as np

from harness.topology import Topology

#: parts of ``System.planned_bytes`` that belong to a direction
PARTS = {
    "forward": ("gather", "metadata", "dispatch", "combine"),
    "backward": ("regather", "combine_grad", "dispatch_grad", "metadata_grad", "reduce", "gradients"),
}


def direction_bytes(parts: dict[str, np.ndarray], direction: str) -> np.ndarray:
    """Bytes [num_ranks, num_ranks] from -> to of one direction: ``forward``, ``backward`` or ``total``."""
    wanted = PARTS["forward"] + PARTS["backward"] if direction == "total" else PARTS[direction]
    return sum((parts[name] for name in wanted if name in parts), np.zeros_like(next(iter(parts.values()))))


def crossing(matrix: np.ndarray, topology: Topology) -> np.ndarray:
    """Bytes between ranks whose first differing coordinate is each level, float64 [num_levels]."""
    level = topology.level_between
    return np.array([matrix[level == i].sum() for i in range(topology.num_levels)])


def port_load(matrix: np.ndarray, topology: Topology, level: int) -> np.ndarray:
    """Bytes through every unit's port at ``level``, the larger of out and in (full duplex), float64 [num_units].

    A port carries whatever leaves its unit, so traffic that crosses an outer level passes here too."""
    unit = topology.unit_of(level)
    num_units = topology.num_units(level)
    load = np.zeros((num_units, num_units))
    np.add.at(load, (unit[:, None].repeat(len(unit), 1), unit[None, :].repeat(len(unit), 0)), matrix)
    np.fill_diagonal(load, 0)
    return np.maximum(load.sum(1), load.sum(0))
