"""Compiled loops: of many processes that need one at the same time, one compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

LOOPS = """
from harness.compiled import compiled


@compiled()
def square(x):
    return x * x


@compiled(error_model="numpy")
def sum_of_squares(n):
    total = 0.0
    for i in range(n):
        total += square(i)
    return total
"""
FORKS = """
import json, os
import loops

ends = []
for _ in range(3):
    mine, theirs = os.pipe()
    if os.fork() == 0:
        found = loops.sum_of_squares(10)
        misses = [sum(loop.stats.cache_misses.values()) for loop in (loops.sum_of_squares, loops.square)]
        os.write(theirs, json.dumps([found, *misses]).encode())
        os._exit(0)
    os.close(theirs)
    ends.append(mine)
print(json.dumps([json.loads(os.read(end, 4096)) for end in ends]))
"""


def test_one_of_many_processes_compiles(tmp_path):
    (tmp_path / "loops.py").write_text(LOOPS)
    root = Path(__file__).parents[1]
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", FORKS], env=os.environ | paths, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [result for result, *_ in found] == [285.0] * 3
    assert sorted(misses for _, *misses in found) == [[0, 0], [0, 0], [1, 1]]  # 0: it was in the cache
