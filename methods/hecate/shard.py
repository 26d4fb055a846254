"""Algorithm 2: heterogeneous sharding, who owns what over all layers together (Hecate, arXiv 2502.02581).

The t most loaded experts of a layer will be everywhere anyhow, so their owners do not matter. The others are spread
so that each layer's tokens are even over nodes, then over devices, wherever slots are free: a device may own any
number of a layer's experts, but over all layers as many as every other.

Interpretations: loads are those of one layer, beginning at zero with every layer. Nodes and devices without a free
slot are not asked. Of equals the first by index. The slots that remain go to the most loaded experts "arbitrarily":
to their present owner if it has one, else to the device with the most, so that little moves.
"""

from __future__ import annotations

import numpy as np

from harness.errors import bad
from harness.topology import Topology


def shard(loads: np.ndarray, t: int, topology: Topology, owner: np.ndarray) -> np.ndarray:
    """P^g: ``loads`` [L, E] (F^g), present ``owner`` int [L, E] -> owners int [L, E]."""
    num_ranks = topology.num_ranks
    if loads.size % num_ranks:
        raise bad("num_layers x num_experts", loads.size, f"does not divide over {num_ranks} ranks")
    order = np.argsort(-loads, axis=1, kind="stable")
    underloaded = np.ones(loads.shape, dtype=bool)
    np.put_along_axis(underloaded, order[:, : min(t, loads.shape[1])], False, axis=1)
    slots = np.full(num_ranks, loads.size // num_ranks)
    heaviest = np.where(underloaded, loads, -1.0).max(1)
    found = np.full(loads.shape, -1)
    from methods.hecate import kernels  # numba takes its time to import

    layers = np.argsort(-heaviest, kind="stable")
    kernels.place(found, loads.astype(np.float64), layers, order, underloaded, slots, topology.shape[0])
    for layer, expert in zip(*np.nonzero(~underloaded), strict=True):
        present = int(owner[layer, expert])
        rank = present if slots[present] else int(slots.argmax())
        found[layer, expert] = rank
        slots[rank] -= 1
    return found
