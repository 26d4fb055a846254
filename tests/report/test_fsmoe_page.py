"""FSMoE's page: its cells over small studies, with and without its own run, and a page that needs no run."""

from __future__ import annotations

import ast
import importlib
import re
import resource
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest

from harness.bench.store import Store
from harness.bench.suite import load
from harness.cli.run import _notebook_and_run
from harness.errors import Failure, UserError
from harness.plan.graph import Plan, Timeline
from harness.report import claims, render
from harness.report.paper import Paper
from harness.report.predicted import Simulator
from harness.report.render import NOTEBOOKS, suite
from harness.report.run import load as load_run
from methods.fsmoe import closeup, sensitivity, studies
from tests.report.synthetic_run import RunMaker, experiment

PLAN = Plan()
PLAN.add("backward.dispatch[0]", "inter")
PLAN.add("backward.experts[0]", "compute")
TIMELINE = Timeline(PLAN, np.array([[0.0, 0.0], [0.4, 0.5]]), np.array([[0.4, 0.5], [0.9, 1.0]]))
NOTEBOOK = nbformat.read(NOTEBOOKS / "fsmoe.ipynb", as_version=4)


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, str]:
    """HTML of every section, its cells run here (a kernel costs seconds and another test starts one), over studies
    that are the real ones with fewer points."""
    first, *_ = sensitivity.changes()
    contention = next(change for change in sensitivity.changes() if change.about == "contention")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "changes", lambda: [first, contention])
        patch.setattr(studies, "SWEPT", studies.SWEPT[:1])
        patch.setattr(studies, "MODELS", {testbed: models[:1] for testbed, models in studies.MODELS.items()})
        for name in ("LENGTHS", "RANKS", "MICRO_BATCHES"):
            patch.setattr(studies, name, getattr(studies, name)[-1:])
        patch.setattr(closeup, "NUM_TIMED", 2)
        folder = tmp_path_factory.mktemp("page")
        names: dict[str, Any] = {}
        found, title = {"": ""}, ""
        for cell in NOTEBOOK.cells:
            if cell.cell_type == "markdown":
                if heading := re.match("## (.*)", cell.source):
                    title = heading[1]
                    found[title] = ""
            elif "parameters" in cell.metadata.get("tags", []):
                names |= {"out_dir": str(folder), "run_dir": ""}
            else:
                found[title] += _shown(cell.source, names)
        found["tables"] = " ".join(path.name for path in folder.rglob("*.csv"))
        return found


def _shown(source: str, names: dict[str, Any]) -> str:
    """What a cell shows: the value of its last statement, if that is an expression."""
    *head, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        exec(compile(source, "cell", "exec"), names)
        return ""
    exec(compile(ast.Module(head, []), "cell", "exec"), names)
    return str(eval(compile(ast.Expression(last.value), "cell", "eval"), names)._repr_html_())


def test_every_section_shows_something_and_says_its_evidence(sections):
    for title, html in sections.items():
        if title not in ("", "tables", "How to read this page", "Run here: the emulated grid"):
            assert re.search(r'class="badge simulated"|alt="Gantt', html), title
    for title in ("Table 5: the configured layers", "One layer, operation by operation", "Real models", "Gates"):
        assert 'class="badge reported"' in sections[title], title
    assert 'class="badge reported"' not in sections["Sweeps: predictions"]
    assert "moebench run --suite fsmoe-emulated" in sections["Run here: the emulated grid"]
    assert ">26.45<" in sections["One layer, operation by operation"]  # as Table 2 prints it
    assert ">26.5<" in sections["One layer, operation by operation"]  # simulated
    assert "verdicts.csv" in sections["tables"]


def test_every_claim_has_its_verdict_and_its_evidence(sections):
    html = sections["Claims and verdicts"]
    rows = re.findall(r"<tr[^>]*>\s*<td.*?</tr>", html, flags=re.DOTALL)
    found = claims.read(claims.RESULTS / "claims" / "fsmoe.yaml")
    assert len(rows) == sum(max(1, len(claim.experiments)) for claim in found)
    for row in rows:
        outcome = re.search(r'badge verdict ([a-z-]+)"', row)
        level = re.search(r'badge (measured|emulated|simulated)"', row)
        assert outcome
        assert (level is None) == (outcome[1] == "not-attempted")
    assert "1.18×" in html  # as printed
    assert "&lt;small" not in html


def test_reported_values_are_looked_up_and_not_typed():
    """Neither the claims nor the notebook hold a printed average as a number that something computes with."""
    text = (claims.RESULTS / "claims" / "fsmoe.yaml").read_text()
    data = re.sub(r"^ *(statement|note|#).*$", "", text, flags=re.MULTILINE)
    code = "".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code")
    assert not re.search(r"1\.(18|22|12|16|09|08|42)\b|3\.01", data + code)


def test_committed_notebook_is_parameterised_thin_and_without_outputs():
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert max(len(cell.source.splitlines()) for cell in code) <= 12
    assert suite("fsmoe") == "fsmoe-emulated"


