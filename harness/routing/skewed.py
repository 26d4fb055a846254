"""Loads whose experts are as popular at every step: all the same, by a law, or some of them not at all."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Annotated

import numpy as np
from pydantic import Field

from harness.routing.draw import Draw, NoParams, rounded_use
from harness.specs import Count, Spec

SCALE_GRID = 2.0**-20  # of a scale of log-loads
STEEPEST = 2.0**20


def balanced(p: NoParams, draw: Draw) -> np.ndarray:
    """Every expert gets the same number of *each rank's* assignments, one more or less where it does not divide.

    The experts that get one more are a run of an order in which nodes alternate fastest, then ranks, and each rank
    goes on where the one before it stopped: so every pair of ranks, every pair of nodes and the sum over all ranks
    are balanced to one assignment too (experts placed contiguously).
    """
    order = alternating(draw, draw.step_rng())
    counts, start = np.empty((len(draw.tokens), draw.num_experts), np.int64), 0
    for rank, num_tokens in enumerate(draw.tokens):
        counts[rank], more = divmod(num_tokens * draw.top_k, draw.num_experts)
        counts[rank, order[(start + np.arange(more)) % draw.num_experts]] += 1
        start += more
    return counts


def alternating(draw: Draw, rng: np.random.Generator) -> np.ndarray:
    """Experts in a random order in which nodes alternate fastest, then ranks; just a random one where experts do not
    divide over the ranks."""
    ranks = draw.topology.shape if draw.num_experts % draw.topology.num_ranks == 0 else ()
    grid = np.arange(draw.num_experts).reshape(*ranks, -1)
    for axis, size in enumerate(grid.shape):
        grid = grid.take(rng.permutation(size), axis)
    return grid.T.ravel()


def experts_per_rank(draw: Draw, param: str, value: object) -> int:
    """``UserError`` naming ``param`` where experts do not divide over the ranks."""
    num_ranks = draw.topology.num_ranks
    if draw.num_experts % num_ranks:
        raise draw.bad(param, value, f"{draw.num_experts} experts do not divide over {num_ranks} ranks")
    return draw.num_experts // num_ranks


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
    check_reachable(target, draw)
    index = np.arange(1, draw.num_experts + 1, dtype=np.float64)

    def excess(exponent: float) -> float:
        return draw.num_experts / float((index**-exponent).sum()) - target

    if excess(0.0) >= 0:
        return 0.0
    if excess(64.0) <= 0:
        return 64.0
    from scipy.optimize import brentq  # slow to import, and not every workload needs it

    return float(brentq(excess, 0.0, 64.0))


def check_reachable(target: float, draw: Draw, param: str = "target") -> None:
    """``UserError`` where no k distinct experts a token give a max/mean of ``target``, which ``param`` asks for."""
    limit = draw.num_experts / draw.top_k
    if target > limit * (1 + 1e-9):
        text = f"{draw.top_k} distinct of {draw.num_experts} experts allow at most E / k = {limit:g}"
        raise draw.bad(param, target, f"unreachable: {text}")


class Lognormal(Spec):
    """``target``: load of the most used expert over the mean load, 1 to E / k."""

    target: Annotated[float, Field(ge=1)] = 2.0


def lognormal(p: Lognormal, draw: Draw) -> np.ndarray:
    """The logarithms of loads are normal: the i-th least used expert has the (i - 1/2) / E quantile, and max/mean is
    ``target``."""
    check_reachable(p.target, draw)
    use = draw.top_k * shares_of_logs(normal_quantiles(draw.num_experts), p.target)
    return rounded_use(draw, use[draw.popularity_rng().permutation(draw.num_experts)])


@functools.lru_cache(maxsize=8)
def normal_quantiles(count: int) -> np.ndarray:
    """Of the standard normal distribution in the middle of ``count`` parts equally likely, ascending."""
    inverse = statistics.NormalDist().inv_cdf
    return np.array([inverse((index + 0.5) / count) for index in range(count)])


def shares_of_logs(logs: np.ndarray, target: float) -> np.ndarray:
    """Loads in proportion to exp(s * ``logs`` [E]), summing to 1, with s >= 0 such that max/mean is ``target``: less
    than that by 1e-5 of it at most, as s is rounded down (by 1e-6) so that it is the same on all machines."""
    below, num_experts = logs - logs.max(), len(logs)  # [E], at most 0

    def reached(scale: float) -> float:
        return num_experts / float(np.exp(scale * below).sum())

    low, high = 0.0, 1.0
    while reached(high) < target and high < STEEPEST:
        low, high = high, 2 * high
    while high - low > SCALE_GRID / 4:
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < target else (low, middle)
    load = np.exp(np.floor(low / SCALE_GRID) * SCALE_GRID * below)
    return load / load.sum()


class Empty(Spec):
    """``num_empty`` experts get no token at all, nor do any of ``empty_ranks`` ranks (contiguous placement): at most
    E - k in all. The others share evenly."""

    num_empty: Annotated[int, Field(ge=0)] = 1
    empty_ranks: Annotated[int, Field(ge=0)] = 0


def empty(p: Empty, draw: Draw) -> np.ndarray:
    """Experts without tokens, and ranks that receive none."""
    if not p.num_empty and not p.empty_ranks:
        raise draw.bad("num_empty", 0, "leaves no expert empty; give 1 or more, or empty_ranks, or use balanced")
    rng = draw.popularity_rng()
    order = rng.permutation(draw.num_experts)  # those without tokens last
    each = experts_per_rank(draw, "empty_ranks", p.empty_ranks) if p.empty_ranks else 0
    used = draw.num_experts - p.num_empty - p.empty_ranks * each
    if used < draw.top_k:
        text = f"k = {draw.top_k} of {draw.num_experts} experts leave at most {draw.num_experts - draw.top_k} empty"
        raise draw.bad("empty_ranks" if p.empty_ranks else "num_empty", p.empty_ranks or p.num_empty, text)
    if p.empty_ranks:
        idle = np.isin(order // each, rng.permutation(draw.topology.num_ranks)[: p.empty_ranks])
        order = np.concatenate([order[~idle], order[idle]])
    use = np.zeros(draw.num_experts)
    use[order[:used]] = draw.top_k / used
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
    num_groups = groups_of(p, draw)
    group = dataclasses.replace(draw, num_experts=draw.num_experts // num_groups, top_k=draw.top_k // num_groups)
    load = np.arange(1, group.num_experts + 1) ** -zipf_exponent(p.target, group)
    use, popularity, rng = group.top_k * load / load.sum(), draw.popularity_rng(), draw.step_rng()
    parts = [rounded_use(group, popularity.permutation(use), rng) for _ in range(num_groups)]
    return np.concatenate(parts, axis=1)


def groups_of(p: Spec, draw: Draw) -> int:
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
