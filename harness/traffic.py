"""Exact bytes per link level, from who sends how much to whom (pure numpy)."""

from __future__ import annotations

from collections.abc import Sequence

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


def port_load(matrix: np.ndarray, topology: Topology, level: int, ports: int = 1) -> np.ndarray:
    """Bytes through every unit's port at ``level``, the larger of out and in (full duplex), [.., num_units x ports], of
    ``matrix`` [.., W, W]. ``ports``: of a unit, each of as many neighbouring ranks.

    A port carries whatever leaves its unit, so traffic that crosses an outer level passes here too."""
    units = topology.num_units(level)
    between = _between(matrix, units * ports)  # from port to port
    if ports == 1:
        kept = np.diagonal(between, axis1=-2, axis2=-1)
        return np.maximum(between.sum(-1) - kept, between.sum(-2) - kept)
    own = blocks_of(between, units)  # [.., units, ports, ports]
    out = between.sum(-1) - own.sum(-1).reshape(between.shape[:-1])
    into = between.sum(-2) - own.sum(-2).reshape(between.shape[:-1])
    return np.maximum(out, into)


def unequal_load(matrix: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The same where ``sizes[p]`` neighbouring ranks are behind port p, [.., ports]."""
    first = (np.cumsum(sizes) - sizes).tolist()
    between = np.add.reduceat(np.add.reduceat(matrix, first, -1), first, -2)
    kept = np.diagonal(between, axis1=-2, axis2=-1)
    return np.maximum(between.sum(-1) - kept, between.sum(-2) - kept)


def inside_load(matrix: np.ndarray, topology: Topology, level: int = 0) -> np.ndarray:
    """Bytes that the ranks of each unit of ``level`` send each other, [.., units], of ``matrix`` [.., W, W]."""
    own = blocks_of(matrix, topology.num_units(level))
    return own.sum((-1, -2)) - np.trace(own, axis1=-2, axis2=-1)


def blocks_of(matrix: np.ndarray, parts: int) -> np.ndarray:
    """[.., W, W] -> [.., parts, W / parts, W / parts]: blocks on the diagonal."""
    size, part = matrix.shape[-1] // parts, np.arange(parts)
    blocks = matrix.reshape(*matrix.shape[:-2], parts, size, parts, size)
    return np.moveaxis(blocks[..., part, :, part, :], 0, -3)


def _between(matrix: np.ndarray, parts: int) -> np.ndarray:
    """[.., W, W] -> [.., parts, parts]: neighbouring ranks together."""
    size = matrix.shape[-1] // parts
    if matrix.dtype.kind != "f":
        matrix = matrix.astype(np.float64)
    return matrix.reshape(*matrix.shape[:-2], parts, size, parts, size).sum((-3, -1)) if size > 1 else matrix
