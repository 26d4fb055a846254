"""Random kills of a sweep's real processes: its driver, workers, sessions and ranks, until every cell has its times.

    python -m tests.sweep.kills 50      # how often; prints who died, and what the store holds after all

Whatever is killed, ``moebench resume`` goes on. In the end every cell must have every repetition once.
"""

from __future__ import annotations

import collections
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil

from harness.bench.store import Store
from harness.sweep import spec, submit
from harness.sweep.states import OPEN, Sweep
from tests.sweep.conftest import REPEATS, write_sweep

TWO_RANKS = {"name": "two", "kind": "local", "levels": [{"name": "rank", "size": 2}]}


def processes_of(sweep: Sweep) -> dict[str, list[psutil.Process]]:
    """Those that live, by what they are."""
    found: dict[str, list[psutil.Process]] = collections.defaultdict(list)
    pids = {int(number) for line in sweep.folder.submissions() for number in line["ids"].values()}
    for pid in pids:
        try:
            driver = psutil.Process(pid)
            if driver.status() == psutil.STATUS_ZOMBIE or "harness.sweep.driver" not in driver.cmdline():
                continue
            found["driver"].append(driver)
            workers = driver.children()
            found["worker"] += workers
            found["session or rank"] += [p for worker in workers for p in worker.children(recursive=True)]
        except psutil.Error:  # it has just ended
            continue
    return found


def kill_at_random(sweep: Sweep, num_kills: int, dice: random.Random, longest_s: float) -> dict[str, int]:
    """Kill one of its processes every now and then, and resume it until nothing fails -> who died how often."""
    killed: dict[str, int] = collections.Counter()
    while True:
        counts = sweep.counts()
        if set(counts) <= {"ok", "cpu_bound"}:
            return killed
        if not any(state in OPEN for state in counts):
            assert submit.resume(sweep), counts
        if sum(killed.values()) == num_kills:
            time.sleep(0.5)
            continue
        time.sleep(dice.uniform(0.1, longest_s))
        living = processes_of(sweep)
        kinds = sorted(kind for kind, here in living.items() if here)
        if kinds:
            kind = dice.choice(kinds)
            try:
                dice.choice(living[kind]).kill()
            except psutil.NoSuchProcess:
                continue
            killed[kind] += 1


def check(sweep: Sweep) -> int:
    """That no row is lost, doubled or damaged -> number of rows."""
    store = Store(sweep.folder.run_dir)
    assert store.damaged() == []
    rows = store.read("raise")
    keys = ["cell", "launch", "metric", "direction", "level", "rep", "rank"]
    assert not rows.duplicated(keys).any(), rows[rows.duplicated(keys, keep=False)]
    times = rows[rows["metric"] == "time_s"].groupby(["cell", "launch"]).size()
    assert len(times) == len(sweep.facts["cells"]), (len(times), len(sweep.facts["cells"]))
    assert set(times) == {3 * REPEATS}, times  # forward, backward and both
    return len(rows)


def main(num_kills: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        file = write_sweep(Path(folder), "kills", num_races=5 * num_kills, cluster=TWO_RANKS, cells_per_job=10)
        sweep = submit.submit(spec.load(file), Path(folder) / "kills", on="local")
        killed = kill_at_random(sweep, num_kills, random.Random(), 5.0)
        rows, took = check(sweep), time.monotonic() - begin
        print(f"{sum(killed.values())} kills {dict(killed)} in {took:.0f} s: {rows} rows of {sweep.counts()}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
