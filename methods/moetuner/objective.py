"""What a placement is judged by: load balance (O1) and communication (O2), relative to random placements.

O1 = sum over layers and ranks of |T_c,l - mean T_l|: the objective of ILP 1. O2 = sum over layers of z_l, the most
loaded pair of ranks: z_l = max over g1 != g2 of C_g1,g2,l / B_g1,g2, with C the tokens that go from rank g1 in layer l
to rank g2 in layer l + 1: the objective of ILP 2. Neither alone says which of two placements is better, so they are
added, each divided by its mean over random placements: a random placement has J = 2, and J = 0 would be perfect.

Interpretations: ILP 2's maximum runs over pairs of ranks (as printed, the sums inside it already do); what stays on a
rank costs nothing; the second x in C belongs to layer l + 1. J is ours: the paper minimises O1, then O2.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from harness.errors import bad
from methods.moetuner.profile import Profile

NUM_RANDOM = 32  # placements that make the yardstick


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A profile, and the ranks to place its experts on. ``cost``: 1 / B float64 [G, G], diagonal 0, the dearest pair
    1; ``node`` int [G]."""

    profile: Profile
    cost: np.ndarray
    node: np.ndarray

    @property
    def num_ranks(self) -> int:
        return len(self.node)

    @property
    def slots(self) -> tuple[int, int]:
        """Fewest and most experts of a rank over the whole model: E L / G, which need not be whole."""
        each = self.profile.num_experts * self.profile.num_layers / self.num_ranks
        return math.floor(each), math.ceil(each)

    @functools.cached_property
    def yardstick(self) -> tuple[float, float]:
        """Mean O1 and O2 of random placements with E / G experts on every rank."""
        rng = np.random.default_rng(0)
        every = [random_owner(self, rng) for _ in range(NUM_RANDOM)]
        return (
            float(np.mean([balance(self.profile, owner, self.num_ranks) for owner in every])),
            float(np.mean([communication(self, owner) for owner in every])),
        )


def random_owner(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """owner int [L, E] with as many experts on every rank (one more or less where they do not divide)."""
    profile = problem.profile
    ranks = np.arange(profile.num_experts) % problem.num_ranks
    return np.stack([rng.permutation(ranks) for _ in range(profile.num_layers)])


def cost_of(bandwidth: np.ndarray, num_ranks: int, where: str = "bandwidths") -> np.ndarray:
    """1 / B with diagonal 0, scaled so that the dearest pair costs 1. ``UserError`` for a matrix that is not
    [G, G], or in which a pair of ranks has no positive rate."""
    bandwidth = np.asarray(bandwidth, dtype=np.float64)
    if bandwidth.shape != (num_ranks, num_ranks):
        shape = " x ".join(map(str, bandwidth.shape))
        raise bad(where, shape, f"must be {num_ranks} x {num_ranks}, a rate for each pair of expert-parallel ranks")
    off = ~np.eye(num_ranks, dtype=bool)
    wrong = np.argwhere(off & ~(bandwidth > 0))
    if len(wrong):
        g1, g2 = wrong[0].tolist()
        raise bad(f"{where}[{g1}][{g2}]", float(bandwidth[g1, g2]), "no token could pass; give a rate above 0 (or inf)")
    if num_ranks > 1 and np.isinf(bandwidth[off]).all():
        raise bad(where, "inf", "no pair of ranks has a finite rate, so nothing costs anything; leave the matrix out")
    cost = np.where(off, 1 / np.where(off, bandwidth, 1.0), 0.0)
    return cost / cost.max() if num_ranks > 1 else cost


# ------------------------------------------------------------------------------------------------- the two objectives


def loads(profile: Profile, owner: np.ndarray, num_ranks: int) -> np.ndarray:
    """T [L, G] of ``owner`` int [L, E]."""
    return np.stack([np.bincount(o, p, num_ranks) for o, p in zip(owner, profile.load, strict=True)])


def crossings(profile: Profile, owner: np.ndarray, num_ranks: int) -> np.ndarray:
    """C float64 [L - 1, G, G]: tokens from rank to rank between successive layers."""
    on = (owner[:, :, None] == np.arange(num_ranks)).astype(np.float64)  # [L, E, G]
    return on[:-1].transpose(0, 2, 1) @ profile.flow.astype(np.float64) @ on[1:]


def balance(profile: Profile, owner: np.ndarray, num_ranks: int) -> float:
    """O1."""
    of_ranks = loads(profile, owner, num_ranks)
    return float(np.abs(of_ranks - of_ranks.mean(1, keepdims=True)).sum())


def communication(problem: Problem, owner: np.ndarray) -> float:
    """O2."""
    between = crossings(problem.profile, owner, problem.num_ranks)
    return float((between * problem.cost).max((1, 2)).sum()) if len(between) else 0.0


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one placement on one profile. Shares and ratios that have nothing to count are 0."""

    balance: float  # O1, tokens
    communication: float  # O2, tokens over the slowest link (times B of the dearest pair)
    objective: float  # J
    max_over_mean: float  # load of the busiest rank over the mean, mean over layers
    worst_max_over_mean: float  # of the worst layer
    cross_rank: float  # share of transitions between layers that leave their rank
    cross_node: float  # and their node


def score(problem: Problem, owner: np.ndarray, on: Profile | None = None) -> Score:
    """Of ``owner`` [L, E], on the problem's profile or on another one (held out); J is relative to random placements on
    that same profile."""
    if on is not None:
        problem = dataclasses.replace(problem, profile=on)
    profile, num_ranks = problem.profile, problem.num_ranks
    of_ranks, between = loads(profile, owner, num_ranks), crossings(profile, owner, num_ranks)
    o1, o2 = balance(profile, owner, num_ranks), communication(problem, owner)
    skew = of_ranks.max(1) / np.maximum(of_ranks.mean(1), 1e-300)
    away = problem.node[:, None] != problem.node
    whole = max(float(between.sum()), 1.0)
    j = sum(value / scale if scale else 0.0 for value, scale in zip((o1, o2), problem.yardstick, strict=True))
    return Score(
        o1,
        o2,
        j,
        float(skew.mean()),
        float(skew.max()),
        1 - float(np.trace(between, axis1=1, axis2=2).sum()) / whole if between.size else 0.0,
        float(between[:, away].sum()) / whole,
    )
