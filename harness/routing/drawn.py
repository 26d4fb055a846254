"""Routings of which every token is drawn: uniform ones, and those in which a layer's experts bring the next one's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from harness.routing.draw import Draw, NoParams, best, chunks, largest
from harness.specs import Spec


def uniform(p: NoParams, draw: Draw) -> np.ndarray:
    """Every set of k experts equally likely, token by token: balanced only on average."""
    parts = [largest(keys, draw.top_k) for _, keys in _uniform_keys(draw)]
    return np.concatenate([np.empty((0, draw.top_k), np.int64), *parts])


def uniform_counts(draw: Draw) -> np.ndarray:
    """Loads of ``uniform``'s tokens, int64 [W, E], without their order."""
    counts = np.zeros((len(draw.tokens), draw.num_experts), np.int64)
    for rank, keys in _uniform_keys(draw):
        counts[rank] += np.bincount(best(keys, draw.top_k).ravel(), minlength=draw.num_experts)
    return counts


def _uniform_keys(draw: Draw) -> Iterator[tuple[int, np.ndarray]]:
    """Ranks, and of some of their tokens at a time how much each wants each expert, [tokens, E]."""
    for rank, num_tokens in enumerate(draw.tokens):
        rng = draw.rank_rng(rank)
        for part in chunks(num_tokens, draw.num_experts):
            yield rank, rng.random((part.stop - part.start, draw.num_experts))


class Markov(Spec):
    """Each expert of a token at layer l brings its successor at layer l + 1 with probability ``strength``."""

    strength: Annotated[float, Field(ge=0, le=1)] = 0.5


def markov(p: Markov, draw: Draw) -> np.ndarray:
    """Inter-layer dependence (what MoETuner exploits): layer 0 is uniform; every layer has one random permutation
    of the experts that names each expert's successor. Experts that no predecessor brings are uniform."""
    first = dataclasses.replace(draw, layer=0)
    drawn = _drawn_layer(p, first)
    layer, ids = drawn[0] if drawn and drawn[0][0] <= draw.layer else (0, uniform(NoParams(), first))
    while layer < draw.layer:
        layer += 1
        ids = _successors(p, dataclasses.replace(draw, layer=layer), ids)
    drawn[:] = [(layer, ids)]
    return ids


@functools.lru_cache(maxsize=1)
def _drawn_layer(p: Markov, draw: Draw) -> list[tuple[int, np.ndarray]]:
    """The layer of a step that was drawn last and its ids, from which later layers go on; none at first."""
    return []


def _successors(p: Markov, draw: Draw, before: np.ndarray) -> np.ndarray:
    """ids [T, k] of ``draw.layer``; ``before``: of the layer before it."""
    successor, ids = draw.popularity_rng().permutation(draw.num_experts), before.copy()
    starts = np.concatenate([[0], np.cumsum(draw.tokens)])
    for rank, num_tokens in enumerate(draw.tokens):
        rng, of_rank = draw.rank_rng(rank), ids[starts[rank] : starts[rank + 1]]
        for part in chunks(num_tokens, draw.num_experts):
            brought = successor[of_rank[part]]  # [T, k], distinct
            kept = rng.random(brought.shape) < p.strength
            keys = rng.random((len(brought), draw.num_experts))
            bonus = np.take_along_axis(keys, brought, 1) + kept  # kept ones beat all others
            np.put_along_axis(keys, brought, bonus, 1)
            of_rank[part] = largest(keys, draw.top_k)
    return ids


def markov_layers(p: Markov, draw: Draw) -> Iterator[np.ndarray]:
    """The same, of every layer from 0 to ``draw.layer``."""
    return (markov(p, dataclasses.replace(draw, layer=layer)) for layer in range(draw.layer + 1))
