"""The contention matrix: what it makes of times, and that work and waiting are told apart on real lanes."""

from __future__ import annotations

import pytest

from harness.bench import contention
from harness.bench.contention import Hold, longer, matrix, plan_of
from harness.bench.timing import num_cores
from harness.plan.graph import LANES


def test_a_repetition_takes_as_long_as_on_its_slowest_rank():
    of_ranks = [{"inter/intra": [(1.0, 1.2), (1.0, 1.5)]}, {"inter/intra": [(0.5, 1.3), (2.0, 2.0)]}]
    slowdown, spread = matrix(of_ranks)
    assert slowdown["inter"]["intra"] == pytest.approx(0.15)  # of 0.3 and 0
    assert spread["inter"]["intra"] == pytest.approx((0.0, 0.3))


def test_a_lane_is_never_sped_up():
    slowdown, spread = matrix([{"intra/inter": [(1.0, 0.9)]}])
    assert slowdown == {"intra": {"inter": 0.0}}
    assert spread["intra"]["inter"] == pytest.approx((-0.1, -0.1))


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


def test_on_a_device_both_lanes_are_held_until_all_is_issued(monkeypatch):
    """As a device would: what is issued to a lane behind the hold starts when the hold is over, and not before."""
    issued: list[str] = []
    hold = Hold()
    monkeypatch.setattr(hold, "begin", lambda: issued.append("hold"))
    monkeypatch.setattr(hold, "end", lambda: issued.append("asked"))
    work = {lane: (lambda lane=lane: issued.append(lane), 3) for lane in ("intra", "compute")}
    plan = plan_of(LANES, work, hold)
    for here in plan.order:
        plan.tasks[here].run()
    assert issued == ["hold", *["intra"] * 3, *["compute"] * 3, "asked"]
    assert all(plan.tasks[plan.index[lane]].after == ("hold",) for lane in work)
    assert [task.name for task in plan_of(LANES, work, None).tasks] == ["intra", "compute"]


def test_no_stream_gets_more_launches_than_it_takes_at_once():
    timed = int(contention.MAX_LAUNCHES / (1 + contention.SLACK))
    busy = int(contention.SLACK * timed)
    for _ in range(6):
        assert timed + busy <= contention.MAX_LAUNCHES
        further = longer(timed, busy, contention.MAX_LAUNCHES)
        assert further[1] / further[0] >= 1.9 * busy / timed  # it outlasts the timed lane by so much more
        timed, busy = further
    assert longer(60, 150, None) == (60, 300)