@pytest.fixture
def own(tmp_path) -> RunMaker:
    """Two layers under two schedules: FSMoE is a quarter faster on each."""
    maker = RunMaker(tmp_path / "runs" / "fsmoe-emulated")
    for model in ("local-m512-e16k2", "local-m1024-e64k8"):
        for system, seconds in (("fsmoe-tutel", 1.0), ("fsmoe", 0.8)):
            maker.timed(experiment(system, model=model, phase="layer"), seconds)
    maker.write_records()
    return maker


def test_own_run_gives_an_interval_and_judges_the_simulator(own, tmp_path):
    paper = Paper("fsmoe", tmp_path, own.path)

    class Known(Simulator):
        def predictions(self, run) -> pd.DataFrame:
            cells = run.rows.drop_duplicates("cell")
            at = cells["system"].map({"fsmoe-tutel": 1.1, "fsmoe": 0.72})
            return pd.DataFrame({"cell": cells["cell"], "direction": "total", "predicted_s": at})

        def timelines(self, run, cell) -> dict[str, Timeline]:
            return {"backward": TIMELINE}

    for cell in load_run(own.path, baseline="fsmoe-tutel").rows["cell"].unique():
        Store(own.path).write_trace(cell, {"backward": TIMELINE})
    html = paper.own_run("fsmoe-emulated", "fsmoe", "fsmoe-tutel", Known()).html
    assert 'fsmoe, executed [emulated]; fsmoe [simulated]."' in html
    pooled = pd.read_csv(paper.tables / "pooled_speedups.csv").iloc[0]
    assert pooled["low"] < 1.25 < pooled["high"]
    assert pooled["predicted"] == pytest.approx(1.1 / 0.72)
    assert (pooled["label"], pooled["num_races"], pooled["evidence"]) == ("fsmoe", 2, "emulated")
    errors = pd.read_csv(paper.tables / "predictions.csv").groupby("label")["error"].mean()
    assert errors["fsmoe"] == pytest.approx(-0.1, abs=0.02)
    assert errors["fsmoe-tutel"] == pytest.approx(0.1, abs=0.02)
    assert "The simulator against what ran" in html
    assert '<span class="faster">1.25×' in html
    assert "&lt;" not in html
    every = claims.read(claims.RESULTS / "claims" / "fsmoe.yaml")
    (verdict,) = claims.judge([claim for claim in every if claim.id == "faster-than-tutel"], paper.sources)
    assert (verdict.outcome, verdict.evidence, verdict.num_rows) == ("reproduced", "emulated", 2)


def test_own_run_without_a_calibration_keeps_its_times(own, tmp_path):
    simulator = Simulator(tmp_path)
    html = Paper("fsmoe", "", own.path).own_run("s", "fsmoe", "fsmoe-tutel", simulator).html
    assert "moebench profile emulated-2x4" in html
    assert 'class="badge emulated"' in html


def test_page_without_a_run(tmp_path, monkeypatch):
    cells = [
        nbformat.v4.new_code_cell('run_dir = "?"\nout_dir = "?"', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(f'run <{run_dir}> to {out_dir}')"),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata | {"moebench": {"suite": "mine"}})
    nbformat.write(notebook, tmp_path / "mine.ipynb")
    notebook.metadata.pop("moebench")
    nbformat.write(notebook, tmp_path / "needy.ipynb")
    module = importlib.import_module("harness.report.render")  # harness.report.render is its function
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path)
    html = render("mine", None, out=tmp_path / "results" / "report").read_text()
    assert f"run &lt;&gt; to {tmp_path / 'results' / 'report'}" in html
    with pytest.raises(UserError, match=r"needy reports on a run; make one with moebench run"):
        render("needy", None)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", Failure, r"the process that executes mine\.ipynb was killed"),
        ("print('x' * 300_000)", UserError, r"report folder: '.*report': cannot be written \(File too large\); free"),
    ],
)
def test_a_page_that_ends_early_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, code, error, message):
    cells = [
        nbformat.v4.new_code_cell('run_dir = "?"', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    kernel = {"name": "python3", "display_name": "", "language": "python"}
    metadata = {"kernelspec": kernel, "moebench": {"suite": "mine"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "mine.ipynb")
    monkeypatch.setattr(importlib.import_module("harness.report.render"), "NOTEBOOKS", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # as a disk that is full
    try:
        with pytest.raises(error, match=message):
            render("mine", None, out=tmp_path / "report")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "report").iterdir())


def test_command_takes_the_papers_own_run_or_none(tmp_path, own):
    RunMaker(own.path.parent / "later")
    assert _notebook_and_run("fsmoe", "", own.path.parent) == ("fsmoe", own.path)
    assert _notebook_and_run("fsmoe", "later", own.path.parent) == ("fsmoe", own.path.parent / "later")
    assert _notebook_and_run("fsmoe", "", tmp_path / "nowhere") == ("fsmoe", None)
    assert _notebook_and_run("summary", "later", own.path.parent) == ("summary", own.path.parent / "later")
    with pytest.raises(UserError, match="holds no run yet"):
        _notebook_and_run("summary", "", Path(tmp_path / "nowhere"))


def test_the_suite_of_the_notebook_is_there():
    assert {each.system for each in load(str(suite("fsmoe"))).experiments} >= {"fsmoe", "fsmoe-tutel"}
