"""Compiled loops over the ids of a trace, and the rule by which counts become tokens."""

from __future__ import annotations

import zlib

import numpy as np

from harness.compiled import compiled

NUM_TRADES = 8  # of every token; each halves what is left of the order in which the experts were laid out
#: in the header of a trace that has counts alone
RULE = (
    "tokens are drawn from counts: each rank's experts are laid out in random order over k rounds of its tokens "
    "(McNaughton's wrap-around rule), then tokens meet in random pairs and deal anew what only one of them has "
    f"(curveball trades, {NUM_TRADES} a token); each rank's counts are kept exactly, k distinct experts a token"
)


@compiled(nogil=True)
def has_wrong(ids, num_experts):  # type: ignore[no-untyped-def]
    """Whether ids [T, k] hold one that is out of range, or twice in a token."""
    last = np.full(num_experts, -1, np.int64)  # token that had the expert last
    for token in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            expert = ids[token, j]
            if expert < 0 or expert >= num_experts or last[expert] == token:
                return True
            last[expert] = token
    return False


@compiled(nogil=True)
def count(ids, tokens, num_experts):  # type: ignore[no-untyped-def]
    """ids [T, k], ``tokens`` int64 [R] -> int64 [R, E]."""
    found = np.zeros((len(tokens), num_experts), np.int64)
    token = 0
    for rank in range(len(tokens)):
        of_rank = found[rank]
        for _ in range(tokens[rank]):
            for j in range(ids.shape[1]):
                of_rank[ids[token, j]] += 1
            token += 1
    return found


def draw(counts: np.ndarray, top_k: int, seed: int, step: int, layer: int) -> np.ndarray:
    """``RULE``: counts int64 [R, E] -> ids int32 [T, k], the same on every machine."""
    counts = np.ascontiguousarray(counts, np.int64)
    stream = np.random.SeedSequence([zlib.crc32(b"trace"), seed, step, layer])
    ids = np.empty((int(counts.sum()) // top_k, top_k), np.int32)
    _deal(counts, counts.sum(1) // top_k, stream.generate_state(len(counts), np.uint64), NUM_TRADES, ids)
    return ids


@compiled()
def _below(state, most):  # type: ignore[no-untyped-def]
    """The next number from 0 to ``most`` - 1 of the stream ``state`` uint64 [1] (splitmix64)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.int64(((z >> np.uint64(32)) * np.uint64(most)) >> np.uint64(32))


@compiled()
def _shuffle(values, state):  # type: ignore[no-untyped-def]
    for last in range(len(values) - 1, 0, -1):
        other = _below(state, last + 1)
        values[last], values[other] = values[other], values[last]


@compiled()
def _deal(counts, tokens, seeds, num_trades, ids):  # type: ignore[no-untyped-def]
    num_experts, top_k = counts.shape[1], ids.shape[1]
    state = np.zeros(1, np.uint64)
    mark = np.full(num_experts, -1, np.int64)
    pool, places = np.empty(2 * top_k, np.int32), np.empty(2 * top_k, np.int64)
    round_, first = 0, 0
    for rank in range(len(tokens)):
        state[0] = seeds[rank]
        own = ids[first : first + tokens[rank]]
        first += tokens[rank]
        num_tokens = len(own)
        who, order = np.arange(num_tokens), np.arange(num_experts)
        _shuffle(who, state)
        _shuffle(order, state)
        at = 0
        for expert in order:
            for _ in range(counts[rank, expert]):
                own[who[at % num_tokens], at // num_tokens] = expert
                at += 1
        for _ in range(num_trades):
            _shuffle(who, state)
            for pair in range(num_tokens // 2):
                a, b = own[who[2 * pair]], own[who[2 * pair + 1]]
                _trade(a, b, mark, round_, pool, places, state)
                round_ += 2
        for token in range(num_tokens):
            _shuffle(own[token], state)


@compiled()
def _trade(a, b, mark, round_, pool, places, state):  # type: ignore[no-untyped-def]
    """Two tokens deal anew the experts that only one of them has."""
    for j in range(len(a)):
        mark[a[j]] = round_
    found = 0
    for j in range(len(b)):
        if mark[b[j]] == round_:
            mark[b[j]] = round_ + 1  # both have it
        else:
            pool[found], places[found] = b[j], len(a) + j
            found += 1
    for j in range(len(a)):
        if mark[a[j]] == round_:
            pool[found], places[found] = a[j], j
            found += 1
    _shuffle(pool[:found], state)
    for i in range(found):
        if places[i] < len(a):
            a[places[i]] = pool[i]
        else:
            b[places[i] - len(a)] = pool[i]
