from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import torch

from harness.errors import UserError
from harness.plan import perfetto
from harness.plan.graph import Plan, Timeline
from harness.plan.lanes import PlanFailure, executor
from harness.plan.simulate import schedule


@pytest.mark.timed
def test_lanes_overlap_keep_their_order_and_wait_for_each_other():
    with executor() as lanes:
        plan, seen = Plan(), []

        def task(name: str, lane: str, after: list[str], seconds: float = 0.05) -> None:
            def run() -> None:
                time.sleep(seconds)
                seen.append(name)

            plan.add(name, lane, after, run=run)

        task("dispatch[0]", "inter", [])
        task("dispatch[1]", "inter", [])
        task("experts[0]", "compute", ["dispatch[0]"])
        task("experts[1]", "compute", ["dispatch[1]"])
        task("combine[0]", "inter", ["experts[0]"])
        task("gather[0]", "intra", ["dispatch[0]"], 0.01)
        found = lanes.run(plan)
        again = lanes.run(plan)
    assert seen.index("gather[0]") < seen.index("dispatch[1]") < seen.index("combine[0]")
    expected = schedule(plan, np.array([0.05, 0.05, 0.05, 0.05, 0.05, 0.01]))
    for timeline in (found, again):
        assert float(timeline.total_s) < 0.05 * 6
        assert float(timeline.total_s) >= float(expected.total_s)
        assert timeline.of("experts[0]")[0] >= timeline.of("dispatch[0]")[1]


def test_one_after_another_stays_in_the_calling_thread():
    """A thread that has to be woken comes late where ranks share cores."""
    with executor() as lanes:
        plan, seen = Plan(), []
        for name, lane, after in [("out", "inter", []), ("in", "intra", ["out"]), ("experts", "compute", ["in"])]:
            plan.add(name, lane, after, run=lambda: seen.append(threading.current_thread()))
        lanes.run(plan)
        assert seen == [threading.current_thread()] * 3
        plan.add("beside", "intra2", ["out"], run=lambda: seen.append(threading.current_thread()))
        lanes.run(plan)
        assert len(set(seen[3:])) == 2
        assert lanes.run(Plan()).end_s.shape == (0,)


def test_a_failing_task_is_named_and_what_waits_for_it_does_not_run():
    ran = []
    plan = Plan()
    plan.add("dispatch", "inter", run=lambda: 1 / 0)
    plan.add("experts", "compute", ["dispatch"], run=lambda: ran.append(1))
    with executor() as lanes:
        with pytest.raises(PlanFailure, match="task dispatch: ZeroDivisionError"):
            lanes.run(plan)
        assert not ran
        other = Plan()
        other.add("fine", "inter", run=lambda: ran.append(torch.is_grad_enabled()))
        with torch.no_grad():
            lanes.run(other)
        assert ran == [False]
        other.add("lost", "inter", ["nobody"])
        with pytest.raises(UserError, match="nobody"):
            lanes.run(other)
    assert ran == [False]


def test_the_trace_has_a_lane_a_thread_and_a_rank_a_process(tmp_path):
    plan = Plan()
    plan.add("a[0]", "inter")
    plan.add("b", "compute", ["a[0]"])
    two_ranks = Timeline(plan, np.array([[1.0, 1.5], [2.0, 2.5]]), np.array([[2.0, 2.5], [4.0, 4.5]]))
    path = perfetto.write(tmp_path / "trace.json", {"executed": two_ranks, "simulated": schedule(plan, np.ones(2))})
    events = json.loads(path.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 2 * 2 + 2
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        "executed, rank 0",
        "executed, rank 1",
        "simulated",
    }
    second = next(e for e in spans if e["name"] == "b" and e["pid"] == 2)
    assert (second["ts"], second["dur"], second["cat"]) == (1.5e6, 2e6, "b")
    with pytest.raises(ValueError, match="select one configuration"):
        perfetto.events({"grid": schedule(plan, np.ones((2, 3, 4)))})


def test_a_trace_is_read_as_it_was_written(tmp_path):
    plan = Plan()
    plan.add("forward.dispatch[0]", "inter")
    plan.add("forward.experts[0]", "compute")
    times = np.array([[1.0, 1.25], [2.0, 2.5]])
    given = {"forward": Timeline(plan, times, times + 0.5), "backward": Timeline(plan, times, times + 1)}
    found = perfetto.read(perfetto.write(tmp_path / "trace.json", given))
    assert list(found) == ["forward", "backward"]
    for name, timeline in found.items():
        assert [(t.name, t.lane, t.kind) for t in timeline.plan.tasks] == [(t.name, t.lane, t.kind) for t in plan.tasks]
        np.testing.assert_allclose(timeline.start_s, times - 1)
        np.testing.assert_allclose(timeline.end_s, given[name].end_s - 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [{"ph": "X", "name": "process_name"}]}'])
def test_what_is_no_trace_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ValueError, match=r"trace.json: not a trace of moebench"):
        perfetto.read(tmp_path / "trace.json")
