"""What a sweep keeps on disk: no row lost or doubled by kills, states told fast, resumed, cancelled."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
import types
from pathlib import Path

import IPython.display
import nbformat
import pandas as pd
import papermill
import pytest

from harness.bench import tidy
from harness.bench.store import Store
from harness.errors import UserError
from harness.report import context
from harness.specs import Workload
from harness.sweep import freeze, notebook, spec, states, submit
from harness.sweep.folder import SweepFolder, deaths
from harness.sweep.states import Sweep
from harness.sweep.worker import MAX_DEATHS

SETTING = tidy.Setting("r", 0, "emulated", {"network": "shaped"})


@pytest.fixture(autouse=True)
def frozen_once(monkeypatch, tmp_path_factory):
    """These sweeps run this very tree; freezing has a test of its own."""
    monkeypatch.setattr(submit, "freeze", lambda target, workloads: None)


def prepared(sweep_file, run_dir: Path, num_races: int, cells_per_job: int) -> Sweep:
    """A sweep whose driver does nothing: its jobs are for the test to play."""
    loaded = spec.load(sweep_file("p", num_races=num_races, cells_per_job=cells_per_job))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submit, "start", lambda *_: None)
        return submit.submit(loaded, run_dir, on="local")


def play(sweep: Sweep, index: int) -> None:
    """What a job does with the store and its events, race after race; the times are made up."""
    store, folder = Store(sweep.folder.run_dir), sweep.folder
    finished = store.told_finished()
    folder.tell(index, "start")
    from harness.sweep.worker import race_of

    for launch, data in folder.job(index)["tasks"]:
        race = race_of(data)
        if all((e.digest, launch) in finished for e in race.experiments):
            continue
        folder.tell(index, "begin", race=race.digest, launch=launch)
        rows = tidy.rows_of_race(race, SETTING, [], {e.digest: ("refused", "played") for e in race.experiments})
        store.append(rows)
        folder.tell(index, "race", race=race.digest, launch=launch)
    folder.tell(index, "end")


def forked(sweep: Sweep, index: int) -> int:
    """A process that plays job ``index``."""
    pid = os.fork()
    if pid == 0:
        try:
            play(sweep, index)
        finally:
            os._exit(0)
    return pid


@pytest.mark.parametrize(("num_kills", "num_races"), [(12, 80), pytest.param(50, 320, marks=pytest.mark.long)])
def test_random_kills_lose_and_double_no_row(sweep_file, tmp_path, num_kills, num_races):
    sweep = prepared(sweep_file, tmp_path / "kills", num_races=num_races, cells_per_job=num_races // 2)
    dice, kills, writing = random.Random(7), 0, {}
    while True:
        for index in (0, 1):
            over = any(event["did"] == "end" for event in sweep.folder.events(index))
            if index not in writing and not over:
                writing[index] = forked(sweep, index)
        if not writing:
            break
        time.sleep(dice.uniform(0.01, 0.06))
        index = dice.choice(list(writing))
        if kills < num_kills:
            os.kill(writing[index], signal.SIGKILL)
            kills += os.waitstatus_to_exitcode(os.waitpid(writing.pop(index), 0)[1]) == -signal.SIGKILL
        elif os.waitpid(writing[index], os.WNOHANG)[0]:
            del writing[index]
    assert kills == num_kills
    store = Store(sweep.folder.run_dir)
    assert store.damaged() == []
    assert len(list(store.path.glob("rows-*.parquet"))) == num_races  # none was made twice
    rows = store.read("raise")
    assert len(rows) == num_races
    assert not rows.duplicated(["cell", "launch"]).any()
    assert sweep.counts() == {"refused": num_races}


@pytest.mark.long
@pytest.mark.minutes
def test_status_of_ten_thousand_cells(sweep_file, tmp_path, monkeypatch):
    folder = SweepFolder(tmp_path / "large")
    store = Store(folder.run_dir)
    store.prepare()
    num_races, systems = 1000, 10
    cells = [
        [f"{r:08x}{s:08x}", 0, f"{r:016x}", f"s{s}", "exchange", "m", "c", f"w{r}"]
        for r in range(num_races)
        for s in range(systems)
    ]
    folder.write("sweep.json", {"name": "large", "on": "local", "cells": cells, "cluster": {}})
    for job in range(125):
        races = [{"digest": f"{r:016x}"} for r in range(job * 8, job * 8 + 8)]
        folder.add_job({"tasks": [[0, race] for race in races]})
        folder.tell(job, "start")
        for race in races:
            folder.tell(job, "begin", race=race["digest"], launch=0)
            folder.tell(job, "race", race=race["digest"], launch=0)
        folder.tell(job, "end")
    names = ("run", "race", "phase", "model", "cluster", "workload", "dtype", "wire", "direction", "level")
    base: dict[str, object] = dict.fromkeys(names, "")
    base |= {"evidence": "emulated", "network": "shaped", "compute": "real", "unit": "s", "rank": -1, "reason": ""}
    base |= {"launch": 0, "metric": "time_s", "value": 1.0, "status": "ok", "time_utc": tidy.now_utc()}
    race = [{**base, "system": f"s{s}", "rep": i} for s in range(systems) for i in range(10)]
    rows = pd.DataFrame(race).assign(schema_version=1)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a thousand waits for the disk
    for r in range(num_races):
        cell = [f"{r:08x}{s:08x}" for s in range(systems) for _ in range(10)]
        store.append(rows.assign(race=f"{r:016x}", cell=cell))
    begin = time.monotonic()
    sweep = Sweep.attach(folder.run_dir)
    table = sweep.cells()
    counts, eta_s = sweep.counts(table), sweep.eta_s(table)
    took = time.monotonic() - begin
    assert counts == {"ok": 10000}
    assert eta_s == 0
    assert took < 2, took
    print(f"status over 10,000 cells: {took:.2f} s")


def in_a_notebook(folder: Path, *sources: str) -> list[str]:
    """Execute cells in a kernel of their own -> the HTML that each shows last."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "written.ipynb")
    done = papermill.execute_notebook(
        folder / "written.ipynb", folder / "executed.ipynb", kernel_name="python3", progress_bar=False, cwd=folder
    )
    return [cell.outputs[-1]["data"]["text/html"] for cell in done.cells]


