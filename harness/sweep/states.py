"""What becomes of a sweep's cells: told by the store, the jobs' own words and Slurm; from any login, at any time.

    sweep = Sweep.attach("results/runs/hiermoe-emulated")
    sweep.cells()      # one row a cell and launch: state, reason, log
    sweep.counts()     # cells by state

Rows in the store decide. A cell without them is what its job is: queued, running, or ended in some way without it.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pandas as pd

from harness.bench.store import Store, Told
from harness.errors import bad, is_echo
from harness.sweep import notebook
from harness.sweep.folder import SweepFolder

COLUMNS = ("cell", "launch", "race", "system", "phase", "model", "cluster", "workload")
#: in the order in which a table shows them
STATES = (
    "ok", "cpu_bound", "refused", "running", "queued", "requeued", "unsubmitted", "failed", "oom", "hung",
    "nonconforming", "unphysical", "crashed", "timed out", "cancelled",
)  # fmt: skip
FAILED = ("failed", "oom", "hung", "nonconforming", "unphysical", "crashed", "timed out")
OPEN = ("running", "queued", "requeued")
#: Slurm's words for a job that will not go on
_ENDED = {
    "TIMEOUT": "timed out", "DEADLINE": "timed out", "OUT_OF_MEMORY": "oom", "CANCELLED": "cancelled",
    "PREEMPTED": "requeued",
}  # fmt: skip
_WAITING = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESIZING",
    "SUSPENDED",
)


@dataclasses.dataclass(frozen=True)
class JobState:
    """Of one job: ``state`` as of ``STATES``, why, and where its words are."""

    state: str
    reason: str
    log: str
    since: float  # of its latest submission


class Sweep:
    """A sweep that was submitted, by whomever, whether or not it still runs."""

    def __init__(self, folder: SweepFolder):
        self.folder, self.store = folder, Store(folder.run_dir)
        self.facts = folder.read()

    @classmethod
    def attach(cls, path: Path | str) -> Sweep:
        """The sweep in the run folder ``path``; ``UserError`` with the known ones if there is none."""
        return cls(SweepFolder(path).require())

    @property
    def name(self) -> str:
        return self.folder.name

    def cells(self) -> pd.DataFrame:
        """One row a cell and launch: ``COLUMNS``, job (its index), state, reason, log."""
        outcomes, jobs = self.store.outcomes(), self.jobs()
        latest = self._latest_jobs()
        running = self._running(jobs)
        rows = []
        for fields in self.facts["cells"]:
            cell, launch, race = fields[:3]
            if (index := latest.get((race, launch))) is None:
                path = self.folder.path / "tasks.jsonl"
                raise bad("sweep", str(path), f"knows no job of {race}; submit the sweep again by another name")
            rows.append(
                (*fields, index, *self._state(outcomes.get((cell, launch)), (race, launch), jobs[index], running))
            )
        return pd.DataFrame(rows, columns=[*COLUMNS, "job", "state", "reason", "log"])

    def counts(self, cells: pd.DataFrame | None = None) -> dict[str, int]:
        """Cells by state, in the order of ``STATES``."""
        found = (self.cells() if cells is None else cells)["state"].value_counts()
        return {state: int(found[state]) for state in STATES if state in found}

    def eta_s(self, cells: pd.DataFrame | None = None) -> float | None:
        """Seconds until the open cells are done, from the pace of the races that are, before the first from what the
        bench expects of them; None where neither is known."""
        cells = self.cells() if cells is None else cells
        num_open = int(cells["state"].isin(OPEN).sum())
        if not num_open:
            return 0.0
        size = cells.groupby(["race", "launch"]).size().to_dict()
        spent, done = 0.0, 0
        for index in range(len(self.folder.tasks())):
            began: dict[tuple[str, int], float] = {}
            for event in self.folder.events(index):
                if event["did"] in ("begin", "race"):
                    key = (event["race"], event["launch"])
                    if event["did"] == "begin":
                        began[key] = event["at"]
                    elif key in began:
                        spent, done = spent + event["at"] - began.pop(key), done + size.get(key, 0)
        if not done:
            if (expected_s := self.facts.get("estimate_s")) is None:
                return None
            spent, done = expected_s, len(cells)
        lanes = max(1, cells[cells["state"] == "running"]["job"].nunique())
        return num_open * spent / done / lanes

    def num_open(self) -> int:
        """Cells that run or will."""
        return int(self.cells()["state"].isin(OPEN).sum())

    def watch(self, every_s: float = 5.0) -> None:
        """In a notebook: the grid of cells, renewed until nothing is open."""
        notebook.watch(self, every_s)

    def speedups(self, reference: str) -> pd.DataFrame:
        """Ratios to ``reference`` of the cells that have a time so far, with their intervals and evidence."""
        return notebook.speedups(self, reference)

    def _repr_html_(self) -> str:
        return notebook.grid(self)

    def jobs(self) -> list[JobState]:
        """State of every job, from one question to Slurm."""
        submitted: dict[int, tuple[dict[str, Any], str]] = {}
        for line in self.folder.submissions():
            for index, number in line["ids"].items():
                submitted[int(index)] = (line, number)
        known = _ask_slurm([number for line, number in submitted.values() if line["on"] == "slurm"])
        found = []
        for index in range(len(self.folder.tasks())):
            if index not in submitted:
                found.append(JobState("unsubmitted", "waits for room in Slurm's queue: moebench resume", "", 0.0))
                continue
            line, number = submitted[index]
            if line["on"] == "slurm":
                log = str(self.folder.submitit / f"{number}_0_log.err")
                found.append(self._slurm_job(index, *known.get(number, ("UNKNOWN", "")), log, line["at"]))
            else:
                found.append(self._local_job(index, line, number))
        return found

    def _slurm_job(self, index: int, word: str, why: str, log: str, since: float) -> JobState:
        if word in _WAITING:
            restarted = any(event["did"] == "start" for event in self.folder.events(index))
            return JobState("requeued" if restarted else "queued", why, log, since)
        if word in ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED"):
            return JobState("running", "", log, since)
        state = "cancelled" if self.folder.cancelled.exists() else _ENDED.get(word, "crashed")
        last = [event for event in self.folder.events(index) if event["did"] == "error"]
        first = min(last, key=lambda event: (is_echo(event["why"]), event["at"]), default=None)
        said = f"rank {first['rank']}: {first['why']}" if first else _last_words(Path(log))
        if state == "crashed" and "timed-out too many times" in said:
            state = "timed out"
        ended = f"Slurm: {word}" if word != "COMPLETED" else "the job ended without rows of this cell"
        return JobState(state, "; ".join(filter(None, (ended, said))), log, since)

    def _local_job(self, index: int, line: dict[str, Any], number: str) -> JobState:
        log = str(self.folder.submitit / f"{index}.log")
        events = [event for event in self.folder.events(index) if event.get("at", 0.0) >= line["at"]]
        last = events[-1]["did"] if events else ""
        if last == "exit":
            said = [event["why"] for event in events if event["did"] == "error"]
            return JobState("crashed", "; ".join([*said, events[-1]["why"]]), log, line["at"])
        if last == "end":
            return JobState("crashed", "the job ended without rows of this cell", log, line["at"])
        if is_alive(number, line):
            return JobState("running" if events else "queued", "", log, line["at"])
        gone = "cancelled" if self.folder.cancelled.exists() else "crashed"
        return JobState(gone, "its driver on this machine has ended; moebench resume", log, line["at"])

    def _latest_jobs(self) -> dict[tuple[str, int], int]:
        """(race, launch) -> the last job that has it."""
        found = {}
        for index, tasks in enumerate(self.folder.tasks()):
            found.update(dict.fromkeys(tasks, index))
        return found

    def _running(self, jobs: list[JobState]) -> set[tuple[str, int]]:
        """(race, launch) pairs that are begun in a job that runs."""
        found: set[tuple[str, int]] = set()
        for index, job in enumerate(jobs):
            if job.state == "running":
                for event in self.folder.events(index):
                    if event["did"] in ("begin", "race"):
                        key = (event["race"], event["launch"])
                        (found.add if event["did"] == "begin" else found.discard)(key)
        return found

    def _state(
        self, told: Told | None, task: tuple[str, int], job: JobState, running: set[tuple[str, int]]
    ) -> tuple[str, str, str]:
        """State, reason, log."""
        over = job.state not in (*OPEN, "unsubmitted")
        if told and (told[3] or over or _seconds(told[0]) >= job.since):
            return told[1], told[2], job.log if told[1] != "ok" else ""
        if job.state == "running" and task not in running:
            return "queued", "in a job that runs", job.log
        return job.state, job.reason, job.log


def _ask_slurm(numbers: list[str]) -> dict[str, tuple[str, str]]:
    """Job number -> Slurm's word for its state, and why it waits. squeue knows those that are not long over, sacct
    the others."""
    if not numbers:
        return {}
    roots = sorted({number.partition("_")[0] for number in numbers})
    found: dict[str, tuple[str, str]] = {}
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(roots)}"]
    for line in _output(command).splitlines():
        number, word, why = (part.strip() for part in line.split("|", 2))
        found[number] = (word, "" if why == "None" else why)
    wanted = set(numbers) - set(found)
    if wanted:
        roots = sorted({number.partition("_")[0] for number in wanted})
        command = ["sacct", "-X", "-n", "-P", "-o", "JobID,State", *(x for root in roots for x in ("-j", root))]
        for line in _output(command).splitlines():
            number, _, word = line.strip().partition("|")
            if number in wanted and word:
                found[number] = (word.partition("|")[0].split()[0], "")
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def is_alive(pid: str, line: dict[str, Any]) -> bool:
    """Whether it is still the driver that was started then, and here."""
    if line["host"] != os.uname().nodename:
        return time.time() - line["at"] < 7 * 86400  # another machine's: nobody here can tell
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return stat[0] != "Z" and stat[19] == line["began"]


def _last_words(path: Path) -> str:
    try:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    telling = [line for line in lines if "Error" in line or "error:" in line or "CANCELLED" in line]
    return (telling or lines or [""])[-1][-300:]


def _seconds(time_utc: str) -> float:
    return datetime.datetime.fromisoformat(time_utc).timestamp()
