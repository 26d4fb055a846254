from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from harness.bench import stats


def frame(values: np.ndarray) -> pd.DataFrame:
    """values [launches, reps]"""
    launch, rep = np.indices(values.shape)
    return pd.DataFrame({"launch": launch.ravel(), "rep": rep.ravel(), "value": values.ravel()})


def test_times_and_ratios_agree() -> None:
    rng = np.random.default_rng(0)
    a, b = (frame(rng.lognormal(center, 0.1, (3, 4))) for center in (1.0, 0.0))
    assert stats.ratio(a, b).point == pytest.approx(stats.interval(a).point / stats.interval(b).point, rel=1e-12)


def test_pairing_takes_out_what_both_share() -> None:
    drift = np.array([[1.0, 2.0, 4.0, 8.0]])
    estimate = stats.ratio(frame(3 * drift), frame(drift))
    assert estimate.point == pytest.approx(3)
    assert estimate.high - estimate.low < 1e-9
    assert estimate.scope == "within one launch, 4 repetitions"


def test_unpaired_repetitions_are_left_out_and_none_is_no_answer() -> None:
    a, b = frame(np.array([[2.0, 2.0, 9.0]])), frame(np.array([[1.0, 1.0]]))
    assert stats.ratio(a, b).point == pytest.approx(2)
    assert stats.ratio(a, b.iloc[:0]).scope == "no samples"
    one = stats.ratio(a, b.iloc[:1])
    assert math.isnan(one.low)
    assert one.scope == "one sample, no interval"


def test_a_difference_between_launches_widens_the_interval() -> None:
    same = stats.interval(frame(np.array([[1.0, 1.01, 0.99]] * 2)))
    apart = stats.interval(frame(np.array([[1.0, 1.01, 0.99], [1.2, 1.21, 1.19]])))
    assert apart.high / apart.low > 2 * same.high / same.low
    assert same.high / same.low > 1.01  # two launches that agree do not claim more than their repetitions support


@pytest.mark.parametrize("reps", [3, 5, 8])
@pytest.mark.parametrize(("launches", "launch_spread"), [(1, 0.0), (2, 0.0), (2, 0.05), (3, 0.02), (5, 0.05)])
def test_an_a_a_pair_lies_in_its_interval(launches: int, reps: int, launch_spread: float) -> None:
    """Skewed noise of 2.5 %, a drift of 5 % over the run that both share, launches that favour one side by chance:
    the interval of A/A holds 1 in at least 95 % of runs (less the 2.5 sigma of the simulation)."""
    rng = np.random.default_rng([launches, reps, int(100 * launch_spread)])
    num_runs, hits = 1500, 0
    drift = np.linspace(1, 1.05, launches * reps).reshape(launches, reps)
    launch = np.repeat(np.arange(launches), reps)
    for _ in range(num_runs):
        noise = 1 + 0.05 * rng.lognormal(0, 0.5, (2, launches, reps))
        favour = rng.normal(0, launch_spread, (launches, 1))
        a, b = drift * noise[0] * np.exp(favour), drift * noise[1]
        estimate = stats._estimate(launch, np.log(a / b).ravel())
        hits += estimate.low <= 1 <= estimate.high
    assert hits / num_runs >= 0.95 - 2.5 * math.sqrt(0.95 * 0.05 / num_runs)
