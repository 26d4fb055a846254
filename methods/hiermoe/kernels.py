"""Loops over tokens and over pairs of experts for ``methods.hiermoe.swap``, compiled. Arrays as there."""

from __future__ import annotations

import numba
import numpy as np

BLOCK = 32  # experts


@numba.njit(cache=True)
def collect(ids, group, load, sole, both, present, filled):  # type: ignore[no-untyped-def]
    num_tokens, k = ids.shape
    needs = np.zeros(filled.shape[1], dtype=np.int32)
    units = np.empty(k, dtype=np.int32)
    for t in range(num_tokens):
        for j in range(k):
            if ids[t, j] >= 0:
                load[ids[t, j]] += 1
    for level in range(group.shape[0]):
        of, alone, together = group[level], sole[level], both[level]
        there, full = present[level], filled[level]
        for t in range(num_tokens):
            num_units = 0
            for j in range(k):
                if ids[t, j] < 0:
                    continue
                unit = of[ids[t, j]]
                if needs[unit] == 0:
                    units[num_units] = unit
                    num_units += 1
                needs[unit] += 1
            for i in range(num_units):
                full[units[i]] += 1
            for j in range(k):
                a = ids[t, j]
                if a < 0:
                    continue
                for i in range(num_units):
                    there[a, units[i]] += 1
                if needs[of[a]] == 1:
                    alone[a] += 1
                    for m in range(k):
                        if ids[t, m] >= 0:
                            together[a, ids[t, m]] += 1
            for i in range(num_units):
                needs[units[i]] = 0


@numba.njit(cache=True, error_model="numpy")
def search(load, sole, both, present, filled, group, tables, weights, scales, kind, gamma):  # type: ignore[no-untyped-def]
    """All pairs. The smooth maxima f are powers or logarithms of a sum S, so with f' = df/dS a change c of it gives
    f(S + c) >= f(S) + c f'(S) S / (S + c): what cannot be the best by that is not raised to a power."""
    num_levels, num_experts = group.shape
    sums, bounds = np.zeros(num_levels), np.zeros(num_levels)
    top = np.zeros((num_levels, 3), dtype=np.int64)  # groups with most tokens
    num_units = np.zeros(num_levels, dtype=np.int64)
    before = 0.0
    for level in range(num_levels):
        num_units[level] = group[level].max() + 1  # coarser levels have fewer
        for z in filled[level, : num_units[level]]:
            sums[level] += tables[level, z]
        order = np.argsort(-filled[level])
        for i in range(min(3, len(order))):
            top[level, i] = order[i]
        value = maximum(sums[level], filled[level, top[level, 0]], scales[level], kind, gamma)
        before += weights[level] * value
        bounds[level] = weights[level] * (value if kind == 0 else scales[level]) / gamma  # f'(S) S
    best, best_r, best_c = before * (1 - 1e-12), -1, -1
    after = np.zeros(num_levels)
    largest = np.zeros(num_levels)
    swapped = np.zeros((num_levels, 2), dtype=np.int64)  # tokens of a pair's two groups after their swap
    tokens = np.empty((num_levels, num_experts), dtype=np.int64)  # of each expert's group
    parts = np.empty((num_levels, num_experts))  # what they add to the sum
    for level in range(num_levels):
        for e in range(num_experts):
            tokens[level, e] = filled[level, group[level, e]]
            parts[level, e] = tables[level, tokens[level, e]]
    num_blocks = (num_experts + BLOCK - 1) // BLOCK
    for block in range(num_blocks * num_blocks):  # what a block of pairs reads stays in the cache
        first_a, first_b = block // num_blocks * BLOCK, block % num_blocks * BLOCK
        for a in range(first_a, min(first_a + BLOCK, num_experts)):
            for b in range(max(first_b, a + 1), min(first_b + BLOCK, num_experts)):
                least = before
                for level in range(num_levels):
                    here, there = group[level, a], group[level, b]
                    after[level] = sums[level]
                    if kind == 1:
                        largest[level] = filled[level, top[level, 0]]
                    if here == there:
                        continue
                    na = tokens[level, a] - sole[level, a] + both[level, a, b] + load[b] - present[level, b, here]
                    nb = tokens[level, b] - sole[level, b] + both[level, b, a] + load[a] - present[level, a, there]
                    swapped[level, 0], swapped[level, 1] = na, nb
                    if kind == 1:
                        most = max(na, nb)
                        for t in range(3):
                            u = top[level, t]
                            if u != here and u != there:
                                most = max(most, filled[level, u])
                                break
                        least += weights[level] * (most - largest[level])
                        largest[level] = most
                    else:
                        change = tables[level, na] + tables[level, nb] - parts[level, a] - parts[level, b]
                        after[level] += change
                        safe = after[level] > 1e-6 * sums[level]
                        least += bounds[level] * change / after[level] * (1 + 1e-6 * (change < 0)) if safe else -np.inf
                if least <= best:
                    value = 0.0
                    for level in range(num_levels):
                        here, there = group[level, a], group[level, b]
                        if here != there and kind != 1:  # anew, as the difference of large sums has lost its digits
                            after[level] = tables[level, swapped[level, 0]] + tables[level, swapped[level, 1]]
                            for u in range(num_units[level]):
                                if u != here and u != there:
                                    after[level] += tables[level, filled[level, u]]
                        value += weights[level] * maximum(after[level], largest[level], scales[level], kind, gamma)
                    if value < best or (value == best and (a, b) < (best_r, best_c)):
                        best, best_r, best_c = value, a, b
    return best_r, best_c, before, best if best_r >= 0 else before


@numba.njit(cache=True)
def maximum(total, largest, scale, kind, gamma):  # type: ignore[no-untyped-def]
    if kind == 0:
        return scale * total ** (1 / gamma)
    if kind == 1:
        return largest
    return scale * np.log(total) / gamma
