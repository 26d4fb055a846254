"""Beyond the paper: both programs at once. ILP 2 sees only one of the many optima of ILP 1; here experts keep changing
ranks after the two stages (and from other starting points), by annealing for J (``methods.moetuner.objective``).

A profile is a sample, so differences of load within its noise mean nothing on other tokens: what is minimised, and what
decides between placements, is J as expected on as many other tokens. There |T - mean| has the mean of a folded normal
with the observed one as its centre and the variance of two counts, about sqrt((T - mean)^2 + 2 (2 / pi) mean).

The only proven bound of J is that of the load balance.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from methods.moetuner import balance, mapping
from methods.moetuner.balance import Stage
from methods.moetuner.objective import Problem, communication, loads, score

BLUR = 4 / math.pi
MOVES, MOST_MOVES = 4000, 2_000_000  # of a round: for each expert of each layer, and at most
ROUNDS, PATIENCE = 12, 5  # PATIENCE: rounds without gain that end it
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


def two_stages(problem: Problem, gap: float, time_limit_s: float) -> tuple[Stage, Stage]:
    """ILP 1, then ILP 2, as the paper has them. A third of the time is ILP 1's at most."""
    first = balance.solve(problem.profile.load, problem.num_ranks, gap, time_limit_s / 3)
    return first, mapping.solve(problem, first.owner, gap, time_limit_s - first.time_s)


def expected(problem: Problem, owner: np.ndarray) -> float:
    """What is minimised: J as expected on as many other tokens; in units of this profile's yardstick."""
    of_ranks = loads(problem.profile, owner, problem.num_ranks)
    mean = of_ranks.mean(1, keepdims=True)
    o1 = float(np.sqrt((of_ranks - mean) ** 2 + BLUR * mean).sum())
    parts = zip((o1, communication(problem, owner)), problem.yardstick, strict=True)
    return sum(value / scale if scale else 0.0 for value, scale in parts)


def solve(
    problem: Problem,
    gap: float = 0.025,
    time_limit_s: float = math.inf,
    rounds: int = ROUNDS,
    starts: Sequence[np.ndarray] = (),
    say: Say = lambda text: None,
) -> Joint:
    """At most ``rounds`` rounds of annealing, in turn from the two stages' placement and from ``starts`` (int [L, E]
    each); the same without a time limit whenever it runs."""
    began = time.perf_counter()
    say("ILP 1 and ILP 2")
    first, second = two_stages(problem, gap, time_limit_s / 2)
    lines = [(expected(problem, owner), owner) for owner in (second.owner, *starts)]  # value and placement of each
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
    return search(problem, start, weights, warmth, problem.profile.num_layers > 2, seed)


def search(
    problem: Problem, start: np.ndarray, weights: tuple[float, float, float], warmth: float, paired: bool, seed: int
) -> np.ndarray:
    """``methods.moetuner.anneal.search`` from a copy of ``start``."""
    from methods.moetuner import anneal as kernel  # numba takes its time to import

    profile, owner = problem.profile, start.astype(np.int64).copy()
    moves = min(MOVES * owner.size, MOST_MOVES)
    kernel.search(
        *(owner, profile.load.astype(np.float64), profile.flow.astype(np.float64), problem.cost),
        *(np.array(weights), moves, warmth, paired, BLUR, np.random.default_rng(seed)),
    )
    return owner
