"""HierD-ES: which two experts should change places (HierMoE, arXiv 2508.09591, section IV, eqs. 8 and 9).

Z[u] is the number of tokens of which group u (a unit of a level) holds an expert. Exchanging the places of experts a
(in group A) and b (in B) changes Z in these two groups alone, by numbers that statistics of the tokens give exactly:

    sole[a]       tokens that need a and nothing else in A
    both[a, b]    those of them that need b too: when b comes to A, A keeps them
    present[b, u] tokens that need b and have some expert in u; load[b] - present[b, A]: tokens that b would bring to A

    dZ[A] = -sole[a] + both[a, b] + load[b] - present[b, A], and B likewise.

All are sums over tokens, so ranks add theirs up in one all-reduce for all layers. The objective is the predicted time
of the dimension in use, with the maximum over groups made smooth, as otherwise most swaps change nothing.

Interpretations: Z counts the tokens of all ranks (the statistics say nothing finer), over G, so that sizes are one
rank's on average, as in ``methods.hiermoe.planner``. A swap is proposed only if it lowers the objective; of equals the
first pair by index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import logsumexp

from harness.errors import bad
from harness.placement import Placement
from harness.routing.types import Routing
from harness.topology import Topology
from methods.hiermoe.counts import Array, count, stages
from methods.hiermoe.planner import PlannerModel, choose

MaxFunction = Literal["smooth", "plain", "log-sum-exp"]
GAMMA = 10.0


class Swap(NamedTuple):
    """Experts r* and c*, and the objective without and with the swap, in seconds; r = c = -1 where none pays."""

    r: int
    c: int
    before_s: float
    after_s: float


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which levels count with what weight: of HDd on a cluster, one way. ``gamma``: of smooth-max(x) = (sum
    x^gamma)^(1 / gamma), and of log-sum-exp, s / gamma log sum exp(gamma x / s), with s the rows of a group if nothing
    were duplicate and all groups alike (the paper does not say in which unit it takes the logarithm)."""

    levels: tuple[int, ...]  # b of every stage
    seconds_per_row: tuple[float, ...]  # of the largest group's tokens, one rank's
    alpha_s: float
    function: MaxFunction = "smooth"
    gamma: float = GAMMA

    def __post_init__(self) -> None:
        if self.function not in ("smooth", "plain", "log-sum-exp"):
            raise bad("options.max", self.function, "must be smooth, plain or log-sum-exp")
        if not 1 <= self.gamma <= 100:
            raise bad("options.gamma", self.gamma, "must be 1 to 100")

    @classmethod
    def of(
        cls,
        model: PlannerModel,
        dimension: int,
        row_bytes: float,
        function: MaxFunction = "smooth",
        gamma: float = GAMMA,
    ) -> Objective:
        chain = stages(dimension, model.num_levels)
        costs = [model.cost(stage) for stage in chain]
        weights = [
            cost.beta_s_per_byte * model.size(stage) * row_bytes for cost, stage in zip(costs, chain, strict=True)
        ]
        return cls(
            tuple(stage.b for stage in chain), tuple(weights), sum(cost.alpha_s for cost in costs), function, gamma
        )

    @classmethod
    def unpriced(cls, dimension: int, topology: Topology, function: MaxFunction, gamma: float) -> Objective:
        """Where no costs are known: rows count the same on all levels."""
        levels = tuple(stage.b for stage in stages(dimension, topology.num_levels))
        return cls(levels, (1.0,) * len(levels), 0.0, function, gamma)

    def value_s(self, filled: Sequence[Array], num_rows: int, num_ranks: int) -> float:
        """Of tokens per group [U_b], for each level in use; ``num_rows``: (token, expert) pairs in all."""
        total = self.alpha_s
        for weight, tokens in zip(self.seconds_per_row, filled, strict=True):
            total += weight * self.maximum(np.asarray(tokens, dtype=np.float64), num_rows / len(tokens)) / num_ranks
        return float(total)

    def maximum(self, x: Array, scale: float) -> float:
        """The maximum of x [U] >= 0, plain or smooth."""
        most = float(x.max(initial=0))
        if self.function == "plain" or not most:
            return most
        if self.function == "smooth":
            return most * float(((x / most) ** self.gamma).sum() ** (1 / self.gamma))
        return scale * float(logsumexp(self.gamma * x / scale) / self.gamma)


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What tokens say of all swaps of one layer, on the levels in use; additive over tokens. int32."""

    load: Array  # [E]
    sole: Array  # [levels, E]
    both: Array  # [levels, E, E]
    present: Array  # [levels, E, U], U of the finest level
    filled: Array  # [levels, U]

    @classmethod
    def empty(cls, num_experts: int, num_levels: int, num_units: int) -> Statistics:
        shapes = (
            (num_experts,),
            (num_levels, num_experts),
            (num_levels, num_experts, num_experts),
            (num_levels, num_experts, num_units),
            (num_levels, num_units),
        )
        return cls(*(np.zeros(shape, dtype=np.int32) for shape in shapes))

    def flat(self) -> Array:
        """One array, for the all-reduce; ``unflat`` brings it back."""
        return np.concatenate([getattr(self, field.name).ravel() for field in dataclasses.fields(self)])

    def unflat(self, flat: Array) -> Statistics:
        parts, start = [], 0
        for field in dataclasses.fields(self):
            like = getattr(self, field.name)
            parts.append(flat[start : start + like.size].reshape(like.shape))
            start += like.size
        return Statistics(*parts)


def groups(owner: Array, topology: Topology, levels: Sequence[int]) -> Array:
    """Group of every expert at each level in use, int32 [levels, E]."""
    return np.stack([topology.unit_of(level - 1)[owner] for level in levels]).astype(np.int32)


def collect(ids: Array, group: Array, num_units: int) -> Statistics:
    """Of tokens ids int [T, k], -1 where one is dropped; ``group`` [levels, E] as of ``groups``. O(levels T k^2)."""
    found = Statistics.empty(group.shape[1], len(group), num_units)
    tokens = np.ascontiguousarray(ids, dtype=np.int32)
    from methods.hiermoe import kernels  # numba takes its time to import

    kernels.collect(tokens, group, found.load, found.sole, found.both, found.present, found.filled)
    return found


def best_swap(statistics: Statistics, group: Array, objective: Objective, num_ranks: int) -> Swap:
    """(r*, c*) by trying all pairs, O(levels E^2)."""
    if not statistics.load.any():
        return Swap(-1, -1, objective.alpha_s, objective.alpha_s)
    scales = statistics.load.sum() / (group.max(1) + 1.0)
    if objective.function == "smooth":
        scales = statistics.filled.max(1).astype(np.float64)  # any will do; this one keeps the powers in range
    weights = np.asarray(objective.seconds_per_row)
    kind = {"smooth": 0, "plain": 1, "log-sum-exp": 2}[objective.function]
    from methods.hiermoe import kernels

    given = (statistics.load, statistics.sole, statistics.both, statistics.present, statistics.filled)
    r, c, before, after = kernels.search(*given, group, weights, scales, kind, objective.gamma)
    return Swap(int(r), int(c), objective.alpha_s + before / num_ranks, objective.alpha_s + after / num_ranks)


@dataclasses.dataclass
class Swapping:
    """An update every ``every`` steps, from the routing of the step before, of ``pairs`` swaps."""

    model: PlannerModel
    row_bytes: float
    every: int = 1
    pairs: int = 1
    function: MaxFunction = "smooth"
    gamma: float = GAMMA

    def best(self, routing: Routing, placement: Placement) -> Swap:
        topology = Topology(self.model.cluster.shape)
        times = self.model.times(count(routing, placement.owner, topology), self.row_bytes)
        objective = Objective.of(self.model, choose(times), self.row_bytes, self.function, self.gamma)
        group = groups(placement.owner, topology, objective.levels)
        return best_swap(collect(routing.ids, group, topology.num_ranks), group, objective, topology.num_ranks)

    def update(self, step: int, routing: Routing, placement: Placement) -> Placement:
        """The placement for the next step."""
        if (step + 1) % self.every:
            return placement
        for _ in range(self.pairs):
            swap = self.best(routing, placement)
            if swap.r < 0:
                break
            placement = placement.swapped([(swap.r, swap.c)])
        return placement
