"""The decision: how often it raises a false alarm, what it catches, Holm's procedure by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from harness.regress import decide


def pairs(random: np.random.Generator, slower: float = 1.0, noise: float = 0.008, num_pairs: int = 10) -> pd.DataFrame:
    """Twelve cells, of which the first has become ``slower``; each pair shares a drift of the machine."""
    rows = []
    for cell in range(12):
        for pair in range(num_pairs):
            drift, own = np.exp(0.05 * random.standard_normal()), np.exp(noise * random.standard_normal(2))
            times = {"base_s": 0.1 * drift * own[0], "head_s": 0.1 * drift * own[1] * (slower if cell == 0 else 1)}
            rows.append(
                {"race": "r", "system": f"s{cell}", "direction": "forward", "session": pair % 4, "pair": pair, **times}
            )
    return pd.DataFrame(rows)


def test_false_alarms_stay_below_alpha(monkeypatch):
    monkeypatch.setattr(decide, "NUM_RESAMPLES", 8000)  # twelve times the least p is still below alpha
    random = np.random.default_rng(0)
    alarms = sum((decide.decide(pairs(random), threshold=0)["verdict"] == "slower").any() for _ in range(100))
    assert alarms <= 3  # of 100 tries of 12 cells; a Binomial(100, 0.0025) passes 3 once in 7,000
    alarms = sum((decide.decide(pairs(random))["verdict"] == "slower").any() for _ in range(50))
    assert alarms <= 2


def test_a_slowdown_is_caught_and_only_where_it_is(monkeypatch):
    monkeypatch.setattr(decide, "NUM_RESAMPLES", 10000)
    random = np.random.default_rng(1)
    caught = [decide.decide(pairs(random, slower=1.05)) for _ in range(20)]
    assert sum(table["verdict"].iloc[0] == "slower" for table in caught) >= 19
    assert sum((table["verdict"].iloc[1:] == "slower").any() for table in caught) <= 1
    swapped = pairs(random, slower=1.05).rename(columns={"base_s": "head_s", "head_s": "base_s"})
    assert decide.decide(swapped)["verdict"].iloc[0] == "faster"


def test_a_certain_difference_below_the_threshold_is_none():
    table = decide.decide(pairs(np.random.default_rng(2), slower=1.005, noise=1e-4))
    assert table["p_holm"].iloc[0] < decide.ALPHA
    assert set(table["verdict"]) == {"same"}


def test_what_rests_on_one_session_is_no_alarm():
    found = pairs(np.random.default_rng(4), noise=1e-5, num_pairs=16)
    own = found["system"] == "s0"
    found.loc[own, "head_s"] *= np.where(found.loc[own, "session"] == 1, 1.02, 1.009)
    one = decide.decide(found).iloc[0]
    assert one["p_holm"] < decide.ALPHA
    assert one["ratio"] > 1.011
    assert one["without_one"] == pytest.approx(1.009, abs=1e-4)
    assert one["verdict"] == "same"


def test_one_slow_session_among_four():
    random = np.random.default_rng(3)
    found = pairs(random, noise=1e-3, num_pairs=16)
    found.loc[(found["system"] == "s0") & (found["session"] == 2), "head_s"] *= 1.2
    one = decide.decide(found).iloc[0]
    assert one["ratio"] > 1.03
    assert one["without_one"] == pytest.approx(1, abs=0.002)
    assert one["verdict"] == "same"
    found.loc[found["system"] == "s0", "head_s"] *= 1.05  # of the code, in all of them
    assert decide.decide(found)["verdict"].iloc[0] == "slower"


def test_holm_by_hand():
    assert decide.holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert decide.holm(np.array([0.5, 0.9])) == pytest.approx([1.0, 1.0])


def test_of_fewer_than_two_pairs_nothing_is_decided():
    one = pairs(np.random.default_rng(5), slower=3.0, num_pairs=1)
    table = decide.decide(one)
    assert set(table["verdict"]) == {"not decided"}
    assert (table["p"] == 1).all()
    gaps = pairs(np.random.default_rng(6), slower=1.5, num_pairs=8)
    own = gaps["system"] == "s0"
    gaps.loc[own & (gaps["pair"] > 0), "head_s"] = np.nan  # one pair has times on both sides
    gaps.loc[gaps["system"] == "s1", "base_s"] = np.nan
    gaps.loc[(gaps["system"] == "s2") & (gaps["pair"] == 3), "head_s"] = np.nan
    found = decide.decide(gaps).set_index("system")
    assert found["verdict"].to_dict() == {f"s{i}": "not decided" if i < 2 else "same" for i in range(12)}
    assert found["num_pairs"].to_dict() == {f"s{i}": (1, 0, 7)[i] if i < 3 else 8 for i in range(12)}
    assert np.isfinite(found.loc["s2", ["ratio", "low", "high", "p"]].astype(float)).all()
