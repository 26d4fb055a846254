"""Loops over tokens and over pairs of experts for ``methods.hiermoe.swap``, compiled. Arrays as there."""

from __future__ import annotations

import numpy as np

from harness.compiled import compiled


@compiled()
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


@compiled(error_model="numpy")
def search(load, sole, both, present, filled, group, weights, scales, kind, gamma):  # type: ignore[no-untyped-def]
    """All pairs, by bounds of what a swap gains: of an expert in any pair, then of each pair; only what is left is
    weighed exactly. Smooth maxima f are powers or logarithms, thus concave, of a sum S.

    A loss c of S, at most C, lowers f by at most c (f(S) - f(S - C)) / C, which is additive over a pair's experts."""
    num_levels, num_experts = group.shape
    num_units = np.zeros(num_levels, dtype=np.int64)
    values, slopes = np.zeros(num_levels), np.zeros(num_levels)
    sums, parts = np.zeros(num_levels), np.zeros(filled.shape)
    brings = np.empty((num_levels, filled.shape[1], num_experts), dtype=np.int32)  # tokens b would bring to a unit
    stays, old = np.empty((num_levels, num_experts), dtype=np.int32), np.empty((num_levels, num_experts))
    hope = np.zeros(num_experts)  # what an expert's leaving its groups gains at most
    fewest = np.empty(filled.shape[1], dtype=np.int64)
    left, lost, scratch = np.empty(num_experts, dtype=np.int32), np.empty(num_experts), np.empty(num_experts)
    for level in range(num_levels):
        num_units[level] = n = group[level].max() + 1  # coarser levels have fewer
        full, scale, of = filled[level, :n], scales[level], group[level]
        raised(full, parts[level], scratch, scale, kind, gamma)
        sums[level], most = parts[level, :n].sum(), full.max()
        values[level] = weights[level] * maximum(sums[level], most, scale, kind, gamma)
        slopes[level] = (values[level] if kind == 0 else weights[level] * scale) / gamma
        for b in range(num_experts):
            for u in range(n):
                brings[level, u, b] = load[b] - present[level, b, u]
        for u in range(n):
            few, come = np.int32(2**31 - 1), brings[level, u]
            for b in range(num_experts):
                few = min(few, come[b] if of[b] != u else np.int32(2**31 - 1))
            fewest[u] = few
        for a in range(num_experts):
            stays[level, a], old[level, a] = full[of[a]] - sole[level, a], parts[level, of[a]]
            left[a] = min(stays[level, a] + fewest[of[a]], full[of[a]])
        if kind == 1:
            for a in range(num_experts):
                hope[a] += weights[level] * (most - left[a]) * (full[of[a]] == most)
            continue
        raised(left, lost, scratch, scale, kind, gamma)
        for a in range(num_experts):
            lost[a] = max(0.0, old[level, a] - lost[a])
        low = max(sums[level] - 2 * lost.max(), n if kind == 2 else 0)  # exp(0) = 1 for every group
        if low < sums[level]:
            slope = (values[level] - weights[level] * maximum(low, most, scale, kind, gamma)) / (sums[level] - low)
            for a in range(num_experts):
                hope[a] += slope * lost[a]
    before = values.sum()
    best, best_r, best_c = before * (1 - 1e-12), -1, -1
    least, done = np.empty(num_experts), np.zeros(num_experts, dtype=np.bool_)
    two, raised_two = np.empty(2, dtype=np.int32), np.empty(2)
    na, nb, others = np.empty_like(left), np.empty_like(left), np.empty(filled.shape[1], dtype=np.int32)
    raised_a, raised_b = np.empty(num_experts), np.empty(num_experts)
    for i in range(-1, num_experts):  # -1: the most promising one
        a = int(hope.argmax()) if i < 0 else i
        if done[a] or 2 * hope[a] < before - best:  # a pair that gains as much has another of more hope
            continue
        done[a] = True
        begin, end = num_experts, 0  # all b with which the pair could be the best
        for b in range(num_experts):
            if not done[b] and hope[a] + hope[b] >= before - best:
                begin, end = min(begin, b), b + 1
        if begin >= end:
            continue
        least[begin:end] = before
        for level in range(num_levels):
            given = (stays[level], both[level], brings[level], filled[level], group[level], old[level], least)
            how = (sums[level], slopes[level], weights[level], scales[level], kind, gamma)
            bound(a, slice(begin, end), *given, *how, na, nb, others, raised_a, raised_b, scratch)
        for b in range(begin, end):
            if least[b] > best or done[b]:
                continue
            value = 0.0
            for level in range(num_levels):
                here, there = group[level, a], group[level, b]
                if here == there:
                    value += values[level]
                    continue
                two[0] = stays[level, a] + both[level, a, b] + brings[level, here, b]
                two[1] = stays[level, b] + both[level, b, a] + brings[level, there, a]
                raised(two, raised_two, scratch, scales[level], kind, gamma)
                total, most = raised_two.sum(), two.max()
                for u in range(num_units[level]):
                    if u != here and u != there:
                        total += parts[level, u]
                        most = max(most, filled[level, u])
                value += weights[level] * maximum(total, most, scales[level], kind, gamma)
            pair = (min(a, b), max(a, b))
            if value < best or (value == best and pair < (best_r, best_c)):
                best, best_r, best_c = value, pair[0], pair[1]
    return best_r, best_c, before, best if best_r >= 0 else before


