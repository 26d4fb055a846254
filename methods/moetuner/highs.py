"""A mixed-integer program on HiGHS through SciPy, with a time limit that keeps what was proven.

SciPy does not hand a starting solution to HiGHS. What a warm start is for, cutting off all that is worse, a row
``objective <= value of the start`` does; and whoever calls keeps the start if nothing better is found.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import sparse

MIN_TIME_S = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """``x``: None if HiGHS found no solution (below the start). ``bound``: proven, below every solution. ``ended``:
    ``optimal`` (within the gap), ``infeasible``, ``time limit`` or ``no solver``."""

    x: np.ndarray | None
    bound: float
    ended: str


@dataclasses.dataclass
class Program:
    """min c x, rows low <= A x <= high, 0 <= x <= upper; built row by row."""

    cost: np.ndarray
    integer: np.ndarray  # bool
    upper: np.ndarray
    rows: list[tuple[np.ndarray, np.ndarray, float, float]] = dataclasses.field(default_factory=list)

    def row(self, columns: np.ndarray, values: np.ndarray | float, low: float, high: float) -> None:
        columns = np.asarray(columns).ravel()
        self.rows.append((columns, np.broadcast_to(np.asarray(values, dtype=np.float64), columns.shape), low, high))

    def solve(self, gap: float, time_limit_s: float, start: float = math.inf) -> Answer:
        """Within ``gap`` of the optimum, relative to the value. ``start``: value of a solution that is known. Without a
        solver nothing is found and nothing proven: the start stands."""
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ImportError:
            return Answer(None, -math.inf, "no solver")
        rows = list(self.rows)
        if math.isfinite(start):
            used = np.flatnonzero(self.cost)
            rows.append((used, self.cost[used], -math.inf, start * (1 + 1e-9) + 1e-9))
        columns = np.concatenate([row[0] for row in rows])
        values = np.concatenate([row[1] for row in rows])
        starts = np.concatenate([[0], np.cumsum([len(row[0]) for row in rows])])
        matrix = sparse.csr_array((values, columns, starts), shape=(len(rows), len(self.cost)))
        found = milp(
            self.cost,
            integrality=self.integer.astype(int),
            bounds=Bounds(np.zeros(len(self.cost)), self.upper),
            constraints=LinearConstraint(matrix, [row[2] for row in rows], [row[3] for row in rows]),
            options={"time_limit": max(time_limit_s, MIN_TIME_S), "mip_rel_gap": gap},
        )
        bound = getattr(found, "mip_dual_bound", None)
        least = -math.inf if bound is None or not math.isfinite(bound) else float(bound)
        ended = {1: "time limit", 2: "infeasible"}.get(found.status, "optimal")
        return Answer(found.x, least, ended)
