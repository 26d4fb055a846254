"""The order of the tests themselves: timed ones alone, a fixture's files in one process, and nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFTEST = """
import os, time, pytest
from tests.side_by_side import *

@pytest.fixture(scope="session")
def session(): pass

@pytest.fixture(scope="session")
def one_machine(): pass

@pytest.fixture(autouse=True)
def told(request):
    begin = time.monotonic()
    yield
    with open("log", "a") as log:
        print(request.node.nodeid, os.getpid(), begin, time.monotonic(), file=log)
"""
TESTS = """
import pytest, time
@pytest.mark.timed
def test_timed(): time.sleep(0.1)
def test_one(FIXTURE): time.sleep(0.1)
def test_two(): time.sleep(0.1)
"""


def test_what_measures_time_runs_first_and_alone(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = timed\n")
    files = {"a": "session", "b": "one_machine", "c": "", "d": "session", "e": ""}
    for name, fixture in files.items():
        (tmp_path / f"test_{name}.py").write_text(TESTS.replace("FIXTURE", fixture))
    words = ["-n", "2", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "15 passed" in done.stdout, done.stdout + done.stderr
    told = (tmp_path / "log").read_text().splitlines()
    seen = sorted((float(begin), float(end), name, pid) for name, pid, begin, end in map(str.split, told))
    timed, others = seen[: len(files)], seen[len(files) :]
    assert all(name.endswith("test_timed") for _, _, name, _ in timed)
    ends = [0.0, *(end for _, end, _, _ in timed)]
    assert all(begin >= end for (begin, *_), end in zip([*timed, others[0]], ends, strict=True))
    where = {name: {pid for _, _, test, pid in others if test.startswith(f"test_{name}")} for name in files}
    assert all(len(pids) == 1 for pids in where.values())
    assert where["a"] == where["d"] != where["b"]
