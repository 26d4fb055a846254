"""Gantt charts: a bar for each task that takes time, in its lane's row, where and as long as its timeline says."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from harness.plan.graph import COMPUTE, INTER, INTRA, Plan, Timeline
from harness.plan.lanes import executor
from harness.plan.simulate import schedule
from harness.report import figures
from harness.report.gantt import gantt, used_lanes


def plan() -> Plan:
    made = Plan()
    made.add("forward.dispatch[0]", INTER)
    made.add("forward.experts[0]", COMPUTE, ["forward.dispatch[0]"])
    made.add("gradients", INTER, ["forward.dispatch[0]"], kind="gradients")
    made.add("gradients-after", INTER, ["forward.experts[0]"], kind="gradients")
    return made


@pytest.fixture
def simulated() -> Timeline:
    return schedule(plan(), np.array([0.010, 0.020, 0.005, 0.0]))


def test_bars_lie_where_the_timeline_says(simulated):
    with figures.styled():
        fig = gantt({"made": simulated})
    (ax,) = fig.axes
    assert used_lanes(simulated) == [COMPUTE, INTER]
    assert [label.get_text() for label in ax.get_yticklabels()] == [COMPUTE, INTER]
    bars = {round(bar.get_x(), 6): bar for bar in ax.patches}
    assert len(ax.patches) == 3  # a slice without bytes takes no time and has no bar
    dispatch, experts = bars[0.0], min((b for b in ax.patches if b.get_x() > 0), key=lambda b: b.get_y())
    assert (dispatch.get_width(), round(dispatch.get_y() + dispatch.get_height() / 2)) == (pytest.approx(10), 1)
    assert (experts.get_x(), experts.get_width()) == (pytest.approx(10), pytest.approx(20))
    hatched = [bar for bar in ax.patches if bar.get_hatch()]
    assert [bar.get_width() for bar in hatched] == [pytest.approx(5)]
    assert "30 ms" in ax.get_title(loc="left")
    assert {text.get_text() for text in ax.texts} >= {"dispatch 0", "experts 0"}
    plt.close(fig)


def test_executed_above_simulated_on_one_axis(simulated):
    with executor() as lanes:
        executed = lanes.run(plan())
    fig = gantt({"executed": executed, "simulated": simulated})
    above, below = fig.axes
    assert above.get_position().y0 > below.get_position().y0
    assert above.get_xlim() == below.get_xlim()
    assert above.get_title(loc="center").startswith("executed")
    assert min(bar.get_x() for bar in above.patches) == 0  # the clock of a run starts anywhere
    plt.close(fig)


def test_a_kind_has_one_colour_and_kinds_differ(simulated):
    fig = gantt({"a": simulated, "b": simulated})
    first, second = ([to_rgb(bar.get_facecolor()) for bar in ax.patches] for ax in fig.axes)
    assert first == second
    assert len(set(first)) == 3
    assert {text.get_text() for text in fig.legends[0].get_texts()} == {"dispatch", "experts", "gradients"}
    plt.close(fig)


def test_kinds_without_a_colour_of_their_own_share_a_grey():
    plan = Plan((COMPUTE, INTER))
    for name in ("gate", "restore", "dispatch"):
        plan.add(name, COMPUTE)
    fig = gantt({"a": Timeline(plan, np.arange(3.0), np.arange(1.0, 4.0))})
    gate, restore, dispatch = (to_rgb(bar.get_facecolor()) for bar in fig.axes[0].patches)
    assert gate == restore != dispatch
    assert {text.get_text() for text in fig.legends[0].get_texts()} == {"dispatch", "other"}
    plt.close(fig)


def test_one_rank_of_many_with_its_waiting(simulated):
    start = np.stack([simulated.start_s, simulated.start_s + 0.002], axis=1)
    end = np.stack([simulated.end_s, simulated.end_s + 0.002], axis=1)
    fig = gantt({"late": Timeline(simulated.plan, start, end)}, rank=1)
    assert min(bar.get_x() for bar in fig.axes[0].patches) == pytest.approx(2)
    plt.close(fig)


def test_what_cannot_be_drawn_is_refused(simulated):
    with pytest.raises(ValueError, match="no timeline"):
        gantt({})
    grid = Timeline(simulated.plan, np.zeros((4, 3, 2)), np.ones((4, 3, 2)))
    with pytest.raises(ValueError, match="timeline grid: 2 axes"):
        gantt({"grid": grid})


def test_a_lane_that_is_not_used_takes_no_row_and_nothing_is_drawn_of_nothing():
    empty = Timeline(Plan((COMPUTE, INTER, INTRA)), np.zeros(0), np.zeros(0))
    fig = gantt({"empty": empty})
    fig.savefig(io.BytesIO())
    assert not fig.axes[0].patches
    plt.close(fig)
