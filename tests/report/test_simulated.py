"""A simulated run on every page: it says simulated, it never ranks as measured, and it stands beside what ran."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from harness import simulating
from harness.bench.store import Store
from harness.plan.graph import Plan, Timeline
from harness.report import compare, context, summary, versus, words
from harness.report.run import load
from tests.report.synthetic_run import SECONDS, RunMaker, experiment

BASIS = "profile of emulated-2x4, 2026-11-23"


@dataclasses.dataclass
class Said:
    """As ``harness.simulation.Simulation``."""

    samples: dict[str, list[float]]
    timelines: dict[str, Timeline]
    basis: str
    notes: tuple[str, ...]
    heldout_error: float | None = None


def said(seconds, steps=1, **more):
    """As the judge answers: a task on each of two lanes."""
    plan = Plan()
    plan.add("layer.dispatch", "inter")
    plan.add("layer.experts", "compute", ("layer.dispatch",))
    start = np.zeros((2, 8))
    start[1] = seconds / 2
    samples = {"forward": [0.45 * seconds * (1 + step / 10) for step in range(steps)]}
    samples["backward"] = [0.55 * seconds * (1 + step / 10) for step in range(steps)]
    timeline = Timeline(plan, start, start + seconds / 2)
    return Said(samples=samples, timelines={"forward": timeline}, basis=BASIS, notes=("2 of 8 layers drawn",), **more)


def simulated(path, off=1.05, **more):
    store = Store(path)
    store.prepare()
    for workload in ("balanced-2048", "zipf-2"):
        for system, seconds in SECONDS.items():
            cell = experiment(system, workload)
            simulating.keep(store, cell, said(seconds * off * (1.1 if system == "flat" else 1), **more))
    simulating.keep(store, experiment("deepspeed"), ("refused", "no GPU is stated"))
    return load(path)


def ran(path, marked=()):
    maker = RunMaker(path)
    for workload in ("balanced-2048", "zipf-2"):
        for system, seconds in SECONDS.items():
            status = {"status": "cpu_bound", "reason": "busy"} if system in marked else {}
            maker.timed(experiment(system, workload), seconds, **status)
    maker.write_records()
    return load(path)


def test_the_headline_is_a_prediction_and_says_what_it_rests_on(tmp_path):
    run = simulated(tmp_path / "sim", heldout_error=0.043)
    (found,) = words.findings(run)
    assert not found.sure
    assert found.evidence == "simulated"
    first, *_, last = found.sentences
    assert first.startswith("hiermoe-hd2 has the shortest simulated time of 4 systems")
    assert "the next, tutel, takes 3.84 times as long" in first
    assert last == f"Nothing was run: by {BASIS}; off by 4% on average where it was held against runs."
    assert "interval" not in " ".join(found.sentences)
    assert "fastest" not in " ".join(found.sentences)
    assert any("No time: deepspeed refused on balanced-2048: no GPU is stated" in each for each in found.sentences)


def test_no_number_of_a_simulation_has_an_interval_or_a_verdict(tmp_path):
    store = Store(tmp_path / "sim")
    store.prepare()
    for system, seconds in SECONDS.items():
        simulating.keep(store, experiment(system), said(seconds, steps=5))
    run = load(tmp_path / "sim")
    times, ratios = compare.times(run), compare.speedups(run, "megatron")
    assert (times["num_samples"] == 5).all()
    assert times[["low", "high"]].isna().all(axis=None)
    assert ratios[["low", "high"]].isna().all(axis=None)
    assert set(ratios["verdict"]) == {"simulated: no interval"}
    pooled = compare.pooled_speedup(run, "flat", "megatron")
    assert pooled.evidence == ("simulated",)
    assert math.isnan(pooled.estimate.low)


def test_every_table_of_times_says_simulated(tmp_path):
    run = simulated(tmp_path / "sim")
    for html in (summary.headline(run).html, context.where(run).html, summary.speedups(run).html):
        assert '<span class="badge simulated">simulated</span>' in html
        assert "emulated</span>" not in html
    where = context.where(run).html
    assert BASIS in where
    assert "2 of 8 layers drawn" in where
    assert "how far off that is, no run has told yet" in where
    assert "What was simulated" in where
    assert "nothing was run, and there are no intervals" in summary.speedups(run).html
    assert "95 % interval" not in summary.speedups(run).html


def test_beside_what_ran_it_shows_how_far_it_is_off(tmp_path):
    mine, theirs = ran(tmp_path / "mine"), simulated(tmp_path / "mine-sim")
    frame = versus.ratios(mine, theirs)
    total = frame[frame["direction"] == "total"].set_index(["label", "workload"])
    assert total.loc[("tutel", "zipf-2"), "ratio"] == pytest.approx(1.05, abs=0.01)
    assert total.loc[("flat", "zipf-2"), "ratio"] == pytest.approx(1.155, abs=0.01)
    assert ((total["low"] < total["ratio"]) & (total["ratio"] < total["high"])).all()
    html = versus.table(mine, theirs).html
    assert "evidence, mine</th>" in html
    assert "evidence, mine-sim</th>" in html
    assert html.count("badge simulated") == html.count("badge emulated") == 8
    assert "The simulation against what ran" in html
    assert f"of mine-sim, by {BASIS}" in html
    assert "are left out" not in html
    (tables,) = (tmp_path / "mine" / "report").glob("tables")
    lines = (tables / "predicted_mine-sim.csv").read_text().splitlines()
    assert "all,all,8," in lines[1]
    assert (tables / "predicted_mine-sim.tex").is_file()
    # the other way round: the same errors, of the same simulation
    assert f"of mine-sim, by {BASIS}" in versus.table(theirs, mine).html
    back = versus.ratios(theirs, mine).set_index(["label", "workload", "direction"])
    assert back.loc[("tutel", "zipf-2", "total"), "ratio"] == pytest.approx(1 / 1.05, abs=0.01)


def test_marked_cells_are_left_out_of_its_error_and_counted(tmp_path):
    mine, theirs = ran(tmp_path / "mine", marked=("flat",)), simulated(tmp_path / "mine-sim")
    html = versus.table(mine, theirs).html
    assert "2 marked cells (cpu_bound) are left out" in html
    assert "all,all,6," in (tmp_path / "mine" / "report" / "tables" / "predicted_mine-sim.csv").read_text()


def test_two_simulations_have_a_ratio_and_no_error(tmp_path):
    one, other = simulated(tmp_path / "one"), simulated(tmp_path / "other", off=2.1)
    frame = versus.ratios(one, other)
    assert frame["ratio"].to_numpy() == pytest.approx(2.0)
    assert frame[["low", "high"]].isna().all(axis=None)
    assert "The simulation against what ran" not in versus.table(one, other).html


def test_its_timelines_open_in_perfetto_and_as_gantt_charts(tmp_path):
    simulated(tmp_path / "sim")
    found = Store(tmp_path / "sim").trace(experiment("flat").digest)["forward"]
    assert found.start_s.shape == (2, 8)
    assert [task.lane for task in found.plan.tasks] == ["inter", "compute"]
    from harness.report import gantt

    assert gantt.gantt({"flat [simulated]": found}).axes
