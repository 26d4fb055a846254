"""Beyond the paper: both programs at once. ILP 2 sees only one of the many optima of ILP 1; here experts keep changing
ranks after the two stages (and from other starting points, those of rivals), by annealing for J
(``methods.moetuner.objective``).

A profile is a sample, so what is minimised, and what decides between placements, is J as expected on as many other
tokens: counts are shrunk by what of them is chance (``Profile.expected``), and |T - mean| has the mean of a folded
normal around the shrunk T, with the variance of what was shrunk away and of a new count, about
sqrt((T - mean)^2 + (2 / pi) (1 + repeats) mean). Without the first, differences that are all chance (loads that are
even in truth) would be balanced at the cost of chains that are not.

The only proven bound of J is that of the load balance.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from methods.moetuner import balance, mapping
from methods.moetuner.balance import Stage
from methods.moetuner.objective import Problem, communication, loads, score

MOVES, MOST_MOVES = 4000, 2_000_000  # of a round: for each expert of each layer, and at most
ROUNDS, PATIENCE = 12, 5  # PATIENCE: rounds without gain that end it
LINES = 2  # starting points that are annealed
WARMTHS = (0.3, 0.1, 0.3, 0.03)
TRAFFIC = 0.02  # weight of all traffic beside O2's 1: where the dearest pair does not change, less of it is better

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Joint:
    """``owner`` int [L, E]; the stages that it began with, and J before and after. ``ended``: why."""

    owner: np.ndarray
    first: Stage
    second: Stage
    before: float
    after: float
    bound: float
    rounds: int
    ended: str
    time_s: float


@functools.lru_cache(maxsize=4)
def two_stages(problem: Problem, gap: float, time_limit_s: float) -> tuple[Stage, Stage]:
    """ILP 1, then ILP 2, as the paper has them. A third of the time is ILP 1's at most. The last few are kept, as
    several planners start from them."""
    first = balance.solve(problem.profile.load, problem.num_ranks, gap, time_limit_s / 3)
    return first, mapping.solve(problem, first.owner, gap, time_limit_s - first.time_s)


def expected(problem: Problem, owner: np.ndarray) -> float:
    """What is minimised: J as expected on as many other tokens; in units of this profile's yardstick."""
    other = dataclasses.replace(problem, profile=problem.profile.expected)
    of_ranks = loads(other.profile, owner, problem.num_ranks)
    mean = of_ranks.mean(1, keepdims=True)
    o1 = float(np.sqrt((of_ranks - mean) ** 2 + blur(problem) * mean).sum())
    parts = zip((o1, communication(other, owner)), problem.yardstick, strict=True)
    return sum(value / scale if scale else 0.0 for value, scale in parts)


def blur(problem: Problem) -> float:
    """What stands beside (T - mean)^2, for each token of the mean."""
    return 2 / math.pi * (1 + problem.profile.repeats[0])


def solve(
    problem: Problem,
    gap: float = 0.025,
    time_limit_s: float = math.inf,
    rounds: int = ROUNDS,
    starts: Sequence[np.ndarray] = (),
    say: Say = lambda text: None,
) -> Joint:
    """At most ``rounds`` rounds of annealing, in turn from the best two of the two stages' placement and ``starts``
    (int [L, E] each), so that it is expected to be no worse than any of them. Without a time limit it is the same
    whenever it runs."""
    began = time.perf_counter()
    say("ILP 1 and ILP 2")
    first, second = two_stages(problem, gap, time_limit_s / 2)
    lines = [(expected(problem, owner), owner) for owner in (second.owner, *starts)]  # value and placement of each
    lines = sorted(lines, key=lambda line: line[0])[:LINES]
    idle, done, ended = 0, 0, "search"
    for done in range(1, rounds + 1):
        if time.perf_counter() - began > time_limit_s:
            ended = "time limit"
            break
        here, best = done % len(lines), min(value for value, _ in lines)
        say(f"annealing, round {done} of at most {rounds}: expected J = {best:.4f}")
        found = anneal(problem, lines[here][1], WARMTHS[(done // len(lines)) % len(WARMTHS)], done)
        value = expected(problem, found)
        idle = 0 if value < best * (1 - 1e-4) else idle + 1
        if value < lines[here][0]:
            lines[here] = (value, found)
        if idle >= PATIENCE * len(lines):
            break
    owner = min(lines, key=lambda line: line[0])[1]
    scale = problem.yardstick[0]
    bound = first.bound / scale if scale else 0.0
    before, after = (score(problem, each).objective for each in (second.owner, owner))
    return Joint(owner, first, second, before, after, bound, done, ended, time.perf_counter() - began)


def anneal(problem: Problem, start: np.ndarray, warmth: float, seed: int) -> np.ndarray:
    """One round from ``start`` int [L, E]. Every rank keeps its number of experts."""
    o1, o2 = (1 / each if each else 0.0 for each in problem.yardstick)
    traffic = float(problem.profile.flow.sum() * problem.cost.mean())
    weights = (o1, o2, TRAFFIC / traffic if traffic else 0.0)
    other = dataclasses.replace(problem, profile=problem.profile.expected)
    return search(other, start, weights, warmth, problem.profile.num_layers > 2, seed, blur(problem))


def search(
    problem: Problem,
    start: np.ndarray,
    weights: tuple[float, float, float],
    warmth: float,
    paired: bool,
    seed: int,
    blur: float = 0.0,
) -> np.ndarray:
    """``methods.moetuner.anneal.search`` from a copy of ``start``."""
    from methods.moetuner import anneal as kernel  # numba takes its time to import

    profile, owner = problem.profile, start.astype(np.int64).copy()
    moves = min(MOVES * owner.size, MOST_MOVES)
    kernel.search(
        *(owner, profile.load.astype(np.float64), profile.flow.astype(np.float64), problem.cost),
        *(np.array(weights), moves, warmth, paired, blur, np.random.default_rng(seed)),
    )
    return owner