def test_a_sweep_on_this_machine_is_cancelled_and_resumed(sweep_file, tmp_path, other_checkout, monkeypatch):
    monkeypatch.chdir(other_checkout)
    pair = {"name": "pair", "kind": "local", "levels": [{"name": "node", "size": 2}, {"name": "rank", "size": 1}]}
    file = sweep_file("here", num_races=2, cells_per_job=2, system=["flat", "hiermoe-hd2"], cluster=pair)
    loaded = spec.load(file)
    sweep = submit.submit(loaded, tmp_path / "here", on="local")
    assert set(sweep.counts()) <= {"queued", "running"}
    assert sweep.eta_s() == pytest.approx(sweep.facts["estimate_s"])  # no race has a pace to tell yet
    submit.cancel(sweep)
    deadline = time.monotonic() + 10
    while (counts := sweep.counts()) != {"cancelled": 4}:
        assert time.monotonic() < deadline, counts
        time.sleep(0.05)
    assert submit.resume(sweep, only_failed=True) == 0
    assert submit.resume(sweep) == 2
    grid, speedups = in_a_notebook(
        tmp_path,
        f"from harness.sweep import attach\nsweep = attach({str(sweep.folder.run_dir)!r})\nsweep.watch(0.5)",
        'sweep.speedups("flat")',
    )
    assert "hiermoe-hd2" in speedups
    assert "emulated" in speedups
    counts = sweep.counts()  # nothing is open any more: the notebook has waited
    assert sum(counts.values()) == 4
    assert set(counts) <= {"ok", "cpu_bound"}
    assert f"{counts['ok']} ok" in grid
    assert f"{counts['ok']} ok" in sweep._repr_html_()
    assert submit.resume(sweep) == 0
    with pytest.raises(UserError, match="exists; moebench resume goes on with it"):
        submit.submit(loaded, tmp_path / "here", on="local")
    with pytest.raises(UserError, match="there is none; known sweeps are here"):
        Sweep.attach(tmp_path / "her")
    shutil.rmtree(sweep.folder.path)  # as if moebench run had made these rows
    for ask in (
        lambda: submit.submit(loaded, tmp_path / "here", on="local"),
        lambda: submit.scripts(loaded, tmp_path / "here"),
    ):
        with pytest.raises(UserError, match="'here': every cell has its result here already"):
            ask()
    assert not sweep.folder.path.exists()


