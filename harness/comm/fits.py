"""Straight lines through measured times: alpha + beta x, what they explain, and how far they may be believed.

Short and long operations weigh the same: squares of relative errors are summed, as a schedule pays a short collective
as often as a long one and noise grows with the time. Some sizes are held out of every fit and tell its error between
the others; a fit that explains less than ``MIN_R2`` of what was seen, or has too few points, is refused: marked, with
the points beside it. Where one line does not hold for both ends, the range of the fit says so: it is the longest run
of neighbouring sizes, held-out ones included, that were all seen within ``TRUSTED_ERROR`` of the line.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, TypeVar

import numpy as np
from pydantic import Field
from scipy.optimize import nnls

from harness.specs import Collective, Gemm, Spec

MIN_R2, MIN_POINTS = 0.9, 3
TRUSTED_ERROR = 0.15


class Judged(Spec):
    """What every fit carries beside alpha and beta. ``points``: (x, seconds), held-out ones included."""

    alpha_s: float = Field(ge=0)
    r2: float | None = None
    held_out_error: float | None  # largest |predicted - seen| / seen at the sizes that the fit did not see
    refused: str = ""  # why the fit is not to be used
    points: tuple[tuple[float, float | None], ...]  # None: no time was seen

    RATE: ClassVar[str]  # names of the fields that hold beta and the range
    RANGE: ClassVar[str]


class Fit(Judged, Collective):
    """Of a collective: x is the bytes of one rank's buffer."""

    range_bytes: tuple[float, float]  # where the line holds; outside it extrapolates
    RATE, RANGE = "beta_s_per_byte", "range_bytes"


class GemmFit(Judged, Gemm):
    """Of a matrix product, plain or grouped: x is the multiply-adds."""

    range_macs: tuple[float, float]
    dtype: str = "float32"
    RATE, RANGE = "beta_s_per_mac", "range_macs"


class TokensFit(Judged):
    """Of a layer: x is the tokens of one rank."""

    beta_s_per_token: float = Field(ge=0)
    range_tokens: tuple[float, float]
    RATE, RANGE = "beta_s_per_token", "range_tokens"


Kind = TypeVar("Kind", bound=Judged)


def judge(kind: type[Kind], x: Any, times: Any, held_out: Any, **fields: Any) -> Kind:
    """Fit ``times`` (seconds [n]; NaN where none was seen) over ``x`` [n] without the indices ``held_out``, and say
    how good the fit is. ``fields``: others of ``kind``."""
    x, times = np.asarray(x, dtype=np.float64), np.asarray(times, dtype=np.float64)
    seen = np.isfinite(times) & (times > 0)
    is_held_out = np.isin(np.arange(len(x)), list(held_out))
    used, judging = seen & ~is_held_out, seen & is_held_out
    alpha, beta, r2, refused = 0.0, 0.0, 0.0, f"{used.sum()} points are too few"
    if used.sum() >= MIN_POINTS:
        alpha, beta, r2 = line(x[used], times[used])
        refused = f"r2 {r2:.3f} is below {MIN_R2}" if r2 < MIN_R2 else ""
    errors = np.abs(alpha + beta * x - times) / times
    found = {
        "alpha_s": alpha,
        kind.RATE: beta,
        "r2": r2,
        "held_out_error": float(errors[judging].max()) if judging.any() else None,
        "refused": refused,
        "points": [(size, time if ok else None) for size, time, ok in zip(x, times, seen, strict=True)],
        kind.RANGE: _longest_run(x, errors <= TRUSTED_ERROR),  # NaN is not
    }
    return kind.model_validate(found | fields)


def line(x: Any, times: Any) -> tuple[float, float, float]:
    """alpha, beta >= 0 and r2 of times = alpha + beta x, by least squares of the relative errors."""
    x, times = np.asarray(x, dtype=np.float64), np.asarray(times, dtype=np.float64)
    columns = np.stack([np.ones(len(x)) * times.mean(), x / x.max() * times.mean()], axis=1)
    (alpha, beta), _ = nnls(columns / times[:, None], np.ones(len(x)))
    alpha, beta = float(alpha * times.mean()), float(beta * times.mean() / x.max())
    spread = float(((times - times.mean()) ** 2).sum())
    return alpha, beta, 1 - float(((times - alpha - beta * x) ** 2).sum()) / spread if spread else 1.0


def _longest_run(x: np.ndarray, good: np.ndarray) -> tuple[float, float]:
    """First and last of the longest run of neighbours that are good (of ascending ``x``, by ratio); zeros if none."""
    runs = [list(run) for fine, run in itertools.groupby(range(len(x)), key=lambda i: bool(good[i])) if fine]
    if not runs:
        return 0.0, 0.0
    best = max(runs, key=lambda run: (x[run[-1]] / x[run[0]], x[run[-1]]))
    return float(x[best[0]]), float(x[best[-1]])


__all__ = ["MIN_R2", "Fit", "GemmFit", "Judged", "TokensFit", "judge", "line"]
