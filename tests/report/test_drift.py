"""Races whose routing drifts: what each step's row holds, who follows and how far behind, and that nothing is said of a
routing that stands still."""

from __future__ import annotations

import re

import pytest

from harness.bench.stepwise import certify_step
from harness.comm.moved import COPIES, LATE_COPIES, MOVES
from harness.memory import expert_bytes
from harness.report import compare, drift, summary, words
from harness.report.run import load
from harness.specs import Workload
from tests.report.synthetic_run import RunMaker, experiment

WALK = Workload(name="walk", tokens_per_rank=512, generator="walk")
FIRST, NUM_STEPS, LAUNCHES = 5, 8, 3
#: twice as slow two steps behind each move as right behind it, but for the steps in which experts move
SECONDS = {
    "flat": [1.0] * 8,
    "smartmoe": [0.9, 1.5, 0.5, 0.8, 1.0, 1.5, 0.5, 0.8],
    "fastermoe": [0.7] * 8,
    "hecate": [0.8] * 8,
    "fsdp-experts": [1.2] * 8,
}
BEHIND = (6, 10)


def cell(system: str):
    given = experiment(system, "balanced-512", "local-2", "gpt-tiny-moe", "train_step", dtype="float32")
    return given.model_copy(update={"workload": WALK})


def sent(system: str, step: int) -> dict[str, float]:
    given = cell(system)
    whole = given.model.num_layers * given.model.num_experts * expert_bytes(given.model, given.dtype)
    if system == "smartmoe":
        return {MOVES: 3e6} if step in BEHIND else {}
    return {"fastermoe": {LATE_COPIES: 1e3}, "hecate": {COPIES: 2e3}, "fsdp-experts": {COPIES: whole}}.get(system, {})


def drifting(maker: RunMaker, launches: int = LAUNCHES) -> RunMaker:
    for system, seconds in SECONDS.items():
        for launch in range(launches):
            base, rows = maker.base(cell(system), launch), []
            for rep, value in enumerate(seconds):
                step, slower = FIRST + rep, 1 + launch / 100
                each = {**base, "rep": rep}
                rows.append({**each, "metric": "time_s", "direction": "total", "value": value * slower, "unit": "s"})
                rows.append({**each, "metric": "step", "value": step, "reason": f"{step:016x}"})
                rows.append({**each, "metric": "drift", "value": 0.2})
                for level in ("expert", "rank", "node", "link"):
                    skew = {"expert": 3.0, "rank": 1 + step / 10}.get(level, 1.0)
                    rows.append({**each, "metric": "step_max_over_mean", "level": level, "value": skew})
                for kind, num_bytes in sent(system, step).items():
                    rows.append({**each, "metric": "moved_bytes", "level": kind, "value": num_bytes})
            maker.append(rows)
    maker.write_records()
    return maker


@pytest.fixture
def run(maker):
    return load(drifting(maker).path)


def test_a_row_a_step_with_its_skew_its_time_and_what_moved(run):
    found = drift.steps(run).set_index(["label", "step"])
    assert len(found) == len(SECONDS) * NUM_STEPS
    one = found.loc[("smartmoe", 7)]
    assert one["point"] == pytest.approx(0.5 * 1.01, rel=1e-3)
    assert (one["over"], one["expert"], one["rank"], one["drift"]) == pytest.approx((2.0, 3.0, 1.7, 0.2))
    assert one["low"] < one["point"] < one["high"]
    assert found.loc[("smartmoe", 6), MOVES] == 3e6
    assert found[MOVES].sum() == 2 * 3e6


def test_launches_that_move_at_other_steps_are_averaged(maker):
    drifting(maker, launches=2)
    base = maker.base(cell("smartmoe"), 0)
    maker.append([{**base, "rep": 0, "metric": "moved_bytes", "level": MOVES, "value": 5e6}])
    found = drift.steps(load(maker.path)).set_index(["label", "step"])
    assert found.loc[("smartmoe", FIRST), MOVES] == 2.5e6


def test_who_follows_and_how_far_behind(run):
    found = drift.followers(run).set_index("label")
    assert found.loc["smartmoe", "behind"] == list(BEHIND)
    assert found["age"].to_dict() == {
        "flat": "nothing moved in these steps",
        "smartmoe": "1 to 4: experts moved",
        "fastermoe": "0: copies by the step's own gate",
        "hecate": "1 or more: copies by the steps before",
        "fsdp-experts": "copies all experts",
    }
    gain = found.loc["smartmoe", "gain"]  # from 0.9 to 0.5, and from 1.0 to 0.5
    assert gain["point"] == pytest.approx((0.9 / 0.5 * 1.0 / 0.5) ** 0.5)
    assert found.loc["smartmoe", "spread"] == pytest.approx(3.0)
    assert found.loc["fastermoe", "over"]["point"] == pytest.approx(1 / 0.7)


