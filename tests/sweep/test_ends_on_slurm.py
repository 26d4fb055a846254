"""Jobs that Slurm itself ends before they are done, by its own clock or for another job: they lose nothing.

What the job's script does then is in ``make test`` too: see ``test_a_warned_job_requeues_without_slurm_in_its_tasks``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest

from harness.launch import slurm
from harness.sweep import spec, submit
from harness.sweep.states import Sweep
from tests.sweep.conftest import ON_TWO_RANKS, all_done, frozen_with, go_on_in_second_start, held, settle, told, until

pytestmark = [pytest.mark.long, pytest.mark.minutes]


@pytest.fixture(scope="module")
def late(
    one_machine: slurm.Slurm, sweep_file: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Sweep]]:
    """Both at once: each lasts until its minute is over and not much longer."""
    results = tmp_path_factory.mktemp("late")
    short = {"num_races": 5, "cells_per_job": 5, "timeout_min": 1}
    files = {"one-task": sweep_file("one-task", **short), "ranks": sweep_file("ranks", **short, **ON_TWO_RANKS)}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, file in files.items():
            patch.setattr(submit, "freeze", frozen_with(held(3, results / f"{name}.go")))
            found[name] = submit.submit(spec.load(file), results / name, on="slurm")
    yield found
    for each in found.values():
        submit.cancel(each)


@pytest.mark.parametrize("name", ["one-task", "ranks"])
def test_a_time_out_requeues_and_loses_nothing_and_is_no_failure_of_ranks(late, name):
    sweep = late[name]
    (end, *_) = go_on_in_second_start(sweep, sweep.folder.run_dir.with_suffix(".go"))
    assert (end["did"], end["why"]) == ("stop", "requeued before its time limit")
    all_done(settle(sweep), 5)
    events = told(sweep)
    assert events.count("stop") >= 1
    assert events.count("start") == events.count("stop") + 1
    assert not {"failed", "error", "killed"} & set(events)
    assert len(list(sweep.folder.run_dir.glob("rows-*.parquet"))) == 5


def test_a_preempted_job_gives_way_and_goes_on(one_machine, sweep_file, tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "freeze", frozen_with(held(1, tmp_path / "go")))
    sweep = submit.submit(spec.load(sweep_file("preempted", num_races=2)), tmp_path / "p", on="slurm")
    until(lambda: told(sweep).count("begin") == 2, sweep)
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1", "--output", "/dev/null"]
    subprocess.run(urgent, check=True, capture_output=True)
    (end,) = go_on_in_second_start(sweep, tmp_path / "go")
    assert (end["did"], end["why"]) == ("stop", "requeued for another job")
    all_done(settle(sweep), 2)
    assert (told(sweep).count("start"), told(sweep).count("stop")) == (2, 1)
    assert len(list(sweep.folder.run_dir.glob("rows-*.parquet"))) == 2
