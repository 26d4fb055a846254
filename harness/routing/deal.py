"""From loads to tokens: routings in which each expert has exactly a stated number of each rank's assignments, and which
are random in everything else.

McNaughton's wrap-around rule makes one: lay the experts out one after another over k rounds of T tokens; a run of at
most T never meets a token twice. Trades make it random: tokens meet in pairs, and each pair deals the experts that only
one of them has out anew. A trade keeps every load and every token's k; repeated, all such routings become equally
likely (the "curveball" chain: Strona et al., Nature Communications 5, 2014).

``deal`` makes the routings of experiments, rank by rank, each from a stream of its own; its ids must never change.
``deal_at_once`` makes other ones of the same kind, for many ranks with few tokens each, in a tenth of the time.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Random trades that every token takes part in: enough that a pair of experts meets as often as chance has it.
NUM_TRADES = 24
#: of ``deal_at_once``; each halves what is left of the order that the experts were laid out in
FEW_TRADES = 8


def rounded(wanted: np.ndarray, totals: np.ndarray, order: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """``wanted`` float [W, E] rounded up or down, int64 [W, E], so that its rows sum to ``totals`` int [W].

    Systematic rounding: walking through the experts in ``order``, their fractions add up, and whoever carries the sum
    over a whole number (shifted by ``phase`` [W], 0 to 1) gets one more."""
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    missing = totals - counts.sum(1)
    edges = np.cumsum(np.maximum(wanted - counts, 0)[:, order], axis=1)
    whole = np.where(edges[:, -1] > 0, edges[:, -1], 1.0)
    edges = np.floor(edges * (missing / whole)[:, None] * (1 - 1e-12) + phase[:, None])
    edges[:, -1] = missing
    more = np.diff(edges, axis=1, prepend=0).astype(np.int64)
    counts[:, order] += np.where(missing[:, None] > 0, more, 0)
    return counts


def in_whole_numbers(wanted: np.ndarray, tokens: np.ndarray, top_k: int) -> np.ndarray:
    """``wanted`` float [W, E] in whole numbers, int64: of ``tokens`` [W] with ``top_k`` experts each, none twice."""
    totals = tokens * top_k
    for _ in range(8):
        wanted = wanted * (totals / np.maximum(wanted.sum(1), 1e-9))[:, None]
        wanted = np.minimum(wanted, tokens[:, None])
    golden = np.arange(len(tokens)) * (5**0.5 - 1) / 2 % 1
    return rounded(wanted, totals, np.arange(wanted.shape[1]), golden)


def deal(counts: np.ndarray, num_tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """ids int32 [T, k] with expert e exactly counts[e] <= T times and k distinct experts per token."""
    order = rng.permutation(len(counts)).astype(np.int32)
    ids = np.repeat(order, counts[order]).reshape(top_k, num_tokens).T  # [T, k]
    ids = ids[rng.permutation(num_tokens)]
    for _ in range(NUM_TRADES):
        _trade(ids, rng)
    return rng.permuted(ids, axis=1)


def _trade(ids: np.ndarray, rng: np.random.Generator) -> None:
    """Pair the tokens of ``ids`` [T, k] at random; each pair deals anew."""
    num_tokens, top_k = ids.shape
    half = num_tokens // 2
    tokens = rng.permutation(num_tokens)[: 2 * half]
    hands = ids.take(tokens, 0).reshape(half, 2 * top_k)  # two tokens a row
    left, right = _both_have(hands)
    keys = rng.random(hands.shape)
    np.copyto(keys[:, :top_k], -1, where=left)  # what both have stays where it is
    np.copyto(keys[:, top_k:], 2, where=right)
    order = keys.argsort(1)
    order += 2 * top_k * np.arange(half)[:, None]
    ids[tokens] = hands.take(order).reshape(2 * half, top_k)


def _both_have(hands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which experts of the one token, and of the other, both tokens of a row have: bool [P, k] each of [P, 2 k]."""
    top_k = hands.shape[1] // 2
    across = np.ascontiguousarray(hands.T)  # whole pairs are compared at a time
    same = across[:top_k, None] == across[None, top_k:]  # [k, k, P]
    return same.any(1).T, same.any(0).T


def deal_at_once(counts: np.ndarray, tokens: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """ids int32 [T, k] of all ranks: ``counts`` int [W, E], ``tokens`` int [W]."""
    num_ranks, num_experts = counts.shape
    orders = rng.permuted(np.tile(np.arange(num_experts, dtype=np.int64), (num_ranks, 1)), axis=1)
    laid_out = np.repeat(orders.ravel(), np.take_along_axis(counts, orders, 1).ravel())
    first, source = np.cumsum(tokens) - tokens, np.repeat(np.arange(num_ranks), tokens)
    at = (np.arange(len(source)) + (top_k - 1) * first[source])[:, None] + np.arange(top_k) * tokens[source, None]
    ids = laid_out[at]  # [T, k]
    place = np.arange(len(source)) - first[source]  # of a token among its rank's
    left = np.flatnonzero((place % 2 == 0) & (place + 1 < tokens[source]))
    for _ in range(FEW_TRADES):
        shuffled = np.argsort(source + rng.random(len(source)))  # within each rank
        ones, others = shuffled[left], shuffled[left + 1]
        hands = np.concatenate([ids.take(ones, 0), ids.take(others, 0)], axis=1)
        keys = rng.integers(1, 1 << 40, hands.shape, dtype=np.int64)
        in_left, in_right = _both_have(hands)
        np.copyto(keys[:, :top_k], 0, where=in_left)
        np.copyto(keys[:, top_k:], 1 << 40, where=in_right)
        dealt = np.sort(keys << 16 | hands, axis=1) & 0xFFFF  # sorted by key, with the expert behind it
        ids[ones], ids[others] = dealt[:, :top_k], dealt[:, top_k:]
    return rng.permuted(ids, axis=1).astype(np.int32)


def deal_in_groups(
    deal_one: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, num_groups: int, rng: np.random.Generator
) -> np.ndarray:
    """ids int32 [T, k] with as many experts of each token from every one of ``num_groups`` groups of E / num_groups
    consecutive experts. ``deal_one``: from a group's part of ``counts`` int [..., E] to its ids [T, k / num_groups]."""
    if num_groups == 1:
        return deal_one(counts)
    parts, first = np.split(counts, num_groups, axis=-1), np.arange(num_groups) * (counts.shape[-1] // num_groups)
    ids = [deal_one(part) + start.astype(np.int32) for part, start in zip(parts, first, strict=True)]
    return rng.permuted(np.concatenate(ids, axis=1), axis=1)
