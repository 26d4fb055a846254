"""Two runs beside each other, tables for LaTeX, and the page that lists all pages."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.errors import UserError
from harness.report import index, render, versus
from harness.report.keep import keep
from harness.report.run import load
from tests.report.synthetic_run import RunMaker, experiment


def timed(path: Path, seconds: float, systems: tuple[str, ...] = ("flat",)) -> Path:
    made = RunMaker(path)
    for system in systems:
        made.timed(experiment(system), seconds)
    made.write_records()
    return path


def test_a_run_beside_a_slower_one(tmp_path):
    new = load(timed(tmp_path / "runs" / "new", 1.0, ("flat", "megatron")))
    old = load(timed(tmp_path / "runs" / "old", 1.2))
    frame = versus.ratios(new, old)
    assert set(frame["label"]) == {"flat"}
    total = frame[frame["direction"] == "total"].iloc[0]
    assert total["ratio"] == pytest.approx(1.2, abs=0.02)
    assert 1 < total["low"] < total["ratio"] < total["high"] < 1.3
    assert "megatron" in versus.only_one(new, old).html
    with pytest.raises(UserError, match="name the run to compare with"):
        versus.other_run(str(new.path), "")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run and an older one beside it: a kernel costs seconds."""
    runs = tmp_path_factory.mktemp("results") / "runs"
    new, _ = timed(runs / "new", 1.0), timed(runs / "old.v1", 1.2)
    return render("compare", new, parameters={"other": "old.v1"})


def test_what_is_wrong_inside_a_notebook_is_one_line(page):
    with pytest.raises(UserError, match=r"^run: '.*runs/older': no such folder; known runs: new, old\.v1$"):
        render("compare", page.parents[1], parameters={"other": "older"})
    here = {path.name for path in page.parent.iterdir()}
    assert here == {"compare-old.v1.html", "compare-old.v1.ipynb", "tables"}


def test_the_page_of_two_runs_and_the_page_of_all_pages(page):
    new, results = page.parents[1], page.parents[3]
    assert "old.v1 / new" in page.read_text()
    assert (new / "report" / "tables" / "versus_old.v1.tex").read_text().count("\\\\") >= 3
    listed = index.write(results).read_text()
    assert all("viewport" in html for html in (page.read_text(), listed))
    assert "runs/new/report/compare-old.v1.html" in listed  # a third run's page lies beside it
    assert "run new and old.v1" in listed
    assert re.search(r'href="runs/new/report/tables">[1-9]\d* CSV, [1-9]\d* LaTeX<', listed)
    (results / "report" / "tables" / "fsmoe").mkdir(parents=True)
    (results / "report" / "fsmoe.html").touch()
    (results / "report" / "tables" / "fsmoe" / "a.csv").touch()
    assert 'href="report/tables/fsmoe">1 CSV, 0 LaTeX<' in index.write(results).read_text()


def test_latex_of_awkward_words(tmp_path):
    keep(tmp_path, "t", pd.DataFrame({"a_b": ["50 % & more", "x_1"], "value": [1.23456, np.nan]}))
    text = (tmp_path / "t.tex").read_text()
    assert r"a\_b" in text
    assert r"50 \% \& more" in text
    assert "1.235" in text
    keep(tmp_path, "long", pd.DataFrame({"a": range(1000)}))
    assert not (tmp_path / "long.tex").exists()
