"""Loads of which a set of experts gets a stated share: one that stays, moves or comes in bursts."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from harness.routing.draw import Draw, NoParams, rounded_use
from harness.routing.skewed import alternating, balanced, experts_per_rank
from harness.specs import Count, Spec

Share = Annotated[float, Field(gt=0, le=1)]


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


def _hot_set(draw: Draw, num_hot: int, shift: int = 0, spread: bool = False) -> np.ndarray:
    """``num_hot`` experts of a random order, ``shift`` sets further on. ``spread``: over nodes and ranks."""
    if num_hot > draw.num_experts:
        raise draw.bad("hot_experts", num_hot, f"the model has {draw.num_experts} experts")
    rng = draw.popularity_rng()
    order = alternating(draw, rng) if spread else rng.permutation(draw.num_experts)
    return order[(shift * num_hot + np.arange(num_hot)) % draw.num_experts]


def hot_experts(p: HotExperts, draw: Draw) -> np.ndarray:
    """One hot set, the same at every step."""
    return rounded_use(draw, _hot(draw, _hot_set(draw, p.hot_experts), p.share))


def spread_hot_experts(p: HotExperts, draw: Draw) -> np.ndarray:
    """One hot set with as many experts on each node and rank, or one more (contiguous placement): experts are as hot as
    ``hot_experts`` has them, ranks are not."""
    experts_per_rank(draw, "hot_experts", p.hot_experts)
    return rounded_use(draw, _hot(draw, _hot_set(draw, p.hot_experts, spread=True), p.share))


class HotRank(Spec):
    """``share`` of all assignments goes to the experts that rank ``rank`` holds (contiguous placement)."""

    rank: Annotated[int, Field(ge=0)] = 0
    share: Share = 0.25


def hot_rank(p: HotRank, draw: Draw) -> np.ndarray:
    """One hot rank."""
    num_ranks = draw.topology.num_ranks
    if p.rank >= num_ranks:
        raise draw.bad("rank", p.rank, f"the cluster has ranks 0 to {num_ranks - 1}")
    each = experts_per_rank(draw, "rank", p.rank)
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
