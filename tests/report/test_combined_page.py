"""The page of compositions: a thin notebook, and the best composition against the best single system of every race."""

from __future__ import annotations

import itertools
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml

from harness import presets, registry
from harness.plan.graph import COMPUTE, INTER, Plan, Timeline
from harness.report import gantt
from harness.report.combined import SIDE_BY_SIDE, Combined, busy, hidden, is_composition, of_run
from harness.report.paper import Paper
from harness.report.render import NOTEBOOKS, suite
from harness.report.run import load as load_run
from tests.report.synthetic_run import experiment

SUITES = Path(presets.__file__).parent / "suites"
NOTEBOOK = nbformat.read(NOTEBOOKS / "combined.ipynb", as_version=4)


def test_committed_notebook_is_parameterised_thin_and_without_outputs():
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert suite("combined") == "combined-emulated"
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert max(len(cell.source.splitlines()) for cell in code) <= 12


def test_a_race_has_its_best_of_both_kinds(maker):
    times = {"flat": 1.4, "hecate": 1.2, "hiermoe-hd2+fsmoe": 0.9, "hiermoe-hd2+hecate": 1.0}
    for workload, factor in (("balanced-2048", 1.0), ("zipf-2", 1.5)):
        for name, seconds in times.items():
            slow = factor if "+" in name else 1.0  # composing does not pay where routing is skewed
            maker.timed(experiment(name, workload, phase="layer"), seconds * slow, noise=0.001)
    plan = Plan((COMPUTE, INTER))
    plan.add("dispatch", INTER, kind="dispatch")
    for name, end_s in (("hecate", 0.8), ("hiermoe-hd2+fsmoe", 0.3)):
        timeline = Timeline(plan, np.zeros((1, 2)), np.full((1, 2), end_s))
        maker.store.write_trace(experiment(name, phase="layer").digest, {"forward": timeline})
    maker.write_records()
    kept = {}
    combined = Combined(load_run(maker.path, usual=("flat", "flat")), kept.__setitem__)
    pairs = combined.pairs.set_index("workload")
    assert list(pairs["single"]) == ["hecate", "hecate"]
    assert list(pairs["composition"]) == ["hiermoe-hd2+fsmoe", "hiermoe-hd2+fsmoe"]
    assert pairs.loc["balanced-2048", "point"] == pytest.approx(1.2 / 0.9, rel=0.01)
    assert "in 1 of 2 races, on 1 routing. The interval lies above 1 in 1 of them;" in combined.headline().html
    assert gantt.READING in combined.timelines().html
    unpaid = combined.unpaid().html
    assert "zipf-2" in unpaid
    assert "balanced-2048" not in unpaid
    combined.lanes()
    line, beside = kept["combined_lanes"].to_dict("records")
    assert (line["lane"], line["kind"], line["saved_s"]) == (INTER, "dispatch", pytest.approx(0.5))
    assert (beside["kind"], beside["saved_s"]) == (SIDE_BY_SIDE, pytest.approx(0))


def test_an_exchange_stands_beside_its_lower_bound(maker):
    for name, seconds in (("flat", 1.3), ("hiermoe-hd2", 0.5)):
        maker.timed(experiment(name), seconds, noise=0.001, node_bytes=40e6)  # 0.4 s at the rate of its port
        maker.timed(experiment(name, phase="layer"), seconds, node_bytes=40e6)
    maker.write_records()
    kept = {}
    shown = Combined(load_run(maker.path, usual=("flat", "flat")), kept.__setitem__).bounds().html
    assert list(kept["combined_bounds"]["phase"]) == ["exchange", "exchange"]
    assert "1.25" in shown
    assert "3.25" in shown


def test_without_a_run_it_says_how_to_make_one(tmp_path):
    assert "moebench run --suite combined-emulated" in of_run("", str(tmp_path)).headline().html


def test_every_paper_of_the_related_work_has_its_name_over_its_claims(tmp_path):
    claims = Paper("parm", tmp_path, tmp_path / "combined-emulated").claims("Parm").html
    assert "<caption><div>Parm</div></caption>" in claims
    assert "moebench run --suite combined-emulated" in claims
    cell = next(cell for cell in NOTEBOOK.cells if "Paper(" in cell.source)
    assert all(name in cell.source for name in ("fastermoe", "eps-moe", "ppmoe", "parm", "moge"))


def test_what_a_composition_is():
    assert is_composition("hiermoe-hd2+fsmoe (chunks=2)")
    assert not is_composition("smartmoe (place_every=5)")
    assert not is_composition("fsmoe+serial")


def test_lanes_are_summed_over_directions():
    plan = Plan((COMPUTE,))
    plan.add("experts", COMPUTE)
    once = Timeline(plan, np.zeros((1, 2)), np.array([[1.0, 3.0]]))
    assert busy({"forward": once, "backward": once}) == {(COMPUTE, "experts"): 4.0}


def test_what_lanes_do_side_by_side_is_told():
    plan = Plan((COMPUTE, INTER))
    plan.add("experts", COMPUTE)
    plan.add("dispatch", INTER)
    at = np.array([[0.0], [1.0]]), np.array([[3.0], [5.0]])
    assert hidden({"forward": Timeline(plan, *at)}) == pytest.approx(2.0)


def test_every_system_of_the_suite_is_there():
    whole = yaml.safe_load((SUITES / "combined-emulated.yaml").read_text())
    lists = [each["system"] for each in [whole["defaults"], *whole["experiments"]] if "system" in each]
    names = {each if isinstance(each, str) else each["name"] for each in itertools.chain(*lists)}
    assert all(registry.system(name) for name in names)
    assert {is_composition(name) for name in names} == {True, False}
