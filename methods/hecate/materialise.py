"""Algorithm 1: which experts are materialised where, for one layer and one iteration (Hecate, arXiv 2502.02581).

t is the overlap degree: how many experts can be gathered while the attention before the layer computes. m is the
memory capacity: how many copies fit on a device. With m >= t the t most loaded experts go to all devices. Else each
device has m slots, and the most loaded experts get replicas by load, nodes that do not hold them first.

Interpretations: of ``assignSlotsByLoad`` the paper gives the name alone. Here the slots are dealt out one by one,
each to the expert with the most load for each of its holders (d'Hondt's rule: by load, and the busiest holder has
least). Within a node a replica goes to the device with the most free slots. Slots hold copies, not a device's own
experts. Experts that no token is expected for are not copied. Of equal loads the first expert by index, of equal
nodes and devices the first.
"""

from __future__ import annotations

import numpy as np

from harness.topology import Topology


def materialise(owner: np.ndarray, load: np.ndarray, t: int, m: int, topology: Topology) -> np.ndarray:
    """P' from P: ``owner`` int [E], ``load`` [E] (F), t >= 0, m >= 0 -> bool [E, num_ranks]."""
    num_experts, num_ranks = len(owner), topology.num_ranks
    t = min(t, num_experts)
    m = min(m, t)
    hosts = owner[:, None] == np.arange(num_ranks)
    top = np.argsort(-load, kind="stable")[:t]
    top = top[load[top] > 0]
    if t <= m:
        hosts[top] = True
        return hosts
    from methods.hecate import kernels  # numba takes its time to import

    kernels.spread(hosts, top, assign_slots_by_load(load[top], num_ranks * m, num_ranks - 1), m, topology.shape[0])
    return hosts


def assign_slots_by_load(load: np.ndarray, num_slots: int, most: int) -> np.ndarray:
    """Replicas of experts with ``load`` [n] > 0, at most ``most`` each and ``num_slots`` together, int [n]."""
    wanted = min(num_slots, most * len(load))
    if not wanted:
        return np.zeros(len(load), dtype=np.int64)
    per_holder = load[:, None] / np.arange(1, most + 1)  # before the first, second, ... replica is there
    least = np.partition(per_holder, per_holder.size - wanted, axis=None)[per_holder.size - wanted]
    found, equal = (per_holder > least).sum(1), (per_holder == least).sum(1)
    left = wanted - found.sum() - (np.cumsum(equal) - equal)
    return found + np.clip(left, 0, equal)
