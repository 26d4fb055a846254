"""A real Slurm of two virtual nodes for the tests of this folder; where there can be none, they say why and skip."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.launch import slurm
from harness.specs import with_levels
from harness.sweep import freeze
from harness.sweep.spec import SlurmCluster
from harness.sweep.states import OPEN, Sweep

NODES = with_levels(
    "virtual-test",
    [{"name": "node", "size": 2, "bandwidth_bytes_per_s": 50e6}, {"name": "rank", "size": 2}],
    kind="emulated",
)
#: on the same nodes, where one rank a node will do: half the tasks that have to start
TWO_RANKS = with_levels(
    "virtual-2x1",
    [{"name": "node", "size": 2, "bandwidth_bytes_per_s": 50e6}, {"name": "rank", "size": 1}],
    kind="emulated",
)
ON_TWO_RANKS = {"cluster": {"nodes": 2}, "interconnect": TWO_RANKS.model_dump(mode="json")}
CLUSTER = {
    "partition": "normal",
    "timeout_min": 10,
    "array_parallelism": 8,
    "signal_delay_s": 30,
    "max_restarts": 3,
    "max_num_timeout": 10,  # a minute, less the warning that Slurm may give early, is not much
    "setup": ["export GLOO_SOCKET_IFNAME=eth0"],
    "interconnect": NODES.model_dump(mode="json"),
}
OF_CLUSTER = {*SlurmCluster.model_fields, "gpus_per_task"} - {"cells_per_job"}
REPEATS = 2
ONE_RANK = {"name": "one", "kind": "local", "levels": [{"name": "rank", "size": 1}]}


@pytest.fixture(scope="session")
def one_machine() -> Iterator[slurm.Slurm]:
    try:
        with slurm.running(NODES) as running:
            yield running
    except slurm.NoSlurm as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``write_sweep`` into a folder of its own."""
    return lambda name, **more: write_sweep(tmp_path_factory.mktemp(name), name, **more)


def write_sweep(folder: Path, name: str, *, num_races: int = 1, cluster: object = None, **more: object) -> Path:
    """Write a sweep of ``num_races`` small exchanges, and the cluster file that it names."""
    known = {key: more.pop(key) for key in list(more) if key in OF_CLUSTER}
    (folder / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER | known))
    entry = {
        "model": "moe-tiny",
        "workload": {"name": "uniform-64", "tokens_per_rank": 64, "generator": "uniform"},
        "cluster": cluster or ONE_RANK,
        "phase": "exchange",
        "system": ["flat"],
        "seed": list(range(num_races)),
        "dtype": "float32",
        "repeats": REPEATS,
        "launches": 1,
    }
    keys = {"name", "slurm", "cells_per_job"} & set(more)
    data = {"name": name, "slurm": "cluster.yaml", **{key: more.pop(key) for key in keys}}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**data, "experiments": [entry | more]}))
    return path


@pytest.fixture(scope="session")
def other_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to submit from whose code must never run: the jobs have theirs."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("harness", "baselines", "methods"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise ImportError('the code of the folder of submission')")
    return folder


Changes = dict[str, tuple[str, str]]  # of a file of the frozen code: the text that goes, the text that comes
TIMED = 'name_phase(job, experiment, f"timed repetition {rep}")\n'


def frozen_with(changes: Changes) -> Callable[[Path, list], None]:
    """``freeze``, and then in each file one text put in the place of another."""

    def freeze_changed(target: Path, workloads: list) -> None:
        freeze.freeze(target, workloads)
        for name, (old, new) in changes.items():
            text = (target / name).read_text()
            assert text.count(old) == 1, name
            (target / name).write_text(text.replace(old, new))

    return freeze_changed


def held(seed: int, go: Path) -> Changes:
    """The race of this ``seed`` lasts until there is a file ``go``, however fast or slow the machine is."""
    waits = f"""{TIMED}            if (job.rank, rep, experiment.workload.seed) == (0, 1, {seed}):
                import pathlib, time
                while not pathlib.Path({str(go)!r}).exists():
                    time.sleep(0.05)
"""
    return {"harness/bench/race.py": (TIMED, waits)}


def told(sweep: Sweep, job: int = 0) -> list[str]:
    """What a job did so far."""
    return [event["did"] for event in sweep.folder.events(job)]


def until(reached: Callable[[], object], sweep: Sweep, timeout_s: float = 200) -> None:
    """Wait for a state, and say what there is instead if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, (sweep.jobs(), told(sweep))
        time.sleep(0.05)


def go_on_in_second_start(sweep: Sweep, go: Path) -> list[dict[str, Any]]:
    """Let a ``held`` race of the only job go on when the job has started again, and not in the seconds that Slurm
    leaves to its first start -> the ends that the job's script has noted."""
    until(lambda: told(sweep).count("start") == 2, sweep)
    go.touch()
    (number,) = sweep.folder.submissions()[0]["ids"].values()
    return sweep.folder.ends(number)


def all_done(counts: dict[str, int], num_cells: int) -> None:
    """Every cell has its times, be they of the links or of busy cores."""
    assert set(counts) <= {"ok", "cpu_bound"}
    assert sum(counts.values()) == num_cells


def settle(sweep: Sweep, timeout_s: float = 200) -> dict[str, int]:
    """Wait until nothing of the sweep is open -> its counts."""
    deadline = time.monotonic() + timeout_s
    while True:
        counts = sweep.counts()
        if not any(state in OPEN for state in counts):
            return counts
        assert time.monotonic() < deadline, (counts, sweep.jobs())
        time.sleep(0.2)
