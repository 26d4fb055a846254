"""Whole runs on real ranks: what a race stores, what a bad system becomes, and how a killed run resumes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from harness import registry
from harness.bench import progress, run, suite
from harness.bench.store import Store
from harness.errors import UserError
from harness.launch import session
from harness.report import ending
from tests.bench import systems

ROOT = Path(__file__).parents[2]
EXPERIMENTS = """
name: tiny
defaults:
  cluster:
    name: emulated-2x2
    kind: emulated
    levels: [{name: node, size: 2, bandwidth_bytes_per_s: 50.0e+6}, {name: rank, size: 2}]
  dtype: float32
  repeats: 2
  launches: 1
experiments:
  - {model: moe-tiny, system: [flat, hiermoe-hd2], phase: exchange,
     workload: {name: uniform-3000, tokens_per_rank: 3000, generator: uniform}}
  - {model: gpt-tiny-moe, system: [flat, hiermoe-hd2], phase: train_step,
     workload: {name: natural-64, tokens_per_rank: 64, generator: natural}}
"""


def value(rows: pd.DataFrame, **where: object) -> float:
    """The median of the rows that have these values."""
    for column, wanted in where.items():
        rows = rows[rows[column] == wanted]
    assert len(rows), where
    return float(rows["value"].median())


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is killed after its first race, and run again."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(EXPERIMENTS)
    code = (
        "import sys; from harness.bench.run import run_suite;"
        "print(run_suite(sys.argv[1], sys.argv[2], show_progress=False))"
    )
    command = [sys.executable, "-c", code, str(folder / "tiny.yaml"), str(folder / "tiny")]
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((folder / "tiny").glob("rows-*.parquet")):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    first = set((folder / "tiny").glob("rows-*.parquet"))
    assert len(first) == 1
    found = run.run_suite(folder / "tiny.yaml", folder / "tiny", show_progress=False)
    assert sum(found.values()) == 4
    assert first < set((folder / "tiny").glob("rows-*.parquet"))
    return folder / "tiny"


def test_a_killed_run_resumes_after_the_finished_races(killed_and_resumed: Path) -> None:
    store = Store(killed_and_resumed)
    assert store.damaged() == []
    assert len(list(killed_and_resumed.glob("rows-*.parquet"))) == 2  # nothing ran twice
    experiments = suite.parse(EXPERIMENTS, "tiny").experiments
    assert store.finished() == {(experiment.digest, 0) for experiment in experiments}
    assert run.plan(suite.parse(EXPERIMENTS, "tiny"), None, store.finished()) == []
    again = run.plan(suite.parse(EXPERIMENTS, "tiny"), 2, store.finished())
    assert [launch for each in again for launch, _ in each.tasks] == [1, 1]


def test_what_a_race_stores(killed_and_resumed: Path) -> None:
    rows = Store(killed_and_resumed).read("raise")
    exchange = rows[rows["phase"] == "exchange"]
    assert set(exchange["evidence"]) == {"emulated"}
    assert set(rows["status"]) <= {"ok", "cpu_bound"}
    for system in ("flat", "hiermoe-hd2"):
        of_system = exchange[exchange["system"] == system]
        times = of_system[of_system["metric"] == "time_s"]
        assert set(zip(times["rep"], times["direction"], strict=True)) == {
            (rep, direction) for rep in (0, 1) for direction in ("forward", "backward", "total")
        }
        assert len(of_system[of_system["metric"] == "rank_time_s"]) == 2 * 2 * 4
        assert value(of_system, metric="error_output") < 1e-5
        assert value(of_system, metric="max_over_mean", level="expert") > 1
        if "shaped" in set(exchange["network"]):
            for direction in ("forward", "backward"):
                planned = value(of_system, metric="bytes_planned", direction=direction, level="node")
                counted = value(of_system, metric="bytes_counted", direction=direction, level="node")
                assert 0.98 * planned < counted < 1.05 * planned
                limit = value(of_system, metric="speed_of_light_s", direction=direction)
                assert limit * 0.9 < value(of_system, metric="time_s", direction=direction)
    train = rows[rows["phase"] == "train_step"]
    losses = train[train["metric"] == "loss"].pivot_table(index="rep", columns="system", values="value")
    assert losses["flat"].to_numpy() == pytest.approx(losses["hiermoe-hd2"].to_numpy(), rel=1e-4)
    assert value(train, metric="error_loss", system="flat") < 1e-5


def test_every_cell_keeps_the_timelines_of_its_last_repetition(killed_and_resumed: Path) -> None:
    store = Store(killed_and_resumed)
    for experiment in suite.parse(EXPERIMENTS, "tiny").experiments:
        found = store.trace(experiment.digest)
        assert set(found) == ({"step"} if experiment.phase == "train_step" else {"forward", "backward"})
        for timeline in found.values():
            assert timeline.start_s.shape == (len(timeline.plan.tasks), 4)
            assert (timeline.end_s >= timeline.start_s).all()
        if experiment.phase == "train_step":
            names = [task.name for task in found["step"].plan.tasks]
            assert names.index("layer1.backward.dispatch") < names.index("layer0.backward.dispatch")
            assert names[-1] == "optimizer"
    assert store.trace("unknown") == {}


def test_the_record_says_what_ran_where(killed_and_resumed: Path) -> None:
    records = Store(killed_and_resumed).records()
    assert len(records) == 2  # the killed session and the one that went on
    record = list(records.values())[-1]
    assert {"experiments", "certificates", "network", "versions", "git", "host", "python", "argv", "date"} <= set(
        record
    )
    assert str(Path.home()) not in str(record["argv"])


BAD = """
name: bad
defaults: {cluster: local-2, dtype: float32, repeats: 3, launches: 1, model: moe-tiny, phase: exchange}
experiments:
  - workload: {name: uniform-32, tokens_per_rank: 32, generator: uniform}
    system: [empty, forgets, raises, dies, badday, narrow, flat]
