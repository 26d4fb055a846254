"""Inputs are read before ranks start: a bad cell costs itself alone, a file that cannot be read is told once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from baselines.fsdp import FSDPExperts
from harness import listing, simulating
from harness.bench import dry, inputs, suite
from harness.bench.run import run_suite
from harness.bench.store import Store
from harness.errors import UserError
from harness.plan.choice import Wanted
from harness.routing.trace import Header, Recorded, write_trace

FILE = """
name: mixed
defaults: {{cluster: local-2, dtype: float32, repeats: 1, launches: 1}}
experiments:
  - model: {{num_layers: 2, hidden: 16, ffn: 16, num_experts: 8, top_k: 2, num_heads: 2, seq: 8, vocab: 64}}
    workload: {workload}
    system: {system}
    phase: {phase}
"""


def written(folder: Path, num_layers: int = 2) -> Path:
    """A trace of 32 tokens."""
    header = Header(model="m", num_experts=8, top_k=2, num_layers=num_layers, corpus="", command="", date="")
    ids = np.stack([np.arange(32) % 8, (np.arange(32) + 3) % 8], axis=1)
    rows = [Recorded(0, layer, ids, np.full((32, 2), 0.5), 1.0) for layer in range(num_layers)]
    write_trace(folder / "t.parquet", header, rows)
    return folder / "t.parquet"


def asked(workload: str, system: str = "flat", phase: str = "layer") -> str:
    return FILE.format(workload=workload, system=system, phase=phase)


def test_a_bad_cell_is_a_row_and_the_good_ones_run(tmp_path: Path) -> None:
    path = written(tmp_path)
    of_trace = f"{{name: long, tokens_per_rank: 500, generator: trace, params: {{path: {path}}}}}"
    text = asked(
        f"[{{tokens_per_rank: 8, generator: uniform}}, {of_trace}]", "[flat, {name: hecate, options: {t: -3}}]"
    )
    mixed = suite.parse(text, "mixed.yaml", strict=False)
    rows = list(dry.rows(mixed))
    assert [bool(row["refused"]) for row in rows] == [False, True, True, True]
    counts = run_suite(mixed, tmp_path / "run", show_progress=False)
    assert counts == {"ok": 1, "failed": 3}
    told = Store(tmp_path / "run").outcomes()
    reasons = sorted(reason for _, status, reason, done in told.values() if status == "failed" and not done)
    assert "mixed.yaml: experiments[0]: options.t: -3: must be a whole number" in reasons[0]
    assert all("mixed.yaml: experiments[0]: workload long.tokens_per_rank: 500" in reason for reason in reasons[1:])
    assert all("the trace t.parquet has 32" in reason for reason in reasons[1:])
    parts = sorted((tmp_path / "run").glob("rows-*"))
    run_suite(suite.parse(text, "mixed.yaml", strict=False), tmp_path / "run", show_progress=False)
    assert sorted((tmp_path / "run").glob("rows-*")) == parts  # told once
    with pytest.raises(UserError, match=r"tokens_per_rank: 500"):
        suite.parse(text, "mixed.yaml")


def test_where_no_good_cell_is_left_the_first_reason_is_an_error(tmp_path: Path) -> None:
    text = asked("{tokens_per_rank: 8, generator: uniform}", "[{name: hecate, options: {t: -3}}]")
    with pytest.raises(UserError, match=r"^mixed.yaml: experiments\[0\]: options.t: -3"):
        run_suite(suite.parse(text, "mixed.yaml", strict=False), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("which", ["trace", "placement", "weights"])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it_once(tmp_path: Path, which: str) -> None:
    path, good = tmp_path / f"a.{which}", "{tokens_per_rank: 8, generator: uniform}"
    path.write_text("not what it should be")
    text = {
        "trace": asked(f"[{good}, {{tokens_per_rank: 8, generator: trace, params: {{path: {path}}}}}]"),
        "placement": asked(good, f"[flat, {{name: moetuner, options: {{placement: {path}}}}}]", "prefill"),
        "weights": asked(
            f"[{good}, {{tokens_per_rank: 8, generator: natural, params: {{weights: {path}}}}}]", "flat", "prefill"
        ),
    }[which]
    with pytest.raises(UserError) as error:
        inputs.sift(suite.parse(text, "mixed.yaml", strict=False))
    said = str(error.value)
    assert said.startswith("mixed.yaml: experiments[0]: ")
    assert said.count(str(path)) == said.count("mixed.yaml") == 1, said
    assert "\n" not in said


def test_every_layer_of_a_trace_is_looked_at(tmp_path: Path) -> None:
    path = written(tmp_path, num_layers=1)
    text = asked(f"{{tokens_per_rank: 8, generator: trace, params: {{path: {path}}}}}", phase="prefill")
    with pytest.raises(UserError, match=r"experiments\[0\]: .*params.layer: 1: the trace t.parquet has layers 0"):
        suite.parse(text, "mixed.yaml")


def bad_day(case: object = None) -> None:
    raise RuntimeError("bad day")


def leaves(case: object = None) -> None:
    sys.exit("leaving")


@pytest.mark.parametrize(
    ("fails", "words"), [(bad_day, "RuntimeError: bad day, at "), (leaves, "SystemExit: leaving, at ")]
)
@pytest.mark.parametrize("asked_for", ["planned_bytes", "refuse", "missing", "version"])
def test_a_system_that_cannot_answer_costs_its_own_cell(monkeypatch, tmp_path, asked_for, fails, words) -> None:
    """Whatever is asked of it, in every command, and also where it would end the process."""
    monkeypatch.setattr(FSDPExperts, asked_for, fails)
    text = asked("{tokens_per_rank: 8, generator: uniform}", "[flat, fsdp-experts]")
    text = text.replace("ffn: 16", "ffn: 24").replace("local-2", "emulated-2x4-balanced")
    plans = asked_for in ("planned_bytes", "refuse")
    whole = suite.parse(text, "mixed.yaml", strict=False)
    rows = {row["system"]: row["refused"] for row in dry.rows(whole)}
    assert rows["flat"] is None
    assert (words in rows["fsdp-experts"]) if plans else rows["fsdp-experts"].startswith(words[:-5])
    found = inputs.sift(suite.parse(text, "mixed.yaml", strict=False))
    assert [each.system for each in found.experiments] == ["flat"] if plans else not found.bad
    if plans:
        assert f"fsdp-experts cannot be planned: {words}" in found.bad[0].reason
    listed = {each["name"]: each["missing"] for each in listing.listing("systems")}
    assert (listed["fsdp-experts"] is None) == plans
    counts = simulating.simulate_suite(whole, tmp_path / "sim", Wanted(), show_progress=False)
    assert counts == ({"ok": 1, "failed": 1} if plans else {"ok": 2})
