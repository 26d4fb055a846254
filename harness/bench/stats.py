"""Times and ratios with intervals that hold at the few launches and repetitions a cluster can spare.

Everything is done on logarithms, so the point is a geometric mean and the ratio of two times shown in a table is the
ratio shown beside them. Launches are the experimental unit: what differs between launches (placement of ranks on
cores, network state, neighbours) does not average out over the repetitions inside one.

The interval is the wider of two Student-t intervals: over launch means, and over all samples as if independent. The
first is valid when launches differ (its few degrees of freedom make it wide: take 3 launches or more); the second
keeps two launches that happen to agree from claiming more than their repetitions support. A two-level percentile
bootstrap was tried first, also with Hesterberg's (2015, "What teachers should know about the bootstrap", section
4.6) small-sample expansion, and dropped: it can never leave the range of the data, so with 2 launches x 3
repetitions it covers 73 % where launches differ by twice the spread of repetitions, and 92 % with 5 repetitions of
one launch. tests/bench/test_stats.py simulates the coverage of what is used.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
from scipy import special  # stats takes seconds to import

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Geometric mean ``point`` with its 95 % interval ``low``..``high`` (NaN where one sample gives none)."""

    point: float
    low: float
    high: float
    num_launches: int
    num_samples: int  # repetitions (pairs of them, for a ratio) over all launches

    @property
    def scope(self) -> str:
        """What the interval speaks for, in words."""
        if self.num_samples == 0:
            return "no samples"
        if self.num_samples == 1:
            return "one sample, no interval"
        if self.num_launches == 1:
            return f"within one launch, {self.num_samples} repetitions"
        return f"{self.num_launches} launches, {self.num_samples} repetitions"


def interval(rows: pd.DataFrame) -> Estimate:
    """Estimate of one cell's ``value`` (> 0) from rows with columns launch, rep, value: one row a repetition."""
    return _estimate(rows["launch"].to_numpy(), np.log(rows["value"].to_numpy(dtype=np.float64)))


def ratio(a: pd.DataFrame, b: pd.DataFrame) -> Estimate:
    """Estimate of ``value`` of ``a`` over ``value`` of ``b``, paired by (launch, rep); the speedup of b over a when
    the values are times. Repetitions that only one of the two has are left out."""
    columns = ["launch", "rep", "value"]
    pairs = a[columns].merge(b[columns], on=["launch", "rep"], suffixes=("_a", "_b"), validate="one_to_one")
    logs = np.log(pairs["value_a"].to_numpy(dtype=np.float64)) - np.log(pairs["value_b"].to_numpy(dtype=np.float64))
    return _estimate(pairs["launch"].to_numpy(), logs)


def _estimate(launch: np.ndarray, logs: np.ndarray) -> Estimate:
    """Launches weigh the same, whatever their number of repetitions."""
    if len(logs) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    names, which = np.unique(launch, return_inverse=True)
    means = np.bincount(which, weights=logs) / np.bincount(which)
    center = float(means.mean())
    half = max(_half_width(logs), _half_width(means) if len(names) > 1 else 0.0)
    low, high = (math.nan, math.nan) if len(logs) == 1 else (math.exp(center - half), math.exp(center + half))
    return Estimate(math.exp(center), low, high, len(names), len(logs))


def _half_width(values: np.ndarray) -> float:
    """Half width of the Student-t interval of the mean; 0 for one value."""
    num = len(values)
    if num == 1:
        return 0.0
    return float(special.stdtrit(num - 1, (1 + CONFIDENCE) / 2) * values.std(ddof=1) / math.sqrt(num))