def test_the_page_says_it_in_words_and_that_means_mix_batches(run):
    html = summary.drift(run).html
    assert html.count('<td class="prose">–</td>') == len(SECONDS) - 1  # behind no step did their experts move
    for text in (
        "Steps 5 to 12: max/mean load per rank is 1.50 to 2.20",
        "from step to step 20% of the assignments go to another expert",
        "smartmoe: its placement is of age 1 to 4: experts moved. Over flat, the first step behind a move is 1.90",
        "fsdp-experts copies all experts at every step, whatever their loads",
        "flat: nothing moved in these steps",
        "means over 8 steps, each another batch of another skew",
        "Bars: 95 % intervals over launches",
    ):
        assert text in html.replace("&#39;", "'")
    assert len(re.findall("<img ", html)) == 1
    (finding,) = words.findings(run)
    mixed = (
        "The routing of walk drifts: every repetition is another step, so times there are means over different batches."
    )
    assert mixed in finding.sentences
    assert "walk: means over different batches" in summary.speedups(run).html
    assert (run.path / "report" / "tables" / "followers.csv").is_file()


def test_nothing_is_shown_of_a_routing_that_stands_still(full, maker):
    run = load(full.path)
    assert drift.steps(run).empty
    html = summary.drift(run).html
    assert html.startswith('<p class="missing">')
    assert "stands still" in html
    assert not compare.drifting(run)
    assert "different batches" not in summary.speedups(run).html + " ".join(words.findings(run)[0].sentences)
    drifting(maker)
    both = load(maker.path)
    assert set(drift.steps(both)["workload"]) == {"walk"}


def test_a_step_is_held_against_its_routing_where_that_stands_still(maker):
    """Of the timed steps, two have the last recorded routing; behind the first of these smartmoe moves experts."""
    params = {"path": "record-e64k8.parquet", "step": 240}
    held = Workload(name="held", tokens_per_rank=64, generator="trace", params={**params, "replay": True, "hold": 2})
    still = Workload(name="still", tokens_per_rank=64, generator="trace", params={**params, "step": 600})
    seconds = {"flat": (1.0, 1.0), "smartmoe": (0.9, 0.6), "hecate": (0.8, 0.4)}  # replayed, and standing still
    base = experiment("flat", "balanced-512", "local-2", "gpt-tiny-moe", "train_step", dtype="float32")
    model = base.model.model_copy(update={"num_experts": 64, "top_k": 2})
    for system, (replayed, known) in seconds.items():
        one, other = (base.model_copy(update={"system": system, "model": model, "workload": w}) for w in (held, still))
        for launch in range(LAUNCHES):
            rows = []
            for rep, step in enumerate((1, 2, 3)):
                each = {**maker.base(one, launch), "rep": rep}
                digest = certify_step(one, step, ran=True).digest
                rows.append({**each, "metric": "time_s", "direction": "total", "value": replayed + rep / 10})
                rows.append({**each, "metric": "step", "value": step, "reason": digest})
                if system == "smartmoe" and step == 2:
                    rows.append({**each, "metric": "moved_bytes", "level": MOVES, "value": 1e6})
            each = {**maker.base(other, launch), "metric": "time_s", "direction": "total"}
            rows += [{**each, "rep": rep, "value": known * (1 + launch / 10)} for rep in range(2)]
            maker.append(rows)
    maker.write_records()
    run = load(maker.path)
    found = drift.stale(run).set_index(["label", "step"])
    assert set(found.index) == {("flat", 2), ("flat", 3), ("smartmoe", 3), ("hecate", 2), ("hecate", 3)}
    mean = (1.1 * 1.2) ** (1 / 3)  # of the launches
    assert found.loc[("hecate", 3), "ratio"]["point"] == pytest.approx(1.0 / (0.4 * mean))
    assert found["since"].to_dict() == {index: index[1] - 1 for index in found.index}
    html = summary.staleness(run).html
    assert "step 3, routing for 2 so" in html
    assert '<td class="num">–</td>' in html
    pooled = compare.pooled_speedup(run, "hecate", "flat")
    assert pooled.num_races == 2
    replayed = (1.0 * 1.1 * 1.2 / (0.8 * 0.9 * 1.0)) ** (1 / 3)
    assert pooled.estimate.point == pytest.approx((replayed * 1 / 0.4) ** 0.5)
