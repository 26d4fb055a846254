"""Both programs at once, compiled: an annealed search over which rank has which expert of each layer.

A move exchanges two experts of a layer, or sends an expert of one layer from rank a to b and one of another layer, not
next to it, from b to a; so every rank keeps its number of experts over the whole model. What a move changes is told
from sums that are kept for each expert, in O(G).
"""

from __future__ import annotations

import numpy as np

from harness.compiled import compiled

PAIRED = 0.4  # of the moves
SAMPLE = 256  # moves whose size sets the first temperature


@compiled()
def _sums(owner, flow, cost, ahead, behind, between, row_most, column_most):  # type: ignore[no-untyped-def]
    """``ahead`` [L, E, G]: tokens of each expert to each rank of the next layer; ``behind``: from the one before;
    ``between`` [L - 1, G, G]; the dearest entry of its rows and columns."""
    num_layers, num_experts = owner.shape
    ahead[:] = 0
    behind[:] = 0
    between[:] = 0
    for layer in range(num_layers - 1):
        for e1 in range(num_experts):
            for e2 in range(num_experts):
                tokens = flow[layer, e1, e2]
                ahead[layer, e1, owner[layer + 1, e2]] += tokens
                behind[layer + 1, e2, owner[layer, e1]] += tokens
                between[layer, owner[layer, e1], owner[layer + 1, e2]] += tokens
        _dearest(between[layer], cost, row_most[layer], column_most[layer])


@compiled()
def _dearest(between, cost, row_most, column_most):  # type: ignore[no-untyped-def]
    row_most[:] = 0
    column_most[:] = 0
    for g1 in range(len(cost)):
        for g2 in range(len(cost)):
            price = between[g1, g2] * cost[g1, g2]
            row_most[g1] = max(row_most[g1], price)
            column_most[g2] = max(column_most[g2], price)


@compiled()
def _change(layer, a, b, e, f, load, mean, carried, cost, ahead, behind, between, row_most, column_most, weights, blur):  # type: ignore[no-untyped-def]
    """Of the objective, if expert e goes from rank a to b and f (-1: none) from b to a."""
    num_ranks = len(cost)
    light = load[layer, e] - (load[layer, f] if f >= 0 else 0.0)
    at_a, at_b, square = carried[layer, a] - mean[layer], carried[layer, b] - mean[layer], blur * mean[layer]
    was = np.sqrt(at_a**2 + square) + np.sqrt(at_b**2 + square)
    will = np.sqrt((at_a - light) ** 2 + square) + np.sqrt((at_b + light) ** 2 + square)
    change = weights[0] * (will - was)
    if layer < len(between):
        was, will, traffic = 0.0, 0.0, 0.0
        for g in range(num_ranks):
            was = max(was, row_most[layer, g])
            if g != a and g != b:
                will = max(will, row_most[layer, g])
            shift = ahead[layer, e, g] - (ahead[layer, f, g] if f >= 0 else 0.0)
            will = max(will, (between[layer, a, g] - shift) * cost[a, g])
            will = max(will, (between[layer, b, g] + shift) * cost[b, g])
            traffic += shift * (cost[b, g] - cost[a, g])
        change += weights[1] * (will - was) + weights[2] * traffic
    if layer > 0:
        was, will, traffic = 0.0, 0.0, 0.0
        for g in range(num_ranks):
            was = max(was, column_most[layer - 1, g])
            if g != a and g != b:
                will = max(will, column_most[layer - 1, g])
            shift = behind[layer, e, g] - (behind[layer, f, g] if f >= 0 else 0.0)
            will = max(will, (between[layer - 1, g, a] - shift) * cost[g, a])
            will = max(will, (between[layer - 1, g, b] + shift) * cost[g, b])
            traffic += shift * (cost[g, b] - cost[g, a])
        change += weights[1] * (will - was) + weights[2] * traffic
    return change


