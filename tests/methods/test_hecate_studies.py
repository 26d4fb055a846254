"""Hecate's studies on few points: every row has its evidence, and every claim finds its rows."""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import pytest

from harness.report import claims
from harness.studies import Findings
from methods.hecate import assumptions, cells, played, studies


@pytest.fixture(scope="module")
def found() -> dict[str, Findings]:
    small = functools.partial(cells.Cell, steps=6, layers=2)
    with pytest.MonkeyPatch.context() as patch:
        for module in (studies, assumptions):
            patch.setattr(module, "Cell", small)
            patch.setattr(module, "MODELS", ("gpt-moe-s",))
        for module in (played, cells):
            patch.setattr(module, "WARM", 8)
        patch.setattr(studies, "SKEWS", (1.0, 4.0))
        patch.setattr(assumptions, "HALF_LIVES", (100.0,))
        patch.setattr(assumptions, "INTERVALS", (10, 0))
        patch.setattr(assumptions, "CHANGES", {"default": {}})
        tables = {name: study.run(lambda text: None) for name, study in studies.STUDIES.items()}
    for kept in (cells.setup, cells._loads, cells._run, cells.largest_batch):
        kept.cache_clear()
    return tables


def test_every_study_finds_something_and_says_what_was_left_open(found):
    for name, each in found.items():
        assert each.tables, name
        assert each.notes, name
        assert all(len(table) for table in {**each.tables, **each.raw}.values()), name


def test_reported_numbers_stand_beside_in_rows_of_their_own(found):
    for name, table in (("hecate-steps", "speedups"), ("hecate-memory", "text"), ("hecate-batches", "text")):
        assert "reported" in set(found[name].tables[table]["evidence"]), name
    speedups = found["hecate-steps"].tables["speedups"].query("evidence == 'reported'").set_index("testbed")
    assert speedups.loc["A-32", "over_ep_max"] == 1.78
    for name in ("hecate-reshard", "hecate-ablation", "hecate-layers", "hecate-critical-path"):  # predictions
        assert {*pd.concat(found[name].tables.values())["evidence"]} == {"simulated"}


def test_every_claim_finds_its_rows(found):
    every = claims.read(claims.RESULTS / "claims" / "hecate.yaml")
    sources = claims.Sources(known={name: functools.partial(found.get, name) for name in found})  # type: ignore[arg-type]
    verdicts = claims.judge([claim for claim in every if not claim.experiments[0].run], sources)
    assert all(verdict.outcome != "not attempted" for verdict in verdicts)
    assert {verdict.evidence for verdict in verdicts} == {"simulated", "measured"}


def test_what_others_reach_and_hold_stands_beside(found):
    largest = found["hecate-batches"].tables["largest"].set_index("system")
    for system, row in largest.iterrows():
        assert row["beyond_others"] == row["largest_batch"] - largest["largest_batch"].drop(system).max()
    of_model = found["hecate-memory"].raw["models"].groupby(["testbed", "model"])
    assert (of_model["state_over_lowest"].min() == 1).all()
    assert np.allclose(of_model["state_over_lowest"].max(), of_model["state_GB"].max() / of_model["state_GB"].min())


def test_ablation_has_what_the_parts_do(found):
    table = found["hecate-ablation"].tables["ablation"].set_index(["testbed", "routing", "variant"])["moe_over_ep"]
    for where in {key[:2] for key in table.index}:
        assert table[(*where, "neither (EP)")] == 1
        assert table[(*where, "materialisation only")] > 1
        assert table[(*where, "both, calibrated")] >= table[(*where, "both")] * 0.999


def test_a_crossing_is_where_it_stays_above():
    part = pd.DataFrame({"skew": [1.0, 2.0, 3.0, 4.0], "over": [1.2, 0.9, 1.1, 1.3]})
    assert studies._crossing(part, "over", 0.0) == pytest.approx(2.5)
    assert studies._crossing(part, "over", 0.2) == pytest.approx(3.5)
    assert np.isnan(studies._crossing(part, "over", 0.5))
    assert studies._crossing(part, "over", -0.5) == 1.0


def test_the_batch_is_the_largest_that_fits_all():
    cell = cells.Cell("gpt-moe-s", steps=10, layers=2).with_samples()
    device = cells.setup(cell).cluster.device_memory_bytes
    names = [name for name in studies.SYSTEMS if not name.startswith("hecate")]

    def peaks(samples: int) -> list[float]:
        of = cells.dataclasses.replace(cell, samples=samples)
        return [cells.planned(of, cells.run(of, name)).peak for name in names]

    assert max(peaks(cell.samples)) <= device < max(peaks(cell.samples + 1))
