"""The contention matrix: what it makes of times, and that work and waiting are told apart on real lanes."""

from __future__ import annotations

import pytest

from harness.bench.contention import matrix
from harness.bench.timing import num_cores


def test_a_repetition_takes_as_long_as_on_its_slowest_rank():
    of_ranks = [{"inter/intra": [(1.0, 1.2), (1.0, 1.5)]}, {"inter/intra": [(0.5, 1.3), (2.0, 2.0)]}]
    slowdown, spread = matrix(of_ranks)
    assert slowdown["inter"]["intra"] == pytest.approx(0.15)  # of 0.3 and 0
    assert spread["inter"]["intra"] == pytest.approx((0.0, 0.3))


def test_a_lane_is_never_sped_up():
    slowdown, spread = matrix([{"intra/inter": [(1.0, 0.9)]}])
    assert slowdown == {"intra": {"inter": 0.0}}
    assert spread["intra"]["inter"] == pytest.approx((-0.1, -0.1))


@pytest.mark.timed
def test_waiting_takes_nothing_from_a_link_and_computing_is_told_apart(session):
    payload = {"lanes": ["compute", "stand-in", "intra"], "repeats": 2}
    for _ in range(3):  # other programs may take the cores away
        of_ranks = session("local-4").call("harness.bench.contention:measure", payload, timeout_s=120)
        slowdown, _ = matrix(of_ranks)
        assert set(slowdown["intra"]) == {"compute", "stand-in"}
        assert slowdown["compute"].keys() == slowdown["stand-in"].keys() == {"intra"}  # of one lane, at one time
        assert all(len(times) == 2 for times in of_ranks[0].values())
        # a wait wants no core; products of four ranks and an unshaped link all want some
        if slowdown["intra"]["stand-in"] < 0.3 and slowdown["stand-in"]["intra"] < 0.3:
            break
    else:
        pytest.fail(f"{slowdown}")
    if num_cores() <= 4:
        assert slowdown["intra"]["compute"] > slowdown["intra"]["stand-in"]