def test_the_last_grid_shows_the_end(monkeypatch):
    """Also where a sweep ends just behind the drawing of a grid."""
    left, drawn = [1], []
    monkeypatch.setattr(
        IPython.display, "display", lambda html, display_id: types.SimpleNamespace(update=lambda _: None)
    )
    monkeypatch.setattr(notebook, "grid", lambda sweep: (drawn.append(left[0]), left.__setitem__(0, 0), "")[-1])
    notebook.watch(types.SimpleNamespace(num_open=lambda: left[0]), every_s=0)
    assert drawn == [1, 0]


@pytest.mark.parametrize(
    ("word", "state", "reason"),
    [
        ("PENDING", "queued", ""),
        ("OUT_OF_MEMORY", "oom", "Slurm: OUT_OF_MEMORY"),
        ("TIMEOUT", "timed out", "Slurm: TIMEOUT"),
        ("NODE_FAIL", "crashed", "Slurm: NODE_FAIL"),
        ("COMPLETED", "crashed", "the job ended without rows of this cell"),
        ("CANCELLED", "cancelled", "Slurm: CANCELLED"),
        ("PREEMPTED", "requeued", "Slurm: PREEMPTED"),
    ],
)
def test_what_slurm_says_of_a_job_is_the_state_of_its_cells(sweep_file, tmp_path, monkeypatch, word, state, reason):
    sweep = prepared(sweep_file, tmp_path / "s", num_races=1, cells_per_job=1)
    sweep.folder.add_submission("slurm", {0: "77"})
    monkeypatch.setattr(states, "_output", lambda command: f"77|{word}|None\n" if command[0] == "squeue" else "")
    (cell,) = sweep.cells().to_dict("records")
    assert (cell["state"], cell["reason"]) == (state, reason)
    assert ("so far" in context.sweep(sweep.folder.run_dir)) == (state in states.OPEN)  # and a report says so too


def test_deaths_are_counted_where_they_happened():
    begin = {"did": "begin", "race": "a", "launch": 0}
    died = [{"did": "start"}, begin] * MAX_DEATHS
    assert deaths([*died, {"did": "start"}]) == {("a", 0): [""] * MAX_DEATHS}
    assert deaths([{"did": "start"}, begin, {"did": "stop"}, {"did": "start"}]) == {}


def test_systems_that_git_ignores_are_frozen_too(monkeypatch, tmp_path: Path) -> None:
    root = tmp_path / "clone"
    (root / "methods").mkdir(parents=True)
    (root / "methods" / "mine.py").write_text("mine")
    (root / ".gitignore").write_text("mine.py\n")
    (root / "methods" / "known.py").write_text("known")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    monkeypatch.setattr(freeze, "ROOT", root)
    assert freeze._files() == ["methods/known.py", "methods/mine.py"]


def test_the_frozen_tree_is_what_it_was(tmp_path):
    freeze.freeze(tmp_path / "tree", [race.first.workload for race in spec.load("hiermoe").suite.races])
    assert (tmp_path / "tree" / "harness" / "sweep" / "freeze.py").read_text() == Path(freeze.__file__).read_text()
    assert (tmp_path / "tree" / "results" / "traces" / "record-e64k8.parquet").is_file()
    assert (tmp_path / "tree" / "frozen.json").is_file()


def test_what_workloads_read_is_frozen_whatever_it_is(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(freeze, "_files", list)
    monkeypatch.chdir(tmp_path)
    given = {"trace": "path", "walk": "like", "natural": "weights", "uniform": None}
    workloads = []
    for generator, param in given.items():
        Path(generator).write_text(generator)
        params = {} if param is None else {param: generator}
        workloads.append(Workload(name=generator, tokens_per_rank=8, generator=generator, params=params))
    freeze.freeze(tmp_path / "tree", workloads)
    assert {path.name for path in (tmp_path / "tree").iterdir()} == {"trace", "walk", "natural", "frozen.json"}
