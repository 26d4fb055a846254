"""How many chunks: FSMoE's optimal pipeline degree (arXiv 2501.10714, sections 4.2 to 4.4 and Algorithm 1).

A layer runs its r dispatches, then its gradient slice (t_gar), then its r combines on the inter-node lane, all-gathers
and reduce-scatters on the intra-node lane, experts on the compute lane. Which lane is the bottleneck decides among
four cases; the time of each is a formula in r. ``slsqp_degree`` minimises them as the paper does, ``scan_degree``
tries every allowed degree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from methods.fsmoe.costs import Array, LayerCosts

DEGREES = (1, 2, 4, 8)

#: case -> the conjunctions of predicates under which it holds; -2 is "not Q2"
CASES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1, -2, 4), (1, 2, 5), (-1, -3, 6), (-1, 3, 7)),  # inter-node bound: all-to-alls and the gradient slice
    2: ((1, 2, -5), (-1, 3, -7)),  # expert bound
    3: ((1, -2, -4),),  # all-to-all bound
    4: ((-1, -3, -6),),  # intra-node bound
}
MAX_ITERATIONS = 20  # of SLSQP: every search that converges at all on the paper's grid needs fewer than 15
TOLERANCE_S = 1e-8  # of a rounded degree's conditions: the authors' 1e-5, whose unit is the millisecond


class Chunk(NamedTuple):
    """Seconds of one chunk of each operation (t_a2a, t_ag, t_rs, t_exp of the paper), arrays or floats."""

    a2a: Any
    ag: Any
    rs: Any
    exp: Any


def chunk_times(costs: LayerCosts, degree: ArrayLike) -> Chunk:
    """One chunk's times [...] if the layer is cut into ``degree`` [...]."""
    return Chunk(*(part.chunk_s(degree) for part in (costs.a2a, costs.ag, costs.rs, costs.experts)))


def margins(t: Chunk, r: Any, t_gar: Any) -> tuple[Any, ...]:
    """Left minus right side of Q1 to Q7 in seconds: a predicate holds where its margin is positive."""
    q5 = t_gar - (r * t.exp - 2 * (r - 1) * t.a2a + t.ag + t.rs)
    return (
        t.a2a - t.ag,
        r * t.exp - 2 * (r - 1) * t.a2a,
        r * t.exp - (r - 1) * (t.ag + t.rs),
        t_gar - (t.ag + t.rs),
        q5,
        t_gar - (r * t.ag + r * t.rs - 2 * (r - 1) * t.a2a),
        q5,  # Q7 is the same expression as Q5, printed in another order
    )


def case_time(case: int, t: Chunk, r: Any, t_gar: Any) -> Any:
    """t_moe(r) of a case."""
    if case == 1:
        return 2 * r * t.a2a + t_gar
    if case == 2:
        return 2 * t.a2a + t.ag + t.rs + r * t.exp
    if case == 3:
        return 2 * r * t.a2a + t.ag + t.rs
    return 2 * t.a2a + r * (t.ag + t.rs)


def case_of(costs: LayerCosts, degree: ArrayLike, t_gar: ArrayLike = 0.0) -> Array:
    """The one case (1 to 4) that holds at ``degree`` with a gradient slice of ``t_gar`` seconds."""
    found = margins(chunk_times(costs, degree), np.asarray(degree), np.asarray(t_gar))
    holds = [np.asarray(margin > 0) for margin in found]

    def all_of(conjunction: tuple[int, ...]) -> Any:
        return np.logical_and.reduce(
            np.broadcast_arrays(*(holds[abs(q) - 1] == (q > 0) for q in conjunction)),
        )

    conditions = [np.logical_or.reduce([all_of(c) for c in branches]) for branches in CASES.values()]
    return np.select(conditions, list(CASES), default=0)


def closed_form(costs: LayerCosts, degree: ArrayLike, t_gar: ArrayLike = 0.0) -> Array:
    """The four-case time of a layer [...] in seconds (the paper's t_moe)."""
    degree = np.asarray(degree)
    t = chunk_times(costs, degree)
    which = case_of(costs, degree, t_gar)
    times = [np.broadcast_to(case_time(case, t, degree, np.asarray(t_gar)), which.shape) for case in CASES]
    return np.select([which == case for case in CASES], times)


