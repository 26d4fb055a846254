"""Beyond the paper: both programs at once. ILP 2 sees only one of the many optima of ILP 1; here experts keep changing
ranks after the two stages, for J (``methods.moetuner.objective``), by annealing from the two stages' result. So J is
never above theirs. The only proven bound is that of the load balance."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np

from methods.moetuner import balance, mapping
from methods.moetuner.balance import Stage
from methods.moetuner.objective import Problem, score

MOVES, MOST_MOVES = 4000, 2_000_000  # of a round: for each expert of each layer, and at most
ROUNDS, PATIENCE = 12, 4  # PATIENCE: rounds without gain that end it
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


def solve(
    problem: Problem,
    gap: float = 0.025,
    time_limit_s: float = math.inf,
    rounds: int = ROUNDS,
    say: Say = lambda text: None,
) -> Joint:
    """At most ``rounds`` rounds of annealing; the same without a time limit whenever it runs."""
    began = time.perf_counter()
    say("ILP 1 and ILP 2")
    first, second = two_stages(problem, gap, time_limit_s / 2)
    before = score(problem, second.owner).objective
    owner, best, idle, done, ended = second.owner.copy(), before, 0, 0, "search"
    for done in range(1, rounds + 1):
        if time.perf_counter() - began > time_limit_s:
            ended = "time limit"
            break
        say(f"annealing, round {done} of at most {rounds}: J = {best:.4f} (two stages: {before:.4f})")
        found = anneal(problem, owner, WARMTHS[(done - 1) % len(WARMTHS)], done)
        value = score(problem, found).objective
        idle = 0 if value < best - 1e-4 * best else idle + 1
        if value < best:
            owner, best = found, value
        if idle >= PATIENCE:
            break
    scale = problem.yardstick[0]
    bound = first.bound / scale if scale else 0.0
    return Joint(owner, first, second, before, best, bound, done, ended, time.perf_counter() - began)


def anneal(
    problem: Problem, start: np.ndarray, warmth: float, seed: int, weights: tuple[float, float, float] | None = None
) -> np.ndarray:
    """One round from ``start`` int [L, E]; ``weights``: of O1, O2 and all traffic by its cost (by default J's). Every
    rank keeps its number of experts."""
    from methods.moetuner import anneal as kernel  # numba takes its time to import

    profile, owner = problem.profile, start.astype(np.int64).copy()
    if weights is None:
        o1, o2 = (1 / each if each else 0.0 for each in problem.yardstick)
        traffic = float((profile.flow.sum((1, 2))).sum() * problem.cost.mean())
        weights = (o1, o2, TRAFFIC / traffic if traffic else 0.0)
    moves = min(MOVES * owner.size, MOST_MOVES)
    kernel.search(
        *(owner, profile.load.astype(np.float64), profile.flow.astype(np.float64), problem.cost),
        *(np.array(weights), moves, warmth, profile.num_layers > 2, np.random.default_rng(seed)),
    )
    return owner
