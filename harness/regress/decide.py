"""From paired times to alarms: a bootstrap per cell, corrected for their number, and a threshold of what matters.

One pair is a visit of the base and the visit of the head next to it in time, each the median of its repetitions: what
the machine does meanwhile hits both. For every cell and direction the mean of log(head / base) is tested one-sided
against 0 by a studentised bootstrap over pairs (Efron and Tibshirani 1993, section 16.4; the plain percentile one is
too eager with a dozen pairs), Holm's step-down procedure (1979) keeps the chance of any false alarm of the whole table
below ``alpha``, and a difference below ``threshold`` is none, however certain.

Now and then a session of ranks is slower than others of the same code, for as long as it lives. Its pairs are then not
independent, and a slow session looks like a slow checkout. So the pairs come from several sessions, and what is not
beyond ``threshold`` without any one of them is no alarm either.
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
    """``logs``: log(head / base) [num_pairs]; p of "the head is not slower". Of fewer than two pairs nothing follows:
    p is 1, and the interval has no ends."""
    n = len(logs)
    if n < 2:
        return Paired(float(np.exp(logs.mean())) if n else np.nan, 0.0, np.inf, 1.0, n)
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
    """``pairs``: ``KEYS``, session, pair, base_s, head_s -> one row a cell and direction: ``KEYS``, times, ratio (head
    over base; above 1 is slower) with its interval, ``without_one`` (the ratio nearest to 1, or beyond it, that is left
    without one session), p, p_holm, verdict (slower | faster | same | not decided: of fewer than two pairs with a time
    on both sides)."""
    random = np.random.default_rng(seed)
    rows = []
    for key, here in pairs.groupby(KEYS, sort=False):
        sides = here[["head_s", "base_s"]].to_numpy(dtype=float)
        here = here[(np.isfinite(sides) & (sides > 0)).all(axis=1)]
        logs = np.log(here["head_s"].to_numpy() / here["base_s"].to_numpy())
        found, other = compare(logs, random), compare(-logs, random)
        nearest = min if found.ratio > 1 else max
        without_one = float(np.exp(nearest(_without_each(logs, here["session"].to_numpy()))))
        times = {"base_ms": here["base_s"].median() * 1e3, "head_ms": here["head_s"].median() * 1e3}
        keys = dict(zip(KEYS, key, strict=True))  # type: ignore[call-overload]
        facts = {**dataclasses.asdict(found), "without_one": without_one}
        rows.append({**keys, **times, **facts, "p_faster": other.p})
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"].to_numpy())
    both = table[["ratio", "without_one"]]
    faster = (holm(table.pop("p_faster").to_numpy()) < alpha) & (both < 1 / (1 + threshold)).all(axis=1)
    slower = (table["p_holm"] < alpha) & (both > 1 + threshold).all(axis=1)
    table["verdict"] = np.where(slower, "slower", np.where(faster, "faster", "same"))
    table.loc[table["num_pairs"] < 2, "verdict"] = "not decided"
    return table


def _without_each(logs: np.ndarray, sessions: np.ndarray) -> list[float]:
    """Mean of ``logs`` without each session in turn; of all where there is but one."""
    if not len(logs):
        return [np.nan]
    several = np.unique(sessions)
    return [float(logs[sessions != each].mean()) for each in several] if len(several) > 1 else [float(logs.mean())]


def _error(samples: np.ndarray) -> np.ndarray:
    """Standard error of the mean of every row."""
    return np.asarray(samples.std(1, ddof=1) / np.sqrt(samples.shape[1]))
