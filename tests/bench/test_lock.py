"""Who fills a run's folder, and when another one may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.bench import lock, run, suite
from harness.errors import UserError

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from harness.bench import lock
with lock.held(Path(sys.argv[1]), *sys.argv[2:]):
    print("held", flush=True)
    time.sleep(1000)
"""
SUITE = """
name: quick
experiments:
- {model: moe-tiny, cluster: local-2, workload: balanced-512, system: flat, phase: exchange}
"""


def start(run_dir: Path, *names: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(run_dir), *names]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder."""
    with start(tmp_path) as process:
        yield process
        process.kill()


def test_a_second_run_refuses_and_names_the_first_until_that_is_dead(tmp_path: Path, other) -> None:
    refused = pytest.raises(
        UserError,
        match=rf"^run: '{tmp_path}': process {other.pid} on {os.uname().nodename} has been filling it since 20",
    )
    with refused:
        run.run_suite(suite.parse(SUITE, "quick"), tmp_path, resume=False, show_progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["locks"]  # nothing was put aside, nothing written
    assert not list(tmp_path.parent.glob("*.until-*"))
    other.kill()
    other.wait()
    with lock.held(tmp_path):  # taken over
        assert json.loads((tmp_path / "locks" / "run.lock").read_text())["pid"] == os.getpid()
    assert lock.holder(tmp_path / "locks" / "run.lock") is None


def as_if(path: Path, age_s: float, **changes: object) -> None:
    """The lock of another holder, last touched ``age_s`` ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(lock._this_process() | changes))
    os.utime(path, (time.time() - age_s,) * 2)


@pytest.mark.parametrize(
    ("changes", "age_s", "lives"),
    [
        ({}, 1e6, True),  # of this process, however busy it is
        ({"began": "1"}, 0, False),  # another process had the number
        ({"pid": 1 << 30}, 0, False),
        ({"host": "elsewhere"}, 100, True),
        ({"host": "elsewhere"}, 200, False),
        ({"space": "another container", "pid": 1 << 30}, 100, True),
        ({"space": "another container"}, 200, False),
    ],
)
def test_who_lives(tmp_path: Path, changes: dict[str, object], age_s: float, lives: bool) -> None:
    path = tmp_path / "locks" / "run.lock"
    as_if(path, age_s, **changes)
    assert (lock.holder(path) is not None) is lives
    if lives:
        with pytest.raises(UserError, match="has been filling it since"), lock.held(tmp_path):
            pass
        assert path.exists()
    else:
        with lock.held(tmp_path):
            assert lock.holder(path) == lock._this_process() | {"since": lock.holder(path)["since"]}  # type: ignore[index]
    assert lock.holder(tmp_path / "locks" / "other.lock") is None


def test_a_torn_lock_counts_while_it_is_young(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "run.lock"
    path.parent.mkdir()
    path.write_text('{"host": ')
    with pytest.raises(UserError, match="on an unknown machine"), lock.held(tmp_path):
        pass
    os.utime(path, (time.time() - 200,) * 2)
    with lock.held(tmp_path):
        pass


def test_jobs_of_a_sweep_share_a_folder_and_a_run_waits_for_them(tmp_path: Path) -> None:
    with lock.held(tmp_path, "job-0"):
        with lock.held(tmp_path, "job-1"), lock.held(tmp_path, "job-2"):
            pass
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock.held(tmp_path):
            pass
    with lock.held(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        lock.held(tmp_path, "job-1").__enter__()
    as_if(tmp_path / "locks" / "job-1.lock", 0, host="elsewhere")  # an earlier start of the same job
    with lock.held(tmp_path, "job-1"):
        pass


def test_of_two_that_both_saw_it_free_one_gets_it(tmp_path: Path) -> None:
    """As where the file system cannot lock: the link decides."""
    path = tmp_path / "locks" / "run.lock"
    path.parent.mkdir()
    mine = json.dumps(lock._this_process())
    assert lock._take(tmp_path, path, mine) == path
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        lock._take(tmp_path, path, mine.replace("20", "19"))
    assert path.read_text() == mine
    assert [each.name for each in path.parent.iterdir()] == ["run.lock"]


def test_one_of_many_gets_it(tmp_path: Path) -> None:
    """All at once over a dead holder's lock."""
    as_if(tmp_path / "locks" / "run.lock", 0, pid=1 << 30)
    code = HOLD.replace("with lock", "input()\nwith lock").replace("time.sleep(1000)", "input()")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    said = [each.stdout.readline() for each in processes]  # type: ignore[union-attr]
    for each in processes:
        each.communicate("\n")
    assert sorted(said) == [""] * 3 + ["held\n"]
