"""One job of a sweep: goes on where the store says, one race after another, until its own are done.

Whatever ends it, every finished race has its rows. A race in which the job died twice without a word gets rows that
say so, so that it cannot take the others with it. Where ranks are the job's tasks, rank 0 alone reads what is done and
tells the others; if one of them fails, all end, and the job's script starts them again (``harness.sweep.script``): the
cell that failed is told, and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness import caches, errors
from harness.bench import lock, tidy
from harness.bench.run import Plan, Settings, blamed, run_plan
from harness.bench.store import Store
from harness.bench.suite import Race
from harness.errors import RankFailure
from harness.launch.allocation import PROGRESS_VARIABLE
from harness.specs import Cluster, Experiment
from harness.sweep.folder import SweepFolder, Task, attempts, deaths
from harness.sweep.script import AGAIN

if TYPE_CHECKING:
    from harness.launch.tasks import RaceFailure

MAX_DEATHS = 2  # of the job in one race
GRACE_S = 2.0  # for Slurm's word that it ends the job, which makes ranks fail too
HUNG = "Watchdog caught collective operation timeout"  # NCCL's last words before it aborts the process
Failed = dict[str, tuple[str, str]]  # cell -> status, reason


class Job:
    """What submitit calls in every task, and again in every start."""

    def __init__(self, run_dir: str, index: int):
        self.run_dir, self.index = run_dir, index

    def __call__(self) -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the job's script alone answers to warnings
        run_job(Path(self.run_dir), self.index)


@dataclasses.dataclass(frozen=True)
class Left:
    """What is still to do in this attempt of a job, as rank 0 has found it."""

    tasks: Sequence[Task]
    known: Mapping[Task, Failed]  # cells of these that have failed in earlier attempts
    attempt: int


def run_job(run_dir: Path, index: int) -> None:
    """Run what is left of job ``index`` of the sweep in ``run_dir``, here, where the job was started."""
    folder = SweepFolder(run_dir)
    rank = int(os.environ.get("SLURM_PROCID", 0))
    try:
        caches.use_scratch(everything=True)
        with lock.held(folder.run_dir, f"job-{index:05}") if rank == 0 else contextlib.nullcontext():
            _run(folder, index)
    except Exception as error:
        folder.tell(index, "error", rank=rank, why=errors.told(error)[:500])
        raise


def _run(folder: SweepFolder, index: int) -> None:
    job = folder.job(index)
    os.chdir(folder.tree if folder.tree.exists() else os.curdir)  # its calibrations and traces
    os.environ[PROGRESS_VARIABLE] = str(folder.events_path(index))
    if job["across"]:
        _run_across(folder, index, job)
        return
    left = _begin(folder, index, job)
    run_plan(_plan(job, left), Settings(folder.run_dir, part=f"job-{index}"), sys.argv)
    folder.tell(index, "end")


def _run_across(folder: SweepFolder, index: int, job: dict[str, Any]) -> None:
    from harness.launch import tasks as across

    try:
        world = across.join(Cluster.model_validate(job["cluster"]))
    except across.PortTaken as error:
        print(f"{error}; starting again", file=sys.stderr, flush=True)
        os._exit(AGAIN)
    left = across.decided(world, lambda: _begin(folder, index, job))
    world.watch.give_up = functools.partial(_again, folder, index, left.attempt)
    try:
        if "profile" in job:
            from harness.sweep import profile

            profile.run(world, folder, job, left.tasks, left.known)
        else:
            settings = Settings(folder.run_dir, part=f"job-{index}")
            across.run_plan(world, _plan(job, left), settings, sys.argv, left.known)
    except across.RaceFailure as failed:
        _again(folder, index, left.attempt, failed)
    if world.job.rank == 0:
        folder.tell(index, "end")


def _plan(job: dict[str, Any], left: Left) -> Plan:
    races = [(launch, race_of(each)) for launch, each in job["tasks"] if (each["digest"], launch) in left.tasks]
    return Plan(Cluster.model_validate(job["cluster"]), job["wire"], tuple(races))


def _begin(folder: SweepFolder, index: int, job: dict[str, Any]) -> Left:
    """Rank 0, alone: note how earlier attempts ended, tell what they leave without hope, and say what is left."""
    _hear_ends(folder, index)
    events = folder.events(index)
    finished = Store(folder.run_dir).told_finished()
    cells = {(each["digest"], launch): cells_of(each) for launch, each in job["tasks"]}
    open_ = [task for task, digests in cells.items() if any((digest, task[1]) not in finished for digest in digests)]
    died = deaths([*events, {"did": "start"}])
    known = failures(events, {task: cells[task] for task in open_}) if job["across"] else {}
    told = {(event["race"], event["launch"]) for event in events if event["did"] in ("race", "gave up")}
    attempt = len(attempts(events))
    host = os.uname().nodename
    folder.tell(index, "start", host=host, slurm=os.environ.get("SLURM_JOB_ID"), pid=os.getpid())
    tasks = []
    for task in open_:
        if len(died.get(task, ())) >= MAX_DEATHS:
            if task not in told:
                _give_up(folder, index, job, task, died[task])
        elif not (job["across"] and task in known and task in told):
            tasks.append(task)
    return Left(tasks, {task: known[task] for task in tasks if task in known}, attempt)


def _hear_ends(folder: SweepFolder, index: int) -> None:
    """Tell what the job's script has noted of earlier starts and nobody has told yet."""
    number = slurm_number(os.environ)
    events = folder.events(index)
    told = [
        event for event in events if event.get("slurm") == number and event["did"] in ("stop", "killed", "no start")
    ]
    begun = [event["did"] for event in events if event["did"] in ("start", "stop", "killed", "no start")][-1:] == [
        "start"
    ]
    for end in folder.ends(number)[len(told) :]:
        did = end["did"] if begun else "no start"  # it ended before rank 0 could say a word
        folder.tell(index, did, slurm=number, why=end["why"], ended_at=end["at"])
        begun = False


