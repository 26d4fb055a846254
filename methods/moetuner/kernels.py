"""Searches over placements, compiled: partitions of one layer's experts, clusters on ranks, and both at once."""

from __future__ import annotations

import numpy as np

from harness.compiled import compiled

MAX_ITEMS = 16  # of two clusters that are split anew: 2 ** MAX_ITEMS ways are tried


@compiled()
def largest_first(load, num_clusters, even):  # type: ignore[no-untyped-def]
    """Experts by falling load, each to the least loaded cluster (the smaller one, of equals); ``even``: sizes differ by
    one at most."""
    num = len(load)
    owner = np.zeros(num, dtype=np.int64)
    carried, size = np.zeros(num_clusters), np.zeros(num_clusters, dtype=np.int64)
    small, num_large = num // num_clusters, num % num_clusters
    order = np.argsort(-load)
    for place in range(num):
        expert, best = order[place], -1
        empty = 0
        for c in range(num_clusters):
            if size[c] == 0:
                empty += 1
        for c in range(num_clusters):
            if even and size[c] >= small and not (size[c] == small and num_large > 0):
                continue
            if empty >= num - place and size[c] > 0:  # as many experts left as clusters without one
                continue
            if best < 0 or carried[c] < carried[best] or (carried[c] == carried[best] and size[c] < size[best]):
                best = c
        if even and size[best] == small:
            num_large -= 1
        owner[expert] = best
        carried[best] += load[expert]
        size[best] += 1
    return owner


@compiled()
def _split_anew(load, owner, carried, mean, a, b, even, chosen, rng):  # type: ignore[no-untyped-def]
    """The best split of what clusters a and b hold (of at most MAX_ITEMS of it, if it is more): least deviation from
    the mean, then least squared deviation. Returns whether anything changed."""
    num = 0
    for expert in rng.permutation(len(load)):
        if (owner[expert] == a or owner[expert] == b) and num < MAX_ITEMS:
            chosen[num] = expert
            num += 1
    in_a, in_b, from_a = 0, 0, 0
    for expert in range(len(load)):
        in_a += owner[expert] == a
        in_b += owner[expert] == b
    sum_a, free_a = carried[a], 0.0
    for i in range(num):
        if owner[chosen[i]] == a:
            from_a += 1
            free_a += load[chosen[i]]
    both = carried[a] + carried[b]
    base, base_size = sum_a - free_a, in_a - from_a  # what stays in a whatever is chosen
    best, best_square, mask_best = np.inf, np.inf, np.int64(-1)
    now = abs(sum_a - mean) + abs(both - sum_a - mean)
    now_square = (sum_a - mean) ** 2 + (both - sum_a - mean) ** 2
    total, count, gray = base, base_size, np.int64(0)
    for step in range(np.int64(1) << num):
        if step > 0:  # Gray code: one expert changes sides
            bit = 0
            while not (step >> bit) & 1:
                bit += 1
            gray ^= np.int64(1) << bit
            if (gray >> bit) & 1:
                total += load[chosen[bit]]
                count += 1
            else:
                total -= load[chosen[bit]]
                count -= 1
        if count < 1 or count > in_a + in_b - 1 or (even and count != in_a):
            continue
        deviation = abs(total - mean) + abs(both - total - mean)
        square = (total - mean) ** 2 + (both - total - mean) ** 2
        if deviation < best - 1e-9 or (deviation < best + 1e-9 and square < best_square - 1e-9):
            best, best_square, mask_best = deviation, square, gray
    if mask_best < 0 or not (best < now - 1e-9 or (best < now + 1e-9 and square_less(best_square, now_square))):
        return False
    carried[a] = base
    for i in range(num):
        if (mask_best >> i) & 1:
            owner[chosen[i]] = a
            carried[a] += load[chosen[i]]
        else:
            owner[chosen[i]] = b
    carried[b] = both - carried[a]
    return True


@compiled()
def square_less(a, b):  # type: ignore[no-untyped-def]
    return a < b - 1e-9


