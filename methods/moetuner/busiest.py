"""The annealed search of ``methods.moetuner.seconds``, compiled: when all rows of a layer of a batch are home.

What a move changes is told from the rows of each rank in each batch, so it costs O(G) for each batch.
"""

from __future__ import annotations

import numpy as np

from harness.compiled import compiled
from harness.plan.fair import last, together

PAIRED = 0.2  # of the moves
SAMPLE = 256  # moves whose size sets the first temperature


@compiled()
def home_s(load, arriving, leaving, size, prices):  # type: ignore[no-untyped-def]
    """Seconds until all rows of one layer of one batch are home. ``load`` [G]: rows of each rank; ``arriving`` [V, G]:
    of them, those from outside the rank's unit; ``leaving`` [V, U]: rows that a unit's tokens send out of it; ``size``
    int [V]: neighbouring ranks that share a port; ``prices`` [1 + V]: seconds of a row of a rank, of one through a
    port."""
    num_ranks = len(load)
    done, order = np.zeros(num_ranks), np.zeros(num_ranks, dtype=np.int64)
    for v in range(len(size)):
        for first in range(0, num_ranks, size[v]):
            together(order, first, size[v], arriving[v], prices[1 + v], done)
    longest = 0.0
    for g in range(num_ranks):
        done[g] += prices[0] * load[g]
        longest = max(longest, done[g])
    for v in range(len(size)):
        for unit in range(num_ranks // size[v]):
            home = last(order, unit * size[v], size[v], done, arriving[v], prices[1 + v])
            longest = max(longest, home, 2 * leaving[v, unit] * prices[1 + v])
    return longest


@compiled()
def _shift(layer, e, a, b, rows, size, load, arriving, leaving):  # type: ignore[no-untyped-def]
    """Expert e of ``layer`` goes from rank a to b."""
    for batch in range(rows.shape[1]):
        for v in range(len(size)):
            of_a, of_b, whole = a // size[v], b // size[v], 0.0
            for unit in range(rows.shape[3]):
                whole += rows[layer, batch, v, unit, e]
            if v == 0:
                load[layer, batch, a] -= whole
                load[layer, batch, b] += whole
            arriving[layer, batch, v, a] -= whole - rows[layer, batch, v, of_a, e]
            arriving[layer, batch, v, b] += whole - rows[layer, batch, v, of_b, e]
            leaving[layer, batch, v, of_a] += rows[layer, batch, v, of_a, e]
            leaving[layer, batch, v, of_b] -= rows[layer, batch, v, of_b, e]


@compiled()
def _layer_s(layer, size, prices, load, arriving, leaving):  # type: ignore[no-untyped-def]
    """Of all batches together."""
    found = 0.0
    for batch in range(load.shape[1]):
        found += home_s(load[layer, batch], arriving[layer, batch], leaving[layer, batch], size, prices)
    return found


@compiled()
def search(owner, rows, size, prices, moves, warmth, rng):  # type: ignore[no-untyped-def]
    """Improve ``owner`` int [L, E] in place to the best found of ``moves`` moves: two experts of a layer change ranks,
    or one of a layer goes from rank a to b and one of another layer from b to a, so that every rank keeps its number.
    ``rows`` float32 [L, B, V, U, E]: of each batch the rows from each unit of each of V kinds of ports to each expert;
    ``size`` and ``prices`` as for ``home_s``; ``warmth``: first temperature in typical changes. Returns the seconds of
    all layers and batches together."""
    num_layers, num_batches, num_links, num_units, num_experts = rows.shape
    num_ranks = num_units * size.min()
    load = np.zeros((num_layers, num_batches, num_ranks))
    arriving = np.zeros((num_layers, num_batches, num_links, num_ranks))
    leaving = np.zeros((num_layers, num_batches, num_links, num_units))
    held = np.zeros((num_layers, num_ranks), dtype=np.int64)
    for layer in range(num_layers):  # all on rank 0, then each to its own
        for e in range(num_experts):
            held[layer, owner[layer, e]] += 1
            for batch in range(num_batches):
                for v in range(num_links):
                    for unit in range(num_units):
                        count = rows[layer, batch, v, unit, e]
                        load[layer, batch, 0] += count if v == 0 else 0.0
                        if unit > 0:
                            arriving[layer, batch, v, 0] += count
                            leaving[layer, batch, v, unit] += count
            _shift(layer, e, np.int64(0), owner[layer, e], rows, size, load, arriving, leaving)
    cost = np.zeros(num_layers)
    for layer in range(num_layers):
        cost[layer] = _layer_s(layer, size, prices, load, arriving, leaving)
    best, best_value = owner.copy(), cost.sum()
    typical, sampled = 0.0, 0
    for move in range(-SAMPLE if moves else 0, moves):
        layer, e = rng.integers(0, num_layers), rng.integers(0, num_experts)
        other, f = layer, rng.integers(0, num_experts)
        if num_layers > 1 and rng.random() < PAIRED:
            other = rng.integers(0, num_layers)
        a, b = owner[layer, e], owner[other, f]
        if a == b or (other != layer and (held[layer, a] < 2 or held[other, b] < 2)):
            continue
        _shift(layer, e, a, b, rows, size, load, arriving, leaving)
        _shift(other, f, b, a, rows, size, load, arriving, leaving)
        new = _layer_s(layer, size, prices, load, arriving, leaving)
        new_other = 0.0 if other == layer else _layer_s(other, size, prices, load, arriving, leaving)
        change = new - cost[layer] + (0.0 if other == layer else new_other - cost[other])
        heat = 0.0
        if move < 0:
            typical += abs(change)
            sampled += 1
        else:
            heat = warmth * typical / max(1, sampled) * (1 - move / moves) ** 2
        if move >= 0 and (change <= 0 or (heat > 0 and rng.random() < np.exp(-change / heat))):
            owner[layer, e], owner[other, f] = b, a
            held[layer, a] -= 1
            held[layer, b] += 1
            held[other, b] -= 1
            held[other, a] += 1
            cost[layer] = new
            if other != layer:
                cost[other] = new_other
            if cost.sum() < best_value - 1e-12:
                best_value = cost.sum()
                best[:] = owner
        else:
            _shift(layer, e, b, a, rows, size, load, arriving, leaving)
            _shift(other, f, a, b, rows, size, load, arriving, leaving)
    owner[:] = best
    return best_value