def slurm_number(environment: Mapping[str, str]) -> str:
    """Of this job, as submitit and the job's script write it; empty outside of Slurm."""
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def cells_of(task: Mapping[str, Any]) -> list[str]:
    """Digests of the cells of a race, or of the one of a part of a profile; as plain data."""
    return (
        [Experiment.model_validate(each).digest for each in task["experiments"]]
        if "experiments" in task
        else [task["digest"]]
    )


def failures(events: Sequence[dict[str, Any]], cells: Mapping[Task, Sequence[str]]) -> dict[Task, Failed]:
    """What earlier attempts of this job have found to fail, of ``cells`` by task. In each attempt the rank that failed
    first explains the others; in one that Slurm ended, or in which a rank was killed, that explains them all."""
    found: dict[Task, Failed] = {}
    for attempt in attempts(events):
        failed = [event for event in attempt if event["did"] == "failed"]
        if not failed or any(event["did"] in ("stop", "killed") for event in attempt):
            continue
        first = min(failed, key=lambda event: (errors.is_echo(event["why"]), float(event["since"])))
        task = first["race"], first["launch"]
        if task in cells:
            known = found.setdefault(task, {})
            left = [digest for digest in cells[task] if digest not in known]
            known |= blamed(left, _failure_of(first))
    return found


def _failure_of(event: Mapping[str, Any]) -> RankFailure:
    return RankFailure(event["rank"], event["phase"], event["kind"], event["why"], Path(event.get("log", "")))


def _again(folder: SweepFolder, index: int, attempt: int, failed: RaceFailure) -> NoReturn:
    """End this rank, and have the job's script start all again, unless it was Slurm that ended another."""
    time.sleep(GRACE_S)
    failure = failed.failure
    facts = {"phase": failure.phase, "kind": failure.kind, "why": failure.message, "since": failed.at}
    facts["log"] = str(failure.log_path) if failure.log_path.name else ""
    facts |= {"race": failed.race, "launch": failed.launch, "attempt": attempt}
    folder.tell(index, "failed", rank=failure.rank, **facts)
    sys.stderr.flush()
    os._exit(AGAIN)  # not through submitit, which would leave a result: the job would be over


def race_of(data: dict[str, Any]) -> Race:
    """As ``plain`` wrote it."""
    experiments = tuple(Experiment.model_validate(each) for each in data["experiments"])
    return Race(experiments, data["repeats"], data["warmup"], data["launches"])


def plain(race: Race) -> dict[str, Any]:
    """A race as plain data."""
    experiments = [experiment.model_dump(mode="json") for experiment in race.experiments]
    counts = {"repeats": race.repeats, "warmup": race.warmup, "launches": race.launches}
    return {"digest": race.digest, "experiments": experiments, **counts}


def _give_up(folder: SweepFolder, index: int, job: dict[str, Any], task: Task, ends: Sequence[str]) -> None:
    (data,) = (each for launch, each in job["tasks"] if (each["digest"], launch) == task)
    status, how = _death(folder, ends)
    reason = f"the job was killed {len(ends)} times while this race ran{how}; log: {folder.submitit}"
    cluster = Cluster.model_validate(job["cluster"])
    setting = tidy.Setting(folder.name, task[1], *tidy.nowhere(cluster))
    if "experiments" in data:
        race = race_of(data)
        rows = tidy.rows_of_race(race, setting, [], {e.digest: (status, reason) for e in race.experiments})
    else:
        from harness.sweep import profile

        rows = profile.rows(data, setting, cluster, status=status, reason=reason)
    Store(folder.run_dir).append(rows)
    folder.tell(index, "gave up", race=task[0], launch=task[1])


def _death(folder: SweepFolder, ends: Sequence[str]) -> tuple[str, str]:
    """Status and words of a cell in which the job died, from how its tasks ended and from their logs."""
    how = f", the last time {ends[-1]}" if ends[-1] else ""
    if "Out Of Memory" in how:
        return "oom", how
    for path in sorted(folder.submitit.glob(f"{slurm_number(os.environ)}_*_log.err")):
        with contextlib.suppress(OSError):
            last = path.read_text(errors="replace").split("submitit INFO")[-3:]  # of the latest starts
            if said := next((line for text in reversed(last) for line in text.splitlines() if HUNG in line), ""):
                return "hung", f"{how}: {said[said.index(HUNG) :][:200]}"
    return "failed", how


if __name__ == "__main__":
    run_job(Path(sys.argv[1]), int(sys.argv[2]))
