"""A replication planner of the kind that serves large MoE models today (DeepSeek's EPLB): popular experts get copies.

Idea, not code, of the public load balancer: (1) experts, in groups, are packed onto nodes, as many on each; (2) inside
a node the free slots go, one by one, to the expert with the most load per copy; (3) copies are packed onto the node's
ranks, heaviest first, each to the rank with the least load. Where nodes do not divide the groups, the whole cluster is
one node. Interpretations: a group is a single expert unless said otherwise; a rank takes a second copy of an expert
only if no other rank of the node has a free slot; in training every copy is a full one, with gradient and optimizer
state.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from baselines.flexmoe import hosts_of
from harness.errors import bad
from harness.placement import Placement
from harness.plan.copied import CopiedSystem, num_slots
from harness.plan.following import Planner
from harness.system import Case

EVERY = 25  # steps between placements in training; the public planner leaves it to its caller


def balance(
    load: np.ndarray, num_nodes: int, ranks_per_node: int, num_slots: int, num_groups: int | None = None
) -> np.ndarray:
    """Experts of every slot, int [num_nodes * ranks_per_node, num_slots], for ``load`` [E] and ``num_slots`` on a rank.

    Two nodes of two ranks with two slots each; expert 0 has half of all tokens. Experts 0 and 4 and 5 make one node, 1,
    2 and 3 the other; each has one slot more than experts, which goes to its most loaded one:

    >>> balance(np.array([10, 3, 3, 2, 1, 1]), num_nodes=2, ranks_per_node=2, num_slots=2).tolist()
    [[0, 4], [0, 5], [2, 1], [3, 1]]

    Errors: slots that cannot hold every expert once.
    """
    num_experts = len(load)
    groups = num_experts if num_groups is None else num_groups
    if num_experts % groups:
        raise bad("num_groups", groups, f"must divide the {num_experts} experts")
    if groups % num_nodes:
        groups, num_nodes, ranks_per_node = 1, 1, num_nodes * ranks_per_node
    per_node = num_slots * ranks_per_node
    if per_node < num_experts // num_nodes:
        need = -(-num_experts // (num_nodes * ranks_per_node))
        raise bad("slots", num_slots, f"{num_experts} experts need at least {need} slots on every rank")
    load = np.asarray(load, dtype=np.float64)
    by_group = load.reshape(groups, -1).sum(1)
    node_of = np.repeat(pack(by_group, np.arange(groups), num_nodes, groups // num_nodes), num_experts // groups)
    slots = np.empty((num_nodes, ranks_per_node, num_slots), dtype=np.int64)
    for node in range(num_nodes):
        experts = np.flatnonzero(node_of == node)
        num_copies = copies(load[experts], per_node)
        items = np.repeat(np.arange(len(experts)), num_copies)
        rank = pack((load[experts] / num_copies)[items], items, ranks_per_node, num_slots)
        order = np.lexsort((items, -(load[experts] / num_copies)[items], rank))
        slots[node] = experts[items[order]].reshape(ranks_per_node, num_slots)
    return slots.reshape(-1, num_slots)


def copies(load: np.ndarray, num_slots: int) -> np.ndarray:
    """How many of ``num_slots`` each expert gets, int [E]: one, and every further slot goes to the expert with the most
    load per copy so far. (That is the method of D'Hondt, so the slots go to the largest load / j, j = 1, 2, ...)

    >>> copies(np.array([10, 3, 2]), 6).tolist()
    [4, 1, 1]
    """
    more = num_slots - len(load)
    if more < 0:
        raise bad("slots", num_slots, f"are fewer than the {len(load)} experts")
    quotients = np.asarray(load, dtype=np.float64)[:, None] / np.arange(1, more + 1)
    chosen = np.argsort(-quotients.ravel(), kind="stable")[:more]
    return 1 + np.bincount(chosen // max(more, 1), minlength=len(load))


def pack(weight: np.ndarray, kind: np.ndarray, num_packs: int, size: int) -> np.ndarray:
    """Pack of every item, int [n]: heaviest first to the pack with the least weight that has room for one of ``size``;
    items of one ``kind`` [n] to different packs where that is possible."""
    from baselines.kernels import replication  # numba takes its time to import

    order = np.argsort(-weight, kind="stable")
    room = np.full(num_packs, size, dtype=np.int64)
    held = np.zeros((int(kind.max(initial=-1)) + 1, num_packs), dtype=bool)
    return replication.pack(
        order, np.asarray(weight, dtype=np.float64), room, held, np.zeros(num_packs), kind.astype(np.int64)
    )


class EPLB(CopiedSystem):
    name = "eplb"
    title = "copies of popular experts as an EPLB-like planner places them"
    source = "the idea of DeepSeek's public expert-parallel load balancer, in training"
    every = EVERY
    preload = ("harness.compiled",)
    recipe: ClassVar[dict[str, str]] = {"state": "eplb"}

    @classmethod
    def planner(cls, case: Case) -> Planner:
        num_nodes, wide = case.topology.shape[0], num_slots(case)

        def plan(load: np.ndarray, placement: Placement) -> Placement:
            hosts = hosts_of(balance(load, num_nodes, case.topology.num_ranks // num_nodes, wide), len(load))
            same = np.array_equal(hosts, placement.hosts)
            return placement if same else Placement.of_hosts(hosts, placement)

        return plan


#: brought to recipes, by name
STATES = {"eplb": EPLB}
