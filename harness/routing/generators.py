"""Skewed routings from (generator, params, seed, step, layer) alone; vectorised, k distinct experts per token.

Most generators (``STATED``) state loads: how many of each rank's assignments each expert gets. They mean to have each
expert used so often by a token (``use``, float [E], summing to k, each at most 1), and round that for every rank: so a
target skew is met on every rank and not only on average. ``harness.routing.deal`` makes tokens of them, which are
random in everything else; those of ``grouped``, one group of experts after another. The others (``DRAWN``) draw every
token. Who is popular depends on (seed, layer), in a walk on the step too; which token goes where on the step and the
rank as well. The order among a token's k experts is random.

Parameters and their ranges stand beside each: ``skewed`` (the same experts at every step), ``hot`` (a set of experts,
which may move), ``walk`` (popularity that drifts), ``drawn``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from harness.routing import drawn, hot, skewed, walk
from harness.routing.deal import deal, deal_at_once, deal_in_groups, rounded
from harness.routing.draw import Draw, NoParams
from harness.routing.skewed import groups_of
from harness.specs import Model, Spec, Workload
from harness.topology import Topology

#: generators that state loads, int64 [W, E]
STATED: dict[str, tuple[type[Spec], Callable[..., np.ndarray]]] = {
    "balanced": (NoParams, skewed.balanced),
    "zipf": (skewed.Zipf, skewed.zipf),
    "lognormal": (skewed.Lognormal, skewed.lognormal),
    "walk": (walk.Walk, walk.walk),
    "hot_experts": (hot.HotExperts, hot.hot_experts),
    "spread_hot_experts": (hot.HotExperts, hot.spread_hot_experts),
    "hot_rank": (hot.HotRank, hot.hot_rank),
    "rotating": (hot.Rotating, hot.rotating),
    "burst": (hot.Burst, hot.burst),
    "empty": (skewed.Empty, skewed.empty),
    "grouped": (skewed.Grouped, skewed.grouped),
}
#: generators that draw ids [T, k]
DRAWN: dict[str, tuple[type[Spec], Callable[..., np.ndarray]]] = {
    "uniform": (NoParams, drawn.uniform),
    "markov": (drawn.Markov, drawn.markov),
}
#: whose loads change from step to step by more than chance
DRIFTING = ("walk", "rotating", "burst")
#: what each generator is, in a line; also of those that ``harness.routing.make`` adds
WHAT = {
    "balanced": "all experts and ranks alike",
    "uniform": "any k experts, token by token",
    "zipf": "i-th expert's load as i^-s",
    "lognormal": "log-loads are normal",
    "walk": "log-loads drift, step by step",
    "hot_experts": "a hot set, anywhere",
    "spread_hot_experts": "a hot set, on all ranks alike",
    "hot_rank": "one rank's experts are hot",
    "rotating": "a hot set that moves on",
    "burst": "balanced, with bursts of a hot set",
    "empty": "experts or ranks without tokens",
    "grouped": "each group of experts alike",
    "markov": "experts bring the next layer's",
    "trace": "as recorded",
    "natural": "the router's own choice",
}
GENERATORS = ("balanced", "uniform", *(name for name in STATED if name != "balanced"), "markov")


# ---- whole routings, their loads alone, and samples of them ------------------------------------------------------


def generate(workload: Workload, model: Model, topology: Topology, step: int, layer: int) -> np.ndarray:
    """ids int32 [T, k] of a workload whose generator is one of ``GENERATORS``."""
    return _generate(workload, model, topology, step, layer).copy()


@functools.lru_cache(maxsize=4)  # the systems of a race ask for the same ones: of a few layers, one after another
def _generate(workload: Workload, model: Model, topology: Topology, step: int, layer: int) -> np.ndarray:
    draw = Draw.of(workload, model, topology, step, layer)
    found = _call(workload, draw)
    if draw.generator in DRAWN:
        return np.asarray(found, dtype=np.int32)
    num_groups = groups_of(_params(workload, draw), draw)
    per_rank = enumerate(zip(found, draw.tokens, strict=True))
    return np.concatenate([_dealt(draw, counts, num, num_groups, rank) for rank, (counts, num) in per_rank])


def _dealt(draw: Draw, counts: np.ndarray, num_tokens: int, num_groups: int, rank: int) -> np.ndarray:
    """ids of a rank's tokens."""
    rng, top_k = draw.rank_rng(rank), draw.top_k // num_groups
    return deal_in_groups(lambda part: deal(part, num_tokens, top_k, rng), counts, num_groups, rng)


def loads(workload: Workload, model: Model, topology: Topology, step: int, layer: int) -> np.ndarray | None:
    """``generate``'s assignments from each rank to each expert, int64 [W, E]; None where only the ids tell them."""
    draw = Draw.of(workload, model, topology, step, layer)
    if draw.generator in STATED:
        return _call(workload, draw)
    _params(workload, draw)  # checked
    return drawn.uniform_counts(draw) if draw.generator == "uniform" else None


def sample(
    workload: Workload, model: Model, topology: Topology, step: int, layer: int, tokens: tuple[int, ...]
) -> np.ndarray:
    """ids int32 [sum of ``tokens``, k]: a routing of so many tokens of each rank, with ``generate``'s loads in
    proportion, rounded. Who draws every token draws fewer, at every layer the same ones."""
    draw = Draw.of(workload, model, topology, step, layer)
    if draw.generator in DRAWN:
        return np.asarray(_call(workload, dataclasses.replace(draw, tokens=tokens)), dtype=np.int32)
    counts, rng = _call(workload, draw), draw.sample_rng()
    num_each = np.array(tokens)
    share = num_each / np.maximum(draw.tokens, 1)
    num_groups = groups_of(_params(workload, draw), draw)
    top_k = draw.top_k // num_groups  # of a group
    order, phases = rng.permutation(draw.num_experts // num_groups), rng.random(len(tokens))
    wanted = np.split(counts * share[:, None], num_groups, axis=1)
    fewer = np.concatenate([rounded(part, num_each * top_k, order, phases) for part in wanted], axis=1)
    return deal_in_groups(lambda part: deal_at_once(part, num_each, top_k, rng), fewer, num_groups, rng)


def _call(workload: Workload, draw: Draw) -> np.ndarray:
    """Loads or ids, as the generator gives them."""
    _, function = (STATED | DRAWN)[draw.generator]
    return np.asarray(function(_params(workload, draw), draw))


def _params(workload: Workload, draw: Draw) -> Spec:
    kind, _ = (STATED | DRAWN)[draw.generator]
    return kind.parse(workload.params, draw.where)
