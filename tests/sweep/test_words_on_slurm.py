"""What one rank of a Slurm job says when it fails reaches whoever asks: word for word, with its file, line and log."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.sweep import profile, spec, submit
from harness.sweep.states import Sweep
from tests.sweep.conftest import TIMED, frozen_with, settle, told
from tests.sweep.test_profile_on_slurm import QUICK

ROOT = Path(__file__).parents[2]
RAISES = """if (job.rank, {third}) == (2, 2):
                raise RuntimeError("bad day")
"""
IN_A_RACE = {"harness/bench/race.py": (TIMED, TIMED + " " * 12 + RAISES.format(third="rep"))}
MEASURED = 'f"repetition {repeat}")\n            for'
IN_A_PROFILE = QUICK | {
    "harness/bench/layer_cost.py": (
        MEASURED, MEASURED.replace("for", RAISES.format(third="repeat") + " " * 12 + "for"),
    ),
}  # fmt: skip


def shown(sweep: Sweep) -> str:
    """The last lines of ``moebench status``, as one."""
    command = [sys.executable, "-m", "harness", "status", str(sweep.folder.run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    return " ".join(done.stdout.split())


@pytest.mark.long  # of each way to the words there are shorter tests
@pytest.mark.parametrize("kind", ["sweep", "profile", "local sweep"])
def test_a_bad_day_of_one_of_four_ranks(one_machine, sweep_file, tmp_path, monkeypatch, kind):
    where = r"'flat exchange: timed repetition 2 \[[0-9a-f]{16}\]'"
    monkeypatch.setattr(submit, "freeze", frozen_with(IN_A_PROFILE if kind == "profile" else IN_A_RACE))
    if kind == "profile":
        slurm = spec.load_cluster(sweep_file("bad").parent / "cluster.yaml")
        job = profile.job(slurm, None, ["flat"], "local-m512-e16k2", tmp_path / "ledger")
        sweep = submit.submit_profile(slurm, tmp_path / "bad", job)
        where = r"'flat layer: repetition 2 \[[0-9a-f]{16}\]'"
    else:
        on = "local" if kind == "local sweep" else "slurm"
        file = sweep_file("bad", cluster="local-4" if on == "local" else {"nodes": 2}, repeats=4)
        sweep = submit.submit(spec.load(file), tmp_path / "bad", on=on)
    assert settle(sweep, 300)["failed"] == 1
    (reason,) = (cell["reason"] for cell in sweep.cells().to_dict("records") if cell["state"] == "failed")
    found = re.fullmatch(rf"rank 2 in {where}: RuntimeError: bad day, at \S+\.py:\d+ in \w+ \(log: (.*)\)", reason)
    assert found, reason
    assert "RuntimeError: bad day" in Path(found[1]).read_text()
    assert "RuntimeError: bad day, at" in shown(sweep)
    events = sweep.folder.events(0)
    if kind == "local sweep":
        (said,) = (event for event in events if event["did"] == "setback")
        assert said["text"] == f"failed: {reason}"
        return
    assert told(sweep).count("start") == 2
    of_rank = {event["rank"]: event for event in events if event["did"] == "failed"}
    assert of_rank[2]["why"].startswith("RuntimeError: bad day, at ")
    assert max(event["at"] for event in of_rank.values()) - of_rank[2]["since"] < 10  # then a rank's process ends
