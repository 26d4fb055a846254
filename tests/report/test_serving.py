"""The report of served models: latency, throughput, tail and mean of a layer's parts."""

from __future__ import annotations

import pandas as pd
import pytest

from harness.bench import suite
from harness.report import claims, serving
from harness.report.paper import Paper
from harness.report.run import load
from tests.report.synthetic_run import RunMaker, experiment


@pytest.fixture
def served(maker: RunMaker) -> RunMaker:
    """Two systems over 2 layers, 2 launches, 4 ranks' parts, one of which takes longer."""
    for system, slow in (("flat", 3.0), ("moetuner", 1.5)):
        cell = experiment(system, "recorded-512", "emulated-2x4", phase="prefill", backward=False)
        rows = []
        for launch in range(2):
            base = maker.base(cell, launch)
            for rep in range(2):
                line = {"direction": "total", "rep": rep}
                rows.append({**base, **line, "metric": "time_s", "value": slow + 0.01 * rep, "unit": "s"})
                rows.append({**base, **line, "metric": "tokens_per_s", "value": 4096 / slow, "unit": "tokens/s"})
                for layer in range(2):
                    for rank in range(4):
                        value = slow if rank == layer else 1.0
                        part = {"metric": "experts_s", "level": f"layer{layer}", "rank": rank, "value": value}
                        rows.append({**base, **line, **part, "unit": "s"})
            rows.append({**base, "metric": "placed_max_over_mean", "level": "layer0", "value": slow, "unit": "ratio"})
        maker.append(rows)
    maker.write_records()
    return maker


def test_tail_is_the_slowest_rank_and_mean_is_over_ranks(served: RunMaker) -> None:
    run = load(served.path, baseline="flat", control="moetuner")
    found = serving.parts(run).set_index("label")
    assert found.loc["flat", ["tail_s", "mean_s"]].tolist() == [3.0, 1.5]
    assert found.loc["moetuner", ["tail_s", "mean_s"]].tolist() == [1.5, 1.125]
    assert found["max_over_mean_load"].to_dict() == {"flat": 3.0, "moetuner": 1.5}
    times = serving.latencies(run).set_index("label")
    assert times.loc["flat", "p50_s"] == pytest.approx(3.005)
    assert times.loc["flat", "p99_s"] == pytest.approx(3.01)
    assert times.loc["moetuner", "tokens_per_s"] == pytest.approx(4096 / 1.5)
    assert times.loc["moetuner", "token_s"] == pytest.approx(4 * 1.5 / 4096)
    layers = serving.parts(run, by_layer=True).set_index(["label", "layer"])
    assert layers["tail_s"].to_dict() == {
        (name, f"layer{i}"): v for name, v in (("flat", 3.0), ("moetuner", 1.5)) for i in (0, 1)
    }


def test_the_section_has_ratios_with_intervals_and_keeps_its_tables(served: RunMaker, tmp_path) -> None:
    paper = Paper("moetuner", tmp_path, served.path)
    html = serving.shown(paper, "moetuner-emulated", "moetuner", "flat").html
    assert "Latency and throughput" in html
    assert "Parts of a layer" in html
    kept = pd.read_csv(tmp_path / "tables" / "moetuner" / "serving_latency.csv").set_index("label")
    assert kept.loc["moetuner", "low"] <= kept.loc["moetuner", "point"] <= kept.loc["moetuner", "high"]
    assert kept.loc["moetuner", "point"] == pytest.approx(2.0, rel=0.02)


def test_without_a_run_the_section_says_how_to_make_one(tmp_path) -> None:
    html = serving.shown(Paper("moetuner", tmp_path), "moetuner-emulated", "moetuner", "flat").html
    assert "moebench run --suite moetuner-emulated" in html


def test_the_notebooks_suite_serves_what_the_claims_name() -> None:
    found = suite.load("moetuner-emulated")
    assert {race.first.phase for race in found.races} == {"prefill", "decode"}
    assert {"emulated-2x4-balanced", "emulated-4x2-balanced"} <= {race.first.cluster.name for race in found.races}
    bound = [
        e for claim in claims.read(claims.RESULTS / "claims" / "moetuner.yaml") for e in claim.experiments if e.run
    ]
    assert [each.run for each in bound] == ["moetuner-emulated"]
    assert all({"flat", "moetuner"} <= {e.system for e in race.experiments} for race in found.races)
