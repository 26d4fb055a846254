"""Skewed routings from (generator, params, seed, step, layer) alone; vectorised, k distinct experts per token.

Most generators (``STATED``) state loads: how many of each rank's assignments each expert gets. They mean to have each
expert used so often by a token (``use``, float [E], summing to k, each at most 1), and round that for every rank: so a
target skew is met on every rank and not only on average. ``harness.routing.deal`` makes tokens of them, which are
random in everything else; those of ``grouped``, one group of experts after another. The others (``DRAWN``) draw every
token. Who is popular depends on (seed, layer); which token goes where on the step and the rank too. The order among a
token's k experts is random.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from harness.routing.deal import deal, deal_at_once, deal_in_groups, rounded
from harness.routing.draw import Draw, best, chunks, largest, rounded_use
from harness.specs import Count, Model, Spec, Workload
from harness.topology import Topology

Share = Annotated[float, Field(gt=0, le=1)]


# ---- generators --------------------------------------------------------------------------------------------------


class NoParams(Spec):
    """The generator has no parameters."""


def balanced(p: NoParams, draw: Draw) -> np.ndarray:
    """Every expert gets the same number of *each rank's* assignments, one more or less where it does not divide.

    The experts that get one more are a run of an order in which nodes alternate fastest, then ranks, and each rank
    goes on where the one before it stopped: so every pair of ranks, every pair of nodes and the sum over all ranks
    are balanced to one assignment too (experts placed contiguously).
    """
    rng = draw.step_rng()
    ranks = draw.topology.shape if draw.num_experts % draw.topology.num_ranks == 0 else ()
    grid = np.arange(draw.num_experts).reshape(*ranks, -1)
    for axis, size in enumerate(grid.shape):
        grid = grid.take(rng.permutation(size), axis)
    order = grid.T.ravel()
    counts, start = np.empty((len(draw.tokens), draw.num_experts), np.int64), 0
    for rank, num_tokens in enumerate(draw.tokens):
        counts[rank], more = divmod(num_tokens * draw.top_k, draw.num_experts)
        counts[rank, order[(start + np.arange(more)) % draw.num_experts]] += 1
        start += more
    return counts


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


class Zipf(Spec):
    """``target``: load of the most used expert over the mean load, 1 to E / k."""

    target: Annotated[float, Field(ge=1)] = 2.0


def zipf(p: Zipf, draw: Draw) -> np.ndarray:
    """The i-th most used expert has a load in proportion to i^-s, with s such that max/mean is ``target``."""
    exponent = zipf_exponent(p.target, draw)
    load = np.arange(1, draw.num_experts + 1) ** -exponent
    return rounded_use(draw, draw.top_k * (load / load.sum())[draw.popularity_rng().permutation(draw.num_experts)])


def zipf_exponent(target: float, draw: Draw) -> float:
    """s with E / sum_i i^-s = target."""
    limit = draw.num_experts / draw.top_k
    if target > limit * (1 + 1e-9):
        text = f"{draw.top_k} distinct of {draw.num_experts} experts allow at most E / k = {limit:g}"
        raise draw.bad("target", target, f"unreachable: {text}")
    index = np.arange(1, draw.num_experts + 1, dtype=np.float64)

    def excess(exponent: float) -> float:
        return draw.num_experts / float((index**-exponent).sum()) - target

    if excess(0.0) >= 0:
        return 0.0
    if excess(64.0) <= 0:
        return 64.0
    from scipy.optimize import brentq  # slow to import, and not every workload needs it

    return float(brentq(excess, 0.0, 64.0))


class HotExperts(Spec):
    """``share`` of all assignments goes to ``hot_experts`` experts: from their even share up to hot_experts / k."""

    hot_experts: Count = 8
    share: Share = 0.5


def _hot(draw: Draw, experts: np.ndarray, share: float) -> np.ndarray:
    """use [E] with ``share`` of the assignments on ``experts``, evenly, and the rest evenly on the others."""
    num_experts, num_hot, top_k = draw.num_experts, len(experts), draw.top_k
    low = max(num_hot / num_experts, 1 - (num_experts - num_hot) / top_k)
    high = min(1.0, num_hot / top_k) if num_hot < num_experts else 1.0
    if not low - 1e-9 <= share <= high + 1e-9:
        text = f"{num_hot} hot of {num_experts} experts and k = {top_k} allow shares from {low:.6g} to {high:.6g}"
        raise draw.bad("share", share, f"out of range: {text}")
    cold = num_experts - num_hot
    use = np.full(num_experts, top_k * (1 - share) / cold if cold else 0.0)
    use[experts] = top_k * share / num_hot
    return use


def _hot_set(draw: Draw, num_hot: int, shift: int = 0) -> np.ndarray:
    """``num_hot`` experts of a random order, ``shift`` sets further on."""
    if num_hot > draw.num_experts:
        raise draw.bad("hot_experts", num_hot, f"the model has {draw.num_experts} experts")
    order = draw.popularity_rng().permutation(draw.num_experts)
    return order[(shift * num_hot + np.arange(num_hot)) % draw.num_experts]


def hot_experts(p: HotExperts, draw: Draw) -> np.ndarray:
    """One hot set, the same at every step."""
    return rounded_use(draw, _hot(draw, _hot_set(draw, p.hot_experts), p.share))


class HotRank(Spec):
    """``share`` of all assignments goes to the experts that rank ``rank`` holds (contiguous placement)."""

    rank: Annotated[int, Field(ge=0)] = 0
    share: Share = 0.25


def hot_rank(p: HotRank, draw: Draw) -> np.ndarray:
    """One hot rank."""
    num_ranks = draw.topology.num_ranks
    if p.rank >= num_ranks:
        raise draw.bad("rank", p.rank, f"the cluster has ranks 0 to {num_ranks - 1}")
    if draw.num_experts % num_ranks:
        raise draw.bad("rank", p.rank, f"{draw.num_experts} experts do not divide over {num_ranks} ranks")
    each = draw.num_experts // num_ranks
    return rounded_use(draw, _hot(draw, p.rank * each + np.arange(each), p.share))


class Rotating(HotExperts):
    """The hot set moves on every ``period`` steps."""

    period: Count = 10


def rotating(p: Rotating, draw: Draw) -> np.ndarray:
    """A hot set that moves through the experts as steps go by."""
    return rounded_use(draw, _hot(draw, _hot_set(draw, p.hot_experts, draw.step // p.period), p.share))


class Burst(HotExperts):
    """Hot in the first ``length`` of every ``period`` steps, balanced in the others."""

    period: Count = 10
    length: Count = 2


def burst(p: Burst, draw: Draw) -> np.ndarray:
    """Bursts of a hot set between balanced steps."""
    if p.length > p.period:
        raise draw.bad("length", p.length, f"is longer than period = {p.period}")
    use = _hot(draw, _hot_set(draw, p.hot_experts), p.share)  # checked at quiet steps too
    return rounded_use(draw, use) if draw.step % p.period < p.length else balanced(NoParams(), draw)


class Empty(Spec):
    """``num_empty`` experts get no token at all, at most E - k of them; the others share evenly."""

    num_empty: Count = 1


def empty(p: Empty, draw: Draw) -> np.ndarray:
    """Experts without tokens."""
    used = draw.num_experts - p.num_empty
    if used < draw.top_k:
        text = f"k = {draw.top_k} of {draw.num_experts} experts leave at most {draw.num_experts - draw.top_k} empty"
        raise draw.bad("num_empty", p.num_empty, text)
    use = np.zeros(draw.num_experts)
    use[draw.popularity_rng().permutation(draw.num_experts)[:used]] = draw.top_k / used
    return rounded_use(draw, use)


class Grouped(Spec):
    """``num_groups``: of E / num_groups consecutive experts, by default the model's; it divides E and k. ``target``: as
    zipf has it, in every group; 1 is balanced."""

    num_groups: Count | None = None
    target: Annotated[float, Field(ge=1)] = 1.0


def grouped(p: Grouped, draw: Draw) -> np.ndarray:
    """Mixture of Grouped Experts (Pangu Pro MoE): every token has k / num_groups experts of each group, so that each
    rank gives every group the same number of its assignments. Inside of a group loads are Zipf's, and another expert
    is the most used one in each."""
    num_groups = _num_groups(p, draw)
    group = dataclasses.replace(draw, num_experts=draw.num_experts // num_groups, top_k=draw.top_k // num_groups)
    load = np.arange(1, group.num_experts + 1) ** -zipf_exponent(p.target, group)
    use, popularity, rng = group.top_k * load / load.sum(), draw.popularity_rng(), draw.step_rng()
    parts = [rounded_use(group, popularity.permutation(use), rng) for _ in range(num_groups)]
    return np.concatenate(parts, axis=1)


def _num_groups(p: Spec, draw: Draw) -> int:
    """Groups of experts that every token has equally many of; 1 of a generator that knows none."""
    if not isinstance(p, Grouped):
        return 1
    found = p.num_groups or draw.num_groups
    if found == 1:
        raise draw.bad("num_groups", p.num_groups, "give 2 or more groups; the model names none")
    if draw.num_groups not in (1, found):
        raise draw.bad("num_groups", found, f"the model has {draw.num_groups} groups of experts; leave it out")
    if draw.num_experts % found or draw.top_k % found:
        text = f"must divide the {draw.num_experts} experts and k = {draw.top_k}; choose another number of groups"
        raise draw.bad("num_groups", found, text)
    return found


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


#: generators that state loads, int64 [W, E]
STATED: dict[str, tuple[type[Spec], Callable[..., np.ndarray]]] = {
    "balanced": (NoParams, balanced),
    "zipf": (Zipf, zipf),
    "hot_experts": (HotExperts, hot_experts),
    "hot_rank": (HotRank, hot_rank),
    "rotating": (Rotating, rotating),
    "burst": (Burst, burst),
    "empty": (Empty, empty),
    "grouped": (Grouped, grouped),
}
#: generators that draw ids [T, k]
DRAWN: dict[str, tuple[type[Spec], Callable[..., np.ndarray]]] = {
    "uniform": (NoParams, uniform),
    "markov": (Markov, markov),
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
    num_groups = _num_groups(_params(workload, draw), draw)
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
    return uniform_counts(draw) if draw.generator == "uniform" else None


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
    num_groups = _num_groups(_params(workload, draw), draw)
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