@compiled()
def partition(load, num_clusters, even, bound, rounds, rng):  # type: ignore[no-untyped-def]
    """Clusters of one layer with a small sum of |T_c - mean|: largest first, then any two clusters split anew until
    none gets better, then again from a shaken copy of the best; stops at ``bound``."""
    mean = load.sum() / num_clusters
    best_owner, best = largest_first(load, num_clusters, even), np.inf
    chosen = np.zeros(MAX_ITEMS, dtype=np.int64)
    for again in range(rounds):
        owner = best_owner.copy()
        if again > 0:
            for _ in range(3):  # two experts of a size change places
                x, y = rng.integers(0, len(load)), rng.integers(0, len(load))
                owner[x], owner[y] = owner[y], owner[x]
        carried = np.zeros(num_clusters)
        for expert in range(len(load)):
            carried[owner[expert]] += load[expert]
        changed = True
        while changed:
            changed = False
            for a in range(num_clusters):
                for b in range(a + 1, num_clusters):
                    changed |= _split_anew(load, owner, carried, mean, a, b, even, chosen, rng)
        value = np.abs(carried - mean).sum()
        if value < best - 1e-9:
            best, best_owner = value, owner
        if best <= bound + 1e-9:
            break
    return best_owner


@compiled()
def _dearest(between, cost, row_of, column_of):  # type: ignore[no-untyped-def]
    """max over g1 != g2 of between[row_of[g1], column_of[g2]] cost[g1, g2]."""
    found = 0.0
    for g1 in range(len(row_of)):
        for g2 in range(len(column_of)):
            found = max(found, between[row_of[g1], column_of[g2]] * cost[g1, g2])
    return found


@compiled()
def _around(between, cost, cluster, layer):  # type: ignore[no-untyped-def]
    """z before and after ``layer``."""
    found = 0.0
    if layer > 0:
        found += _dearest(between[layer - 1], cost, cluster[layer - 1], cluster[layer])
    if layer < len(between):
        found += _dearest(between[layer], cost, cluster[layer], cluster[layer + 1])
    return found


@compiled()
def arrange(between, cost, sizes, cluster, low, high, penalty, moves, warmth, rng):  # type: ignore[no-untyped-def]
    """Simulated annealing of ILP 2: ``cluster`` int [L, G], the cluster of each layer on each rank, changed in place
    to the best found; two ranks of a layer exchange their clusters. ``penalty``: of each expert that a rank holds
    beyond ``low`` .. ``high``. Returns its objective, with penalties."""
    num_layers, num_ranks = cluster.shape
    held = np.zeros(num_ranks, dtype=np.int64)
    for layer in range(num_layers):
        for g in range(num_ranks):
            held[g] += sizes[layer, cluster[layer, g]]
    value = 0.0
    for layer in range(num_layers - 1):
        value += _dearest(between[layer], cost, cluster[layer], cluster[layer + 1])
    for g in range(num_ranks):
        value += penalty * (max(0, low - held[g]) + max(0, held[g] - high))
    best, best_value = cluster.copy(), value
    for move in range(moves):
        layer, a = rng.integers(0, num_layers), rng.integers(0, num_ranks)
        b = (a + 1 + rng.integers(0, num_ranks - 1)) % num_ranks
        before = _around(between, cost, cluster, layer)
        out_a, out_b = sizes[layer, cluster[layer, a]], sizes[layer, cluster[layer, b]]
        for g in (a, b):
            before += penalty * (max(0, low - held[g]) + max(0, held[g] - high))
        cluster[layer, a], cluster[layer, b] = cluster[layer, b], cluster[layer, a]
        held[a] += out_b - out_a
        held[b] += out_a - out_b
        after = _around(between, cost, cluster, layer)
        for g in (a, b):
            after += penalty * (max(0, low - held[g]) + max(0, held[g] - high))
        heat = warmth * (1 - move / moves)
        if after <= before or (heat > 0 and rng.random() < np.exp((before - after) / heat)):
            value += after - before
            if value < best_value - 1e-9:
                best_value = value
                best[:] = cluster
        else:
            cluster[layer, a], cluster[layer, b] = cluster[layer, b], cluster[layer, a]
            held[a] += out_a - out_b
            held[b] += out_b - out_a
    cluster[:] = best
    return best_value
