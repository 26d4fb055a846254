"""Loops of Algorithms 1 and 2 (``methods.hecate.materialise``, ``methods.hecate.shard``), compiled. Arrays as there."""

from __future__ import annotations

import numpy as np

from harness.compiled import compiled


@compiled()
def spread(hosts, experts, wanted, capacity, num_nodes):  # type: ignore[no-untyped-def]
    """Algorithm 1, lines of the tight branch: up to ``wanted`` [n] more ranks hold each of ``experts`` [n]; every rank
    takes ``capacity`` copies. Changes ``hosts`` [E, D]."""
    num_ranks = hosts.shape[1]
    inner = num_ranks // num_nodes
    free = np.full(num_ranks, capacity)
    free_of_node = np.full(num_nodes, capacity * inner)
    holding = np.empty(num_nodes, dtype=np.int64)  # ranks of the node that hold the expert
    for i in range(len(experts)):
        e = experts[i]
        holding[:] = 0
        for d in range(num_ranks):
            if hosts[e, d]:
                holding[d // inner] += 1
        for _ in range(wanted[i]):
            node = -1
            for n in range(num_nodes):
                if free_of_node[n] == 0 or holding[n] == inner:
                    continue
                if (
                    node < 0
                    or min(holding[n], 1) < min(holding[node], 1)
                    or (min(holding[n], 1) == min(holding[node], 1) and free_of_node[n] > free_of_node[node])
                ):
                    best = -1
                    for d in range(n * inner, (n + 1) * inner):
                        if free[d] > 0 and not hosts[e, d]:
                            best = d
                            break
                    if best >= 0:
                        node = n
            if node < 0:
                break
            best = -1
            for d in range(node * inner, (node + 1) * inner):
                if free[d] > 0 and not hosts[e, d] and (best < 0 or free[d] > free[best]):
                    best = d
            hosts[e, best] = True
            holding[node] += 1
            free[best] -= 1
            free_of_node[node] -= 1


@compiled()
def place(owner, loads, layers, order, underloaded, slots, num_nodes):  # type: ignore[no-untyped-def]
    """Algorithm 2, step 2: owners of the underloaded experts, layer by layer in the order ``layers``, each by
    descending load (``order`` [L, E]). Changes ``owner`` [L, E] and ``slots`` [D], the free ones."""
    num_ranks = len(slots)
    inner = num_ranks // num_nodes
    of_rank = np.zeros(num_ranks)
    of_node = np.zeros(num_nodes)
    free_of_node = np.zeros(num_nodes, dtype=np.int64)
    for d in range(num_ranks):
        free_of_node[d // inner] += slots[d]
    for layer in layers:
        of_rank[:] = 0.0
        of_node[:] = 0.0
        for e in order[layer]:
            if not underloaded[layer, e]:
                continue
            node = -1
            for n in range(num_nodes):
                if free_of_node[n] > 0 and (
                    node < 0
                    or of_node[n] < of_node[node]
                    or (of_node[n] == of_node[node] and free_of_node[n] < free_of_node[node])
                ):
                    node = n
            best = -1
            for d in range(node * inner, (node + 1) * inner):
                if slots[d] > 0 and (
                    best < 0 or of_rank[d] < of_rank[best] or (of_rank[d] == of_rank[best] and slots[d] < slots[best])
                ):
                    best = d
            owner[layer, e] = best
            of_rank[best] += loads[layer, e]
            of_node[node] += loads[layer, e]
            slots[best] -= 1
            free_of_node[node] -= 1
