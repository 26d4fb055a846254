"""ILP 1 of MoETuner: experts of a layer into G clusters of as equal a load as can be. Layers are independent.

    min sum_c |T_c - mean|   s.t.  T_c = sum_e P_e x_c,e,   sum_c x_c,e = 1 for each e,   sum_e x_c,e >= 1 for each c

Interpretations: that each expert lies in exactly one cluster is not printed, and added; so is that clusters may differ
in size (the paper shows ranks with one hot expert).

As a program: deviations sum to 0, so the objective is twice the sum of d_c >= max(0, T_c - mean). Symmetry: clusters
have no names, so of the experts by falling load the i-th may only lie in clusters 0 to i. Its linear relaxation is
worth 0; ``lower_bound`` gives what it misses and enters as a row. Small layers go to HiGHS; in large ones a search
meets that bound, or its distance from it is the proven gap.
"""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np

from methods.moetuner.highs import Program

MAX_BINARIES = 256  # of a layer: beyond, HiGHS does not get below a good search in minutes
ROUNDS = 12  # of the search


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """What one of the two programs found: ``owner`` int [L, E] (cluster or rank of each expert), its value, a proven
    lower bound, and how it ended: ``optimal`` (within the gap asked for), ``search`` (a bound does not reach that far),
    ``time limit`` or ``no solver``."""

    owner: np.ndarray
    value: float
    bound: float
    ended: str
    time_s: float
    slack: int = 0  # experts by which a rank misses E L / G, where nothing else is feasible

    @property
    def gap(self) -> float:
        """Relative to the value."""
        return max(0.0, self.value - self.bound) / self.value if self.value > 1e-9 else 0.0


def lower_bound(load: np.ndarray, num_clusters: int) -> float:
    """Of sum_c |T_c - mean|. An expert above the mean cannot be split: its excess stays, wherever it lies. And tokens
    are whole: with r tokens too many for equal clusters, r clusters at least have one more."""
    total, mean = int(load.sum()), load.sum() / num_clusters
    rest = total % num_clusters
    excess = float(np.maximum(load - mean, 0).sum())
    return max(2 * excess, 2 * rest * (num_clusters - rest) / num_clusters)


def deviation(load: np.ndarray, owner: np.ndarray, num_clusters: int) -> float:
    """sum_c |T_c - mean| of one layer."""
    carried = np.bincount(owner, load, num_clusters)
    return float(np.abs(carried - carried.mean()).sum())


def solve(load: np.ndarray, num_clusters: int, gap: float = 0.025, time_limit_s: float = math.inf) -> Stage:
    """ILP 1 of all layers; ``load`` P [L, E]. Value and bound are sums over layers, and so is the time limit."""
    began = time.perf_counter()
    owners, value, bound, ended = [], 0.0, 0.0, set()
    for layer, of_layer in enumerate(load):
        left = time_limit_s - (time.perf_counter() - began)
        owner, least, how = solve_layer(of_layer, num_clusters, gap, left / (len(load) - layer))
        owners.append(owner)
        value += deviation(of_layer, owner, num_clusters)
        bound += least
        ended.add(how)
    how = next((each for each in ("no solver", "time limit", "search") if each in ended), "optimal")
    stage = Stage(np.stack(owners), value, bound, how, time.perf_counter() - began)
    return dataclasses.replace(stage, ended="optimal") if stage.gap <= gap else stage


def solve_layer(load: np.ndarray, num_clusters: int, gap: float, time_limit_s: float) -> tuple[np.ndarray, float, str]:
    """Clusters int [E], lower bound, how it ended. Of solutions as good, one with clusters of equal size, because ILP 2
    needs as many experts on every rank."""
    from methods.moetuner import kernels  # numba takes its time to import

    tokens, least = load.astype(np.float64), lower_bound(load, num_clusters)
    best: np.ndarray | None = None
    for even in (True, False):
        owner = kernels.partition(tokens, num_clusters, even, least, ROUNDS, np.random.default_rng(0))
        if best is None or deviation(load, owner, num_clusters) < deviation(load, best, num_clusters) - 1e-9:
            best = owner
        if _near(deviation(load, best, num_clusters), least, gap):
            return best, least, "optimal"
    assert best is not None
    if len(load) * num_clusters > MAX_BINARIES:
        return best, least, "search"
    if time_limit_s <= 0:
        return best, least, "time limit"
    return _program(load, num_clusters, best, least, gap, time_limit_s)


def _near(value: float, bound: float, gap: float) -> bool:
    return value - bound <= gap * value + 1e-9


def _program(
    load: np.ndarray, num_clusters: int, start: np.ndarray, least: float, gap: float, time_limit_s: float
) -> tuple[np.ndarray, float, str]:
    num_experts, mean = len(load), load.sum() / num_clusters
    order = np.argsort(-load, kind="stable")
    x = np.arange(num_experts * num_clusters).reshape(num_experts, num_clusters)  # [e, c] by falling load
    d = num_experts * num_clusters + np.arange(num_clusters)
    upper = np.concatenate([np.tril(np.ones(x.shape)).ravel(), np.full(num_clusters, np.inf)])
    upper[x[num_clusters:].ravel()] = 1
    program = Program(
        np.concatenate([np.zeros(x.size), np.full(num_clusters, 2.0)]), np.arange(len(upper)) < x.size, upper
    )
    for expert in range(num_experts):
        program.row(x[expert], 1.0, 1, 1)
    for c in range(num_clusters):
        program.row(x[:, c], 1.0, 1, np.inf)
        program.row(np.append(x[:, c], d[c]), np.append(-load[order], 1.0), -mean, np.inf)
    program.row(d, 2.0, least, np.inf)
    value = deviation(load, start, num_clusters)
    answer = program.solve(gap, time_limit_s, value)
    owner = start
    if answer.x is not None:
        found = np.empty(num_experts, dtype=np.int64)
        found[order] = answer.x[x.ravel()].reshape(x.shape).argmax(1)
        if deviation(load, found, num_clusters) < value:
            owner = found
    return owner, max(least, answer.bound), answer.ended


__all__ = ["Stage", "deviation", "lower_bound", "solve", "solve_layer"]
