"""No number of a study, and no prediction of an emulated suite, changes unseen: ``python -m tests.goldens`` freezes."""

from __future__ import annotations

import pandas as pd
import pytest

from harness.studies import studies
from tests.goldens import frozen

#: a second or so each; the others take about ten minutes together: make test-goldens
QUICK = ("fsmoe-breakdown", "fsmoe-gates", "fsmoe-grid", "fsmoe-models")
MEASURED = {"fsmoe-solver", "hiermoe-search", "moetuner-solvers", "hecate-planners"}  # times of this machine alone
LASTING = [name for name in studies() if name not in {*QUICK, *MEASURED}]


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch):
    monkeypatch.chdir(frozen.DATA.parents[2])


@pytest.mark.parametrize("name", QUICK)
def test_studies_say_what_they_said(name):
    unchanged(name, frozen.of_study(name))


@pytest.mark.long
@pytest.mark.goldens
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LASTING)
def test_every_other_study_says_what_it_said(name):
    unchanged(name, frozen.of_study(name))


@pytest.mark.parametrize("name", frozen.SUITES)
def test_predictions_of_the_emulated_suites_are_what_they_were(name):
    unchanged(name, frozen.of_suite(name))


def test_everything_is_frozen():
    names = {path.name.split(".")[0] for path in frozen.DATA.glob("*.csv")}
    assert {*studies(), *frozen.SUITES} - names == MEASURED
    assert sum(path.stat().st_size for path in frozen.DATA.glob("*.csv")) < 1_000_000


def test_a_changed_number_is_seen(monkeypatch, tmp_path):
    monkeypatch.setattr(frozen, "DATA", tmp_path)
    table = pd.DataFrame({"system": ["a", "b"], "step_s": [1.0, 2.0], "none": [float("nan"), 0.0]})
    assert frozen.changes("t", table) == ["t: is new, 2 rows"]
    frozen.write("t", table)
    assert frozen.changes("t", table * 1) == []
    assert frozen.changes("t", table.assign(step_s=[1.0, 2.0 * (1 + 1e-10)])) == []
    assert frozen.changes("t", table.assign(step_s=[1.0, 2.0 * (1 + 3e-9)])) == [
        "t: step_s: 1 of 2, in row 2 '2' is now '2.000000006'"
    ]
    assert frozen.changes("t", table.assign(system=["a", "c"])) == ["t: system: 1 of 2, in row 2 'b' is now 'c'"]
    assert frozen.changes("t", table.assign(none=[1.0, 0.0]))
    assert frozen.changes("t", table.assign(step_s=[1.0, float("nan")]))
    assert frozen.changes("t", table[:1]) == ["t: 2 rows, now 1"]
    assert frozen.changes("t", table.drop(columns="none")) == ["t: columns none"]


def unchanged(name, tables):
    found = [line for key, table in tables.items() for line in frozen.changes(key, table)]
    gone = {path.stem for path in frozen.DATA.glob(f"{name}.*.csv")} - set(tables)
    assert not found + [f"{each}: is gone" for each in sorted(gone)]
