"""Hecate's page: a thin notebook whose every study, table and suite is there."""

from __future__ import annotations

import re

import nbformat

from harness.bench.suite import load
from harness.registry import systems
from harness.report import claims
from harness.report.render import NOTEBOOKS, suite
from methods.hecate.studies import STUDIES

NOTEBOOK = nbformat.read(NOTEBOOKS / "hecate.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def test_committed_notebook_is_parameterised_thin_and_without_outputs():
    assert all(not cell.outputs and cell.execution_count is None for cell in CODE)
    assert [cell for cell in CODE if "parameters" in cell.metadata.get("tags", [])]
    assert max(len(cell.source.splitlines()) for cell in CODE) <= 12


def test_every_study_is_shown():
    shown = set(re.findall(r'"(hecate-[a-z-]+)"', "".join(cell.source for cell in CODE)))
    assert shown == {*STUDIES, "hecate-emulated"}


def test_its_suite_races_every_system_that_the_claims_name():
    assert suite("hecate") == "hecate-emulated"
    experiments = load("hecate-emulated").experiments
    assert {each.system for each in experiments} <= set(systems())
    raced = set()
    for each in experiments:
        options = ", ".join(f"{key}={value}" for key, value in sorted(each.options.items()))
        raced.add(f"{each.system} ({options})" if options else each.system)
    for claim in claims.read(claims.RESULTS / "claims" / "hecate.yaml"):
        for each in claim.experiments:
            if each.run:
                assert {each.where["label"], each.over["label"]} <= raced


def test_reported_values_are_looked_up_and_not_typed():
    text = (claims.RESULTS / "claims" / "hecate.yaml").read_text()
    data = re.sub(r"^ *(statement|note|#).*$", "", text, flags=re.MULTILINE)
    code = "".join(cell.source for cell in CODE)
    assert not re.search(r"1\.(40|58|34|78|26|70|645|52)\b|2\.05\b|2\.945|3\.54|5\.18|5\.73", data + code)
