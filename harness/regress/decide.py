"""From paired times to alarms: a bootstrap per cell, corrected for their number, and a threshold of what matters.

One pair is a visit of the base and the visit of the head next to it in time, each the median of its repetitions: what
the machine does meanwhile hits both. For every cell and direction the mean of log(head / base) is tested one-sided
against 0 by a studentised bootstrap over pairs (Efron and Tibshirani 1993, section 16.4; the plain percentile one is
too eager with a dozen pairs), Holm's step-down procedure (1979) keeps the chance of any false alarm of the whole table
below ``alpha``, and a difference below ``threshold`` is none, however certain.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd

ALPHA = 0.0025  # so that twenty runs of one checkout against itself raise no alarm, 95 times in 100
THRESHOLD = 0.01
NUM_RESAMPLES = 100_000  # a p below alpha must be possible after Holm's correction for some hundred cells
KEYS = ["race", "system", "direction"]


@dataclasses.dataclass(frozen=True)
class Paired:
    """Mean log ratio of a cell with its one-sided p and its 95 % interval, as ratios."""

    ratio: float
    low: float
    high: float
    p: float
    num_pairs: int


def compare(logs: np.ndarray, random: np.random.Generator) -> Paired:
    """``logs``: log(head / base) [num_pairs], two pairs at least; p of "the head is not slower"."""
    n = len(logs)
    mean, error = float(logs.mean()), _error(logs[None])[0]
    centred = logs - mean
    drawn = centred[random.integers(0, n, (NUM_RESAMPLES, n))]
    t = drawn.mean(1) / np.maximum(_error(drawn), 1e-12)
    p = (1 + int((t >= mean / max(error, 1e-12)).sum())) / (1 + NUM_RESAMPLES)
    low, high = mean - error * np.quantile(t, [0.975, 0.025])
    return Paired(float(np.exp(mean)), float(np.exp(low)), float(np.exp(high)), p, n)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p [m]: an alarm at ``alpha`` where it is below."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def decide(pairs: pd.DataFrame, *, alpha: float = ALPHA, threshold: float = THRESHOLD, seed: int = 0) -> pd.DataFrame:
    """``pairs``: ``KEYS``, pair, base_s, head_s -> one row a cell and direction: ``KEYS``, times, ratio (head over
    base; above 1 is slower) with its interval, p, p_holm, verdict (slower | faster | same)."""
    random = np.random.default_rng(seed)
    rows = []
    for key, here in pairs.groupby(KEYS, sort=False):
        logs = np.log(here["head_s"].to_numpy() / here["base_s"].to_numpy())
        found, other = compare(logs, random), compare(-logs, random)
        times = {"base_ms": here["base_s"].median() * 1e3, "head_ms": here["head_s"].median() * 1e3}
        keys = dict(zip(KEYS, key, strict=True))  # type: ignore[call-overload]
        rows.append({**keys, **times, **dataclasses.asdict(found), "p_faster": other.p})
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"].to_numpy())
    faster = (holm(table.pop("p_faster").to_numpy()) < alpha) & (table["ratio"] < 1 / (1 + threshold))
    slower = (table["p_holm"] < alpha) & (table["ratio"] > 1 + threshold)
    table["verdict"] = np.where(slower, "slower", np.where(faster, "faster", "same"))
    return table


def _error(samples: np.ndarray) -> np.ndarray:
    """Standard error of the mean of every row."""
    return np.asarray(samples.std(1, ddof=1) / np.sqrt(samples.shape[1]))
