"""The whole instrument, by sabotage: what is put into one system's dispatch is found there, and nowhere else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from harness import cli
from harness.errors import UserError
from harness.regress import decide, run

#: with a bucket of two packets: what a link saves up while dispatch is late, it would make good at once
LINK = {
    "name": "slow-2x1",
    "kind": "emulated",
    "levels": [
        {"name": "node", "size": 2, "bandwidth_bytes_per_s": 6e6, "burst_bytes": 3028},
        {"name": "rank", "size": 1},
    ],
}
DISPATCH = """    def out(self, hop: int, chunk: int) -> None:
"""
SLOWER = """    def out(self, hop: int, chunk: int) -> None:
        import time

        begin = time.perf_counter()
        self.as_it_was(hop, chunk)
        if type(self.journey).__name__ == "FlatJourney" and not self.back:
            time.sleep({share} * (time.perf_counter() - begin))

    def as_it_was(self, hop: int, chunk: int) -> None:
"""


@pytest.fixture
def sabotaged(tmp_path: Path) -> Callable[[float], Path]:
    """A function that makes a checkout in which the flat dispatch takes longer, by a share of its time."""

    def make(share: float) -> Path:
        for folder in ("harness", "baselines", "methods"):
            shutil.copytree(run.ROOT / folder, tmp_path / "head" / folder, ignore=shutil.ignore_patterns("__pycache__"))
        path = tmp_path / "head" / "harness" / "comm" / "trip.py"
        text = path.read_text()
        assert DISPATCH in text
        path.write_text(text.replace(DISPATCH, SLOWER.format(share=share)))
        return tmp_path / "head"

    return make


def suite_of(folder: Path, tokens_per_rank: int, repeats: int) -> Path:
    """Two systems, of which one uses the flat dispatch."""
    experiment = {
        "model": "moe-tiny",
        "cluster": LINK,
        "workload": {"tokens_per_rank": tokens_per_rank, "generator": "uniform"},
        "system": ["flat", "hiermoe-hd2"],
        "phase": "exchange",
        "dtype": "float32",
        "repeats": repeats,
        "launches": 1,
    }
    suite = folder / "suite.yaml"
    suite.write_text(yaml.safe_dump({"name": "sabotage", "experiments": [experiment]}))
    return suite


def test_what_the_sabotage_changes_is_there(sabotaged):
    assert "as_it_was" in (sabotaged(1.0) / "harness" / "comm" / "trip.py").read_text()


@pytest.mark.long
@pytest.mark.timed
def test_a_dispatch_of_thrice_the_time_is_caught_and_nothing_else(sabotaged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "NUM_SESSIONS", 2)  # each starts both sides anew, which takes most of the time
    sides = ["--base", str(run.ROOT), "--head", str(sabotaged(2.0))]
    rest = ["--suite", str(suite_of(tmp_path, 512, 1)), "--pairs", "8", "--results", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", ["moebench", "regress", *sides, *rest])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    said = json.loads(capsys.readouterr().out)
    print(pd.DataFrame(said["rows"]).to_string(index=False))
    assert said["not_compared"] == []
    assert len(said["rows"]) == 4
    slower = [(row["system"], row["direction"]) for row in said["rows"] if row["verdict"] == "slower"]
    assert (exit_.value.code, said["slower"], slower) == (1, 1, [("flat", "forward")])
    (ratio,) = [row["ratio"] for row in said["rows"] if row["verdict"] == "slower"]
    assert ratio > 1.3  # seen: 2.0; an alarm by chance is smaller


@pytest.mark.long
@pytest.mark.minutes
@pytest.mark.timed
def test_five_per_cent_in_dispatch_are_caught(sabotaged, tmp_path):
    suite = suite_of(tmp_path, 2048, 5)  # 5 % of dispatch are 2.5 % of a forward pass; what a busy machine adds is less
    pairs, setbacks = run.race_pairs(run.ROOT, sabotaged(0.05), suite, 16, tmp_path / "logs", lambda text: None)
    assert setbacks == []
    table = decide.decide(pairs).set_index(["system", "direction"])
    print(table.to_string())
    assert table.loc[("flat", "forward"), "verdict"] == "slower"
    assert 1.01 < table.loc[("flat", "forward"), "ratio"] < 1.05
    assert set(table.loc["hiermoe-hd2", "verdict"]) <= {"same", "faster"}  # it does not use that dispatch


def test_a_reference_of_another_machine_and_none_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "REFERENCE", tmp_path)
    with pytest.raises(UserError, match="there is none; make one with moebench regress --save-reference"):
        run.against_reference(run.ROOT, "quick", run.suite_file("quick"), 4, tmp_path, print)
    (tmp_path / "quick.json").write_text('{"machine": "a pocket calculator", "times": []}')
    with pytest.raises(UserError, match="was made on another machine than this"):
        run.against_reference(run.ROOT, "quick", run.suite_file("quick"), 4, tmp_path, print)


def test_a_folder_that_is_no_checkout(tmp_path):
    with pytest.raises(UserError, match="holds no moebench"), run.checkout(str(tmp_path)):
        pass


class Fails:
    """A side whose head cannot run, in other words of the same kind in every session."""

    def __init__(self, root: Path, suite_path: Path, log_dir: Path):
        self.name, self.log = log_dir.name.partition("-")[0], log_dir

    def run(self, race: int) -> dict[str, object]:
        if self.name == "base":
            return {"cells": []}
        return {"error": f"RankFailure: rank 2 raised in phase 'p': RuntimeError: bad day (log: {self.log}/rank-2.log)"}

    def close(self) -> None:
        """Nothing was started."""


def test_what_fails_in_every_session_is_told_once_with_its_side_and_a_log(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Side", Fails)
    pairs, setbacks = run.race_pairs(tmp_path, tmp_path, suite_of(tmp_path, 64, 1), 8, tmp_path, lambda text: None)
    assert pairs.empty
    (said,) = setbacks
    words = "head: RankFailure: rank 2 raised in phase 'p': RuntimeError: bad day"
    assert said.endswith(f": {words} (log: {tmp_path}/head-0/rank-2.log)")