"""


@pytest.fixture
def bad_systems(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run, "RUN_RACE", "tests.bench.systems:run_race")
    systems.register()
    yield
    for system in systems.ALL:
        registry.systems().pop(system.name)


@pytest.mark.long
@pytest.mark.usefixtures("bad_systems")
def test_a_bad_system_is_a_row_with_its_reason_and_the_race_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LOST_S", 1.0)
    store = Store(tmp_path / "bad")
    store.prepare()
    found = suite.parse(BAD, "bad")
    (each,) = run.plan(found, None, set())
    run.run_plan(each, run.Settings(store.path, timeout_s=120), ["moebench"])
    rows = store.read("raise")
    status = rows[rows["metric"].isin(["time_s", "status"])].groupby("system")[["status", "reason"]].first()
    assert status["status"].to_dict() == {
        "empty": "nonconforming",  # at the gate
        "forgets": "nonconforming",  # at full shape
        "raises": "oom",
        "dies": "failed",
        "badday": "failed",
        "narrow": "oom",
        "flat": "ok",
    }
    assert "output off by" in status["reason"]["empty"]
    assert "at full shape: output off by" in status["reason"]["forgets"]
    assert "no room for this layer" in status["reason"]["raises"]
    assert "rank 1" in status["reason"]["dies"]
    assert "exited with status 7" in status["reason"]["dies"]
    assert re.match(
        r"rank 1 in 'badday exchange: timed repetition 2 .*': RuntimeError: bad day, at tests/bench/systems.py:\d+ in ",
        status["reason"]["badday"],
    )
    assert "rank 1 in 'narrow exchange: first step at full shape" in status["reason"]["narrow"]
    for system in ("badday", "narrow"):
        log = re.search(r"\(log: (.*)\)$", status["reason"][system])
        assert log
        assert {"badday": "bad day", "narrow": "can't allocate memory"}[system] in Path(log[1]).read_text()
    told = ending.not_ok(store.path, [experiment.digest for experiment in found.experiments])
    (why,) = (row["why"] for row in told if row["systems"] == "badday")
    assert "rank 1 in 'badday exchange: timed repetition 2" in why
    assert set(rows[rows["metric"] == "time_s"]["system"]) == {"flat"}
    assert store.finished() == {(e.digest, 0) for e in found.experiments if e.system == "flat"}


def test_a_folder_that_cannot_be_written_stops_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="results folder"):
        run.run_suite(suite.parse(EXPERIMENTS, "tiny"), tmp_path / "file" / "tiny", show_progress=False)


def test_a_log_has_a_line_a_race_as_it_is_and_no_bar(capsys):
    text = f"launch 0: exchange of {'m' * 90} [bold], uniform-3000, on emulated-2x2"
    with progress.shown(run.plan(suite.parse(EXPERIMENTS, "tiny"), 1, set()), True) as hear:
        assert hear is not None
        hear({"did": "begin", "text": text})
    first, *more = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"4 cells to run, about \d+ min", first)
    assert more == [text]


def test_cells_are_counted_once_however_many_launches_there_are(capsys):
    with progress.shown(run.plan(suite.parse(EXPERIMENTS, "tiny"), 3, set()), True):
        pass
    assert re.fullmatch(r"4 cells to run in 3 launches, about \d+ min\n", capsys.readouterr().err)
