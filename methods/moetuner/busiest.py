"""The annealed search of ``methods.moetuner.seconds``, compiled.

A layer of a batch costs what its busiest rank and, there and back, its busiest port cost. What a move changes is told
from the loads of all batches, in O(G) for each.
"""

from __future__ import annotations

import numba
import numpy as np

PAIRED = 0.2  # of the moves
SAMPLE = 256  # moves whose size sets the first temperature


@numba.njit(cache=True)
def _tally(owner, rows, unit, load, out, into):  # type: ignore[no-untyped-def]
    """``load`` [L, B, G]: rows of each rank; ``out``, ``into`` [L, B, V, U]: rows that leave and enter each unit."""
    num_layers, num_batches, num_links, num_units, num_experts = rows.shape
    load[:], out[:], into[:] = 0, 0, 0
    for layer in range(num_layers):
        for batch in range(num_batches):
            for e in range(num_experts):
                rank = owner[layer, e]
                for u in range(num_units):
                    load[layer, batch, rank] += rows[layer, batch, 0, u, e]
                    for v in range(num_links):
                        if u != unit[v, rank]:
                            out[layer, batch, v, u] += rows[layer, batch, v, u, e]
                            into[layer, batch, v, unit[v, rank]] += rows[layer, batch, v, u, e]


@numba.njit(cache=True)
def _cost(layer, batch, a, b, e, f, rows, whole, unit, prices, load, out, into):  # type: ignore[no-untyped-def]
    """Seconds of a layer of a batch if e (-1: none) goes from rank a to b, and f (-1: none) from b to a."""
    gone = (whole[layer, batch, e] if e >= 0 else 0.0) - (whole[layer, batch, f] if f >= 0 else 0.0)
    most = 0.0
    for g in range(load.shape[2]):
        most = max(most, load[layer, batch, g] + (gone if g == b else 0.0) - (gone if g == a else 0.0))
    longest = 0.0
    for v in range(len(unit)):
        at_a, at_b = unit[v, a], unit[v, b]
        from_a = from_b = 0.0
        if e >= 0:
            from_a, from_b = from_a + rows[layer, batch, v, at_a, e], from_b + rows[layer, batch, v, at_b, e]
        if f >= 0:
            from_a, from_b = from_a - rows[layer, batch, v, at_a, f], from_b - rows[layer, batch, v, at_b, f]
        port = 0.0
        for u in range(out.shape[3]):
            leaves, enters = out[layer, batch, v, u], into[layer, batch, v, u]
            if at_a != at_b and u == at_a:
                leaves, enters = leaves + from_a, enters - (gone - from_a)
            elif at_a != at_b and u == at_b:
                leaves, enters = leaves - from_b, enters + (gone - from_b)
            port = max(port, leaves, enters)
        longest = max(longest, prices[1 + v] * port)
    return prices[0] * most + 2 * longest


@numba.njit(cache=True)
def _change(layer, a, b, e, f, rows, whole, unit, prices, load, out, into, cost):  # type: ignore[no-untyped-def]
    """Of the seconds of all batches together."""
    change = 0.0
    for batch in range(cost.shape[1]):
        change += _cost(layer, batch, a, b, e, f, rows, whole, unit, prices, load, out, into) - cost[layer, batch]
    return change


@numba.njit(cache=True)
def _move(layer, e, b, owner, rows, whole, unit, prices, load, out, into, cost):  # type: ignore[no-untyped-def]
    """Carry out: expert e of ``layer`` to rank b."""
    a = owner[layer, e]
    owner[layer, e] = b
    for batch in range(cost.shape[1]):
        tokens = whole[layer, batch, e]
        load[layer, batch, a] -= tokens
        load[layer, batch, b] += tokens
        for v in range(len(unit)):
            at_a, at_b = unit[v, a], unit[v, b]
            if at_a != at_b:
                from_a, from_b = rows[layer, batch, v, at_a, e], rows[layer, batch, v, at_b, e]
                out[layer, batch, v, at_a] += from_a
                into[layer, batch, v, at_a] -= tokens - from_a
                out[layer, batch, v, at_b] -= from_b
                into[layer, batch, v, at_b] += tokens - from_b
        cost[layer, batch] = _cost(layer, batch, a, a, -1, -1, rows, whole, unit, prices, load, out, into)


@numba.njit(cache=True)
def search(owner, rows, unit, prices, moves, warmth, rng):  # type: ignore[no-untyped-def]
    """Improve ``owner`` int [L, E] in place to the best found of ``moves`` moves: two experts of a layer change ranks,
    or one of a layer goes from rank a to b and one of another layer from b to a, so that every rank keeps its number.
    ``rows`` float32 [L, B, V, U, E]: of each batch the rows from each unit of each of V kinds of ports to each expert;
    ``unit`` int [V, G]; ``prices``: seconds of a row of a rank, then of a row through each kind of port; ``warmth``:
    first temperature in typical changes. Returns the seconds of each layer of each batch, float64 [L, B]."""
    num_layers, num_batches, num_links, num_units, num_experts = rows.shape
    num_ranks = unit.shape[1]
    load = np.zeros((num_layers, num_batches, num_ranks))
    out = np.zeros((num_layers, num_batches, num_links, num_units))
    into = np.zeros((num_layers, num_batches, num_links, num_units))
    whole = rows[:, :, 0].sum(2).astype(np.float64)  # [L, B, E]
    _tally(owner, rows, unit, load, out, into)
    cost = np.zeros((num_layers, num_batches))
    size = np.zeros((num_layers, num_ranks), dtype=np.int64)
    for layer in range(num_layers):
        for e in range(num_experts):
            size[layer, owner[layer, e]] += 1
        for batch in range(num_batches):
            cost[layer, batch] = _cost(layer, batch, 0, 0, -1, -1, rows, whole, unit, prices, load, out, into)
    best, value, best_value = owner.copy(), 0.0, 0.0
    typical, sampled = 0.0, 0
    for move in range(-SAMPLE if moves else 0, moves):
        layer, e = rng.integers(0, num_layers), rng.integers(0, num_experts)
        other, f = layer, rng.integers(0, num_experts)
        if num_layers > 1 and rng.random() < PAIRED:
            other = rng.integers(0, num_layers)
        a, b = owner[layer, e], owner[other, f]
        if a == b:
            continue
        if other == layer:
            change = _change(layer, a, b, e, f, rows, whole, unit, prices, load, out, into, cost)
        elif size[layer, a] < 2 or size[other, b] < 2:
            continue
        else:
            change = _change(layer, a, b, e, -1, rows, whole, unit, prices, load, out, into, cost)
            change += _change(other, b, a, f, -1, rows, whole, unit, prices, load, out, into, cost)
        if move < 0:
            typical += abs(change)
            sampled += 1
            continue
        heat = warmth * typical / max(1, sampled) * (1 - move / moves) ** 2
        if change <= 0 or (heat > 0 and rng.random() < np.exp(-change / heat)):
            for at, expert, to in ((layer, e, b), (other, f, a)):
                size[at, owner[at, expert]] -= 1
                size[at, to] += 1
                _move(at, expert, to, owner, rows, whole, unit, prices, load, out, into, cost)
            value += change
            if value < best_value - 1e-12:
                best_value = value
                best[:] = owner
    owner[:] = best
    _tally(owner, rows, unit, load, out, into)
    for layer in range(num_layers):
        for batch in range(num_batches):
            cost[layer, batch] = _cost(layer, batch, 0, 0, -1, -1, rows, whole, unit, prices, load, out, into)
    return cost