@compiled(error_model="numpy")
def bound(  # type: ignore[no-untyped-def]
    a, b, stays, both, brings, full, group, old, least, total, slope, weight, scale, kind, gamma, *buffers
):
    """Add to ``least`` [E] what one level's part of the objective changes by at least when a changes places with b, a
    slice. With f' = df/dS a change c of S gives f(S + c) >= f(S) + c f'(S) S / (S + c), where f'(S) S is ``slope``.
    Loops are plain, so that the compiler makes vectors of them."""
    na, nb, others, raised_a, raised_b, scratch = buffers
    here, stay, old_a = group[a], stays[a], old[a]
    keep, come, rest, of, change = both[a, b], brings[here, b], stays[b], group[b], least[b]
    old_b, back, n = old[b], both[b, a], len(change)
    for u in range(len(full)):
        others[u] = brings[u, a]
    for j in range(n):
        na[j] = stay + keep[j] + come[j]
    for j in range(n):
        nb[j] = rest[j] + back[j] + others[of[j]]
    if kind == 1:
        fullest = np.argsort(-full)[:3]
        for u in range(len(full)):
            for t in fullest:
                if t != here and t != u:
                    others[u] = full[t]
                    break
        for j in range(n):
            more = weight * (max(na[j], nb[j], others[of[j]]) - full[fullest[0]])
            change[j] += more if of[j] != here else 0.0
        return
    raised(na[:n], raised_a, scratch, scale, kind, gamma)
    raised(nb[:n], raised_b, scratch, scale, kind, gamma)
    for j in range(n):
        more = raised_a[j] + raised_b[j] - old_a - old_b[j]
        after = total + more
        less = slope * more / after * (1 + 1e-6 * (more < 0)) if after > 1e-6 * total else -np.inf
        change[j] += less if of[j] != here else 0.0


@compiled(error_model="numpy")
def raised(z, out, scratch, scale, kind, gamma):  # type: ignore[no-untyped-def]
    """What groups of z [n] tokens add to the smooth maximum's sum."""
    inverse, rest = 1 / scale, int(gamma)
    if kind == 2:
        for i in range(len(z)):
            out[i] = np.exp(min(gamma * inverse * z[i], 700.0))
    elif rest != gamma:
        for i in range(len(z)):
            out[i] = (inverse * z[i]) ** gamma
    else:  # by repeated squaring, in a tenth of the time
        for i in range(len(z)):
            out[i], scratch[i] = 1.0, inverse * z[i]
        while rest:
            if rest % 2:
                for i in range(len(z)):
                    out[i] *= scratch[i]
            for i in range(len(z)):
                scratch[i] *= scratch[i]
            rest //= 2


@compiled()
def maximum(total, largest, scale, kind, gamma):  # type: ignore[no-untyped-def]
    if kind == 0:
        return scale * total ** (1 / gamma)
    if kind == 1:
        return largest
    return scale * np.log(total) / gamma
