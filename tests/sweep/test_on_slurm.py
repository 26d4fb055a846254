"""Sweeps on a real Slurm: arrays, ranks across nodes, kills, a dead submitter, a full queue."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from harness.bench.store import Store
from harness.errors import UserError
from harness.launch import slurm
from harness.sweep import spec, submit
from harness.sweep.states import Sweep
from tests.sweep.conftest import (
    NODES,
    ON_TWO_RANKS,
    ONE_RANK,
    TIMED,
    all_done,
    frozen_with,
    go_on_in_second_start,
    held,
    settle,
    told,
    until,
)

ROOT = Path(__file__).parents[2]
#: one rank says so and ends, in one race of one system
FAULT = f"""{TIMED}            if (job.rank, rep, experiment.system, experiment.workload.seed) == (1, 1, "flat", 0):
                raise MemoryError("no room for this layer")
"""


@pytest.fixture(scope="module")
def sweeps(
    one_machine: slurm.Slurm,
    sweep_file: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    other_checkout: Path,
) -> Iterator[dict[str, Sweep]]:
    """All of them at once in one Slurm, submitted from another checkout; each test waits for its own."""
    results = tmp_path_factory.mktemp("runs")
    pair = ["flat", "hiermoe-hd2"]
    files = {
        "killed": sweep_file("killed", num_races=3, cells_per_job=3),
        "faulty": sweep_file("faulty", num_races=2, cells_per_job=4, system=pair, **ON_TWO_RANKS),
        "across": sweep_file("across", cluster={"nodes": 2}, system=pair),
        "array": sweep_file("array", num_races=8, cells_per_job=2, **ON_TWO_RANKS | {"cluster": {"nodes": 1}}),
    }
    changes = {"killed": held(1, results / "go"), "faulty": {"harness/bench/race.py": (TIMED, FAULT)}}
    found = {}
    with contextlib.chdir(other_checkout), pytest.MonkeyPatch.context() as patch:
        for name, file in files.items():
            patch.setattr(submit, "freeze", frozen_with(changes.get(name, {})))
            found[name] = submit.submit(spec.load(file), results / name, on="slurm")
    yield found
    for each in found.values():
        submit.cancel(each)


def part_files(sweep: Sweep) -> int:
    return len(list(sweep.folder.run_dir.glob("rows-*.parquet")))


def test_a_killed_job_keeps_its_finished_cells_and_does_the_others(sweeps):
    sweep = sweeps["killed"]
    until(lambda: told(sweep).count("begin") == 2, sweep)
    (start,) = (event for event in sweep.folder.events(0) if event["did"] == "start")
    first = set(sweep.folder.run_dir.glob("rows-*.parquet"))
    assert len(first) == 1
    workers = [p for p in psutil.process_iter(["cmdline"]) if str(sweep.folder.submitit) in (p.info["cmdline"] or [])]
    for process in workers:
        if "submitit.core._submit" in process.info["cmdline"] and "srun" not in process.info["cmdline"][0]:
            process.send_signal(signal.SIGKILL)
    (end,) = go_on_in_second_start(sweep, sweep.folder.run_dir.parent / "go")
    assert end["did"] == "killed"
    all_done(settle(sweep), 3)
    until(lambda: told(sweep)[-1] == "end", sweep)  # said behind the last rows
    assert told(sweep).count("start") == 2  # Slurm ran it again
    assert first < set(sweep.folder.run_dir.glob("rows-*.parquet"))
    assert part_files(sweep) == 3  # and what was finished did not run again
    assert start["host"] in ("n0", "n1")


def test_an_array_of_eight_cells_on_two_nodes(sweeps):
    sweep = sweeps["array"]
    all_done(settle(sweep), 8)
    (line,) = sweep.folder.submissions()
    assert {number.partition("_")[0] for number in line["ids"].values()} == {line["ids"]["0"].partition("_")[0]}
    hosts = {event["host"] for i in range(4) for event in sweep.folder.events(i) if event["did"] == "start"}
    assert hosts == {"n0", "n1"}


def test_ranks_across_two_nodes_cross_the_shaped_network(sweeps):
    sweep = sweeps["across"]
    settle(sweep)
    rows = Store(sweep.folder.run_dir).read("raise")
    assert set(rows["network"]) == {"shaped"}
    assert set(rows["evidence"]) == {"emulated"}
    assert len(rows[rows["metric"] == "rank_time_s"]["rank"].unique()) == 4
    assert set(rows["status"]) <= {"ok", "cpu_bound"}
    bytes_ = rows[(rows["level"] == "node") & rows["direction"].isin(["forward"]) & (rows["system"] == "flat")]
    planned, counted = (
        bytes_[bytes_["metric"] == f"bytes_{kind}"]["value"].median() for kind in ("planned", "counted")
    )
    assert 1 <= counted / planned < 1.1  # headers; nothing else goes there, and nothing goes another way


def test_a_rank_that_fails_costs_its_cell_and_no_other(sweeps):
    sweep = sweeps["faulty"]
    counts = settle(sweep)
    assert counts.pop("oom") == 1
    all_done(counts, 3)
    (cell,) = (cell for cell in sweep.cells().to_dict("records") if cell["state"] == "oom")
    assert cell["system"] == "flat"
    assert re.match("rank 1 in 'flat exchange: timed repetition 1 .*': MemoryError: no room for", cell["reason"])
    starts = [event["slurm"] for event in sweep.folder.events(0) if event["did"] == "start"]
    assert len(starts) == 2
    assert len(set(starts)) == 1  # in the job that it had, without waiting for another
    (number,) = sweep.folder.submissions()[0]["ids"].values()
    shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
    assert "Restarts=0" in shown


def test_the_submitter_is_killed_and_status_answers(one_machine, sweep_file, tmp_path):
    file = sweep_file("orphan", num_races=2)
    command = [sys.executable, "-m", "harness", "sweep", str(file), "--on", "slurm", "--results", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as submitter:
        deadline = time.monotonic() + 200
        told = tmp_path / "orphan" / "sweep" / "submissions.jsonl"
        while not (told.exists() and told.read_bytes().endswith(b"\n")):
            assert time.monotonic() < deadline
            assert submitter.poll() in (None, 0)
            time.sleep(0.005)
        submitter.kill()
    sweep = Sweep.attach(tmp_path / "orphan")
    assert set(sweep.counts()) <= {"queued", "running"}
    all_done(settle(sweep), 2)


def test_a_full_queue_takes_what_it_can_and_resume_brings_the_rest(sweep_file, one_machine, tmp_path):
    with slurm.running(NODES, max_jobs=6):
        loaded = spec.load(sweep_file("full", num_races=8, cells_per_job=1))
        blocker = ["sbatch", "--nodes=2", "--exclusive", "--wrap", "sleep 600", "--output", "/dev/null"]
        subprocess.run(blocker, check=True, capture_output=True)
        words = (
            r"queue of Slurm is full \(temporarily unable to accept job\): 4 of 8 jobs are in it; moebench resume full"
        )
        with pytest.raises(UserError, match=words):
            submit.submit(loaded, tmp_path / "full", on="slurm")
        sweep = Sweep.attach(tmp_path / "full")
        counts = sweep.counts()
        assert counts["queued"] + counts["unsubmitted"] == 8
        assert counts["queued"] >= 2
        deadline = time.monotonic() + 30
        while not any("Resources" in reason or "Priority" in reason for reason in sweep.cells()["reason"]):
            assert time.monotonic() < deadline, sweep.jobs()  # why they wait, in Slurm's own word
            time.sleep(0.2)
        submit.cancel(sweep)
        assert set(sweep.counts()) == {"cancelled", "unsubmitted"}


def test_a_job_that_breaks_is_told_with_its_log(one_machine, sweep_file, tmp_path):
    lines = ["echo 'error: no such module: cuda/99' >&2", "exit 3"]
    sweep = submit.submit(spec.load(sweep_file("broken", setup=lines)), tmp_path / "broken", on="slurm")
    assert settle(sweep) == {"crashed": 1}
    (cell,) = sweep.cells().to_dict("records")
    assert cell["reason"] == "Slurm: FAILED; error: no such module: cuda/99"
    assert "cuda/99" in Path(cell["log"]).read_text()
    command = [sys.executable, "-m", "harness", "status", "broken", "--only-failed", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cuda/99" in done.stdout


def test_a_thousand_cells_are_submitted_in_seconds(sweep_file, tmp_path):
    loaded = spec.load(sweep_file("many", num_races=1000, cells_per_job=1))
    with slurm.running(NODES):
        blocker = ["sbatch", "--nodes=2", "--exclusive", "--wrap", "sleep 600", "--output", "/dev/null"]
        subprocess.run(blocker, check=True, capture_output=True)
        begin = time.monotonic()
        sweep = submit.submit(loaded, tmp_path / "many", on="slurm")
        took = time.monotonic() - begin
        assert sweep.counts() == {"queued": 1000}
    assert took < 30, took
    print(f"1,000 cells in 1,000 jobs: submitted in {took:.1f} s")


def test_a_plain_sbatch(one_machine, tmp_path):
    experiment = {"model": "moe-tiny", "cluster": ONE_RANK, "system": "flat", "phase": "exchange", "launches": 1}
    experiment["workload"] = {"tokens_per_rank": 64, "generator": "uniform"}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"name": "plain", "experiments": [experiment]}))
    words = [ROOT / "slurm" / "moebench.sbatch", tmp_path / "plain.yaml", "--results", tmp_path]
    command = ["sbatch", "--parsable", f"--output={tmp_path}/log", *words]  # --wait would look every ten seconds or so
    number = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    asked = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={number}"]
    deadline = time.monotonic() + 200
    while (state := subprocess.run(asked, capture_output=True, text=True).stdout.strip()) != "COMPLETED":
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    assert len(Store(tmp_path / "plain").finished()) == 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("partition", "gpu-h200", "invalid partition"), ("partition", "closed", "[Aa]ccount")],
)
def test_what_slurm_refuses_names_the_line(one_machine, sweep_file, tmp_path, field, value, words):
    file = sweep_file("refused", **{field: value})
    line = (file.parent / "cluster.yaml").read_text().splitlines().index(f"{field}: {value}") + 1
    with pytest.raises(UserError, match=rf"cluster.yaml:{line}: Slurm refuses the job: .*{words}"):
        submit.submit(spec.load(file), tmp_path / "refused", on="slurm")
    assert not (tmp_path / "refused" / "sweep").exists()


def test_a_slurm_leaves_nothing_behind(one_machine):
    with slurm.running(NODES) as other:
        assert other.state != one_machine.state
        nodes = subprocess.run(["sinfo", "-h", "-o", "%D %T", "-p", "normal"], capture_output=True, text=True).stdout
        assert nodes.split() == ["2", "idle"]
        host = re.search(r"^SlurmctldHost=.*\((.*)\)$", (other.state / "slurm.conf").read_text(), re.MULTILINE)
        links = json.loads(subprocess.run(["ip", "-j", "addr"], capture_output=True, check=True).stdout)
        (own,) = (link["ifname"] for link in links if host[1] in [each.get("local") for each in link["addr_info"]])
    assert not other.state.exists()
    deadline = time.monotonic() + 20  # the kernel takes a moment to remove namespaces
    while (Path("/sys/class/net") / own).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