@compiled()
def _move(layer, e, b, owner, load, flow, size, carried, cost, ahead, behind, between, row_most, column_most):  # type: ignore[no-untyped-def]
    """Carry out: expert e of ``layer`` to rank b."""
    a = owner[layer, e]
    owner[layer, e] = b
    size[layer, a] -= 1
    size[layer, b] += 1
    carried[layer, a] -= load[layer, e]
    carried[layer, b] += load[layer, e]
    num_layers, num_experts = owner.shape
    if layer + 1 < num_layers:
        for g in range(len(cost)):
            between[layer, a, g] -= ahead[layer, e, g]
            between[layer, b, g] += ahead[layer, e, g]
        for other in range(num_experts):
            behind[layer + 1, other, a] -= flow[layer, e, other]
            behind[layer + 1, other, b] += flow[layer, e, other]
        _dearest(between[layer], cost, row_most[layer], column_most[layer])
    if layer > 0:
        for g in range(len(cost)):
            between[layer - 1, g, a] -= behind[layer, e, g]
            between[layer - 1, g, b] += behind[layer, e, g]
        for other in range(num_experts):
            ahead[layer - 1, other, a] -= flow[layer - 1, other, e]
            ahead[layer - 1, other, b] += flow[layer - 1, other, e]
        _dearest(between[layer - 1], cost, row_most[layer - 1], column_most[layer - 1])


@compiled()
def search(owner, load, flow, cost, weights, moves, warmth, paired, blur, rng):  # type: ignore[no-untyped-def]
    """Improve ``owner`` int [L, E] in place to the best found of ``moves`` moves. ``load`` float64 [L, E], ``flow``
    float64 [L - 1, E, E]; ``weights`` of sum |T - mean|, sum z and of all traffic by its cost; ``warmth``: first
    temperature in typical changes (0: downhill only); ``blur``: |T - mean| is taken as sqrt((T - mean)^2 + blur mean).
    Returns the change of the objective (at most 0)."""
    num_layers, num_experts = owner.shape
    num_ranks = len(cost)
    mean = np.empty(num_layers)
    size = np.zeros((num_layers, num_ranks), dtype=np.int64)
    carried = np.zeros((num_layers, num_ranks))
    for layer in range(num_layers):
        mean[layer] = load[layer].sum() / num_ranks
        for e in range(num_experts):
            size[layer, owner[layer, e]] += 1
            carried[layer, owner[layer, e]] += load[layer, e]
    ahead, behind = (np.zeros((num_layers, num_experts, num_ranks)), np.zeros((num_layers, num_experts, num_ranks)))
    between = np.zeros((max(0, num_layers - 1), num_ranks, num_ranks))
    row_most, column_most = (np.zeros((len(between), num_ranks)), np.zeros((len(between), num_ranks)))
    _sums(owner, flow, cost, ahead, behind, between, row_most, column_most)
    best, value, best_value = owner.copy(), 0.0, 0.0
    typical, sampled = 0.0, 0
    for move in range(-SAMPLE, moves):
        layer, e = rng.integers(0, num_layers), rng.integers(0, num_experts)
        a = owner[layer, e]
        other, f = layer, rng.integers(0, num_experts)
        if paired and rng.random() < PAIRED:
            other = rng.integers(0, num_layers)
        b = owner[other, f]
        if a == b:
            continue
        if other != layer and (abs(other - layer) < 2 or size[layer, a] < 2 or size[other, b] < 2):
            continue
        back = f if other == layer else -1
        change = _change(
            layer, a, b, e, back, load, mean, carried, cost, ahead, behind, between, row_most, column_most,
            weights, blur
        )  # fmt: skip
        if other != layer:
            change += _change(
                other, b, a, f, back, load, mean, carried, cost, ahead, behind, between, row_most, column_most,
                weights, blur
            )  # fmt: skip
        if move < 0:
            typical += abs(change)
            sampled += 1
            continue
        heat = warmth * typical / max(1, sampled) * (1 - move / moves) ** 2
        if change <= 0 or (heat > 0 and rng.random() < np.exp(-change / heat)):
            _move(layer, e, b, owner, load, flow, size, carried, cost, ahead, behind, between, row_most, column_most)
            _move(other, f, a, owner, load, flow, size, carried, cost, ahead, behind, between, row_most, column_most)
            value += change
            if value < best_value - 1e-12:
                best_value = value
                best[:] = owner
    owner[:] = best
    return best_value