def overlappable(costs: LayerCosts, degree: ArrayLike) -> Array:
    """t_olp,moe(r) [...]: seconds for which the inter-node lane idles between the dispatches and the combines.

    The case formulas are 2 r t_a2a + max(t_gar, t_olp): a slice costs nothing until it is longer than this.
    Zero in case 1, which holds without a slice only where t_ag and t_rs lie far apart on either side of t_a2a.
    """
    return closed_form(costs, degree) - 2 * np.asarray(degree) * costs.a2a.chunk_s(degree)


def degree_terms(costs: LayerCosts, degrees: Sequence[int] = DEGREES) -> tuple[Array, Array]:
    """Two tables [R, N] that price any slice: a layer of degree r takes ``link[r] + max(t_gar, overlappable[r])``."""
    r = np.reshape(np.asarray(degrees, dtype=np.float64), (-1, *(1,) * len(costs.shape)))
    link = 2 * r * np.broadcast_to(costs.a2a.chunk_s(r), (len(degrees), *costs.shape))
    return link, overlappable(costs, r)


def scan_degree(costs: LayerCosts, t_gar: ArrayLike = 0.0, degrees: Sequence[int] = DEGREES) -> tuple[Array, Array]:
    """The best of ``degrees`` for each layer and its time: (degree [N], seconds [N]). The smaller one of two equals."""
    link, olp = degree_terms(costs, degrees)
    times = link + np.maximum(t_gar, olp)
    best = np.argmin(times, axis=0)
    return np.asarray(degrees)[best], np.min(times, axis=0)


def slsqp_degree(
    costs: LayerCosts, t_gar: float = 0.0, degrees: Sequence[int] = DEGREES, starts: Sequence[float] = DEGREES
) -> tuple[int, float]:
    """Algorithm 1 for one layer: (degree, seconds).

    Each case's time is minimised over real r >= 1 under its condition by SLSQP; the best degree of the four, rounded,
    wins. Interpretation, after the authors' code: SLSQP runs from each of ``starts``; a real optimum is rounded both
    ways to an allowed one (powers of two up to 8), which must still meet the case's condition; each conjunction of
    a condition is a search of its own, as SLSQP knows no "or"; and degree 1 is kept if no rounded optimum is feasible.
    """
    parts = [
        (float(part.alpha_s), float(part.n * part.beta_s)) for part in (costs.a2a, costs.ag, costs.rs, costs.experts)
    ]

    def chunk(r: float) -> Chunk:
        return Chunk(*(alpha + volume / r for alpha, volume in parts))

    def time_s(case: int, r: float) -> float:
        return case_time(case, chunk(r), r, t_gar)

    def slack_s(conjunction: tuple[int, ...], r: float) -> Array:
        found = margins(chunk(r), r, t_gar)
        return np.array([math.copysign(1, q) * found[abs(q) - 1] for q in conjunction])

    unit_s = time_s(2, 1)  # SLSQP's tolerances are absolute: it works in units of the layer's time

    def real_degree(case: int, conjunction: tuple[int, ...], start: float) -> float:
        def objective(x: Array) -> float:
            return time_s(case, float(x[0])) / unit_s

        def feasible(x: Array) -> Array:
            return slack_s(conjunction, float(x[0])) / unit_s

        found = minimize(  # type: ignore[call-overload]
            objective,
            [start],
            method="SLSQP",
            bounds=[(1.0, None)],
            constraints={"type": "ineq", "fun": feasible},
            options={"maxiter": MAX_ITERATIONS},
        )
        return float(found.x[0])

    best: list[tuple[float, int]] = []
    for case, branches in CASES.items():
        for conjunction in branches:
            optima = {real_degree(case, conjunction, float(start)) for start in starts}
            for r in set().union(*(_neighbours(optimum, degrees) for optimum in optima)):
                if slack_s(conjunction, r).min() >= -TOLERANCE_S:
                    best.append((time_s(case, r), r))
    time, degree = min(best, default=(float(closed_form(costs, degrees[0], t_gar)), degrees[0]))
    return degree, time


def _neighbours(r: float, degrees: Sequence[int]) -> set[int]:
    """The allowed degrees just below and above a real one."""
    if not math.isfinite(r):
        return set()
    below = max((d for d in degrees if d <= r), default=min(degrees))
    above = min((d for d in degrees if d >= r), default=max(degrees))
    return {below, above}
