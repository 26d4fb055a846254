"""One job of a sweep: goes on where the store says, one race after another, until its own are done.

Whatever ends it, every finished race has its rows. A race in which the job died twice without a word gets rows that say
so, so that it cannot take the others with it. Where ranks are the job's tasks and one of them fails, all end, and the
job's script starts them again (``harness.sweep.submit``): the cell that failed is told, and the others go on.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import submitit

from harness.bench import tidy
from harness.bench.run import Plan, Settings, blamed, run_plan
from harness.bench.store import Store
from harness.bench.suite import Race
from harness.launch.allocation import PROGRESS_VARIABLE
from harness.launch.session import RankFailure
from harness.specs import Cluster, Experiment
from harness.sweep.folder import SweepFolder, Task, deaths

if TYPE_CHECKING:
    from harness.launch.tasks import RaceFailure

MAX_DEATHS = 2  # of the job in one race
GRACE_S = 2.0  # for Slurm's word that it ends the job, which makes ranks fail too
Failed = dict[str, tuple[str, str]]  # cell -> status, reason


class Job:
    """What submitit calls, and calls again after a requeue."""

    def __init__(self, run_dir: str, index: int):
        self.run_dir, self.index = run_dir, index

    def __call__(self) -> None:
        run_job(Path(self.run_dir), self.index)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Time is up, or somebody else's job goes first: the rows are stored already."""
        SweepFolder(self.run_dir).tell(self.index, "stop", why="requeued before its time limit or for another job")
        return submitit.helpers.DelayedSubmission(self)


def run_job(run_dir: Path, index: int) -> None:
    """Run what is left of job ``index`` of the sweep in ``run_dir``, here, where the job was started."""
    folder = SweepFolder(run_dir)
    try:
        _run(folder, index)
    except Exception as error:
        folder.tell(index, "error", why=f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
        raise


def _run(folder: SweepFolder, index: int) -> None:
    run_dir, job = folder.run_dir, folder.job(index)
    rank = int(os.environ.get("SLURM_PROCID", 0)) if job["across"] else 0
    os.chdir(folder.tree if folder.tree.exists() else os.curdir)  # its calibrations and traces
    cluster = Cluster.model_validate(job["cluster"])
    settings = Settings(run_dir, part=f"job-{index}")
    store = Store(run_dir)
    tasks = [(launch, race_of(each)) for launch, each in job["tasks"]]
    finished = store.told_finished()
    tasks = [(n, race) for n, race in tasks if any((e.digest, n) not in finished for e in race.experiments)]
    events = folder.events(index)
    died = deaths([*events, {"did": "start"}])
    fatal = {task for task, times in died.items() if times >= MAX_DEATHS}
    if job["across"]:
        from harness.launch import tasks as across

        known = failures(events, {(race.digest, launch): race for launch, race in tasks})
        told = {(event["race"], event["launch"]) for event in events if event["did"] == "race"}
        tasks = [(n, race) for n, race in tasks if not {(race.digest, n)} <= known.keys() & told]
        world = across.join(cluster)  # before rank 0 writes: every rank has now read the same
    if rank == 0:
        folder.tell(index, "start", host=os.uname().nodename, slurm=os.environ.get("SLURM_JOB_ID"), pid=os.getpid())
        for launch, race in tasks:
            if (race.digest, launch) in fatal:
                _give_up(folder, index, store, race, launch, cluster)
    os.environ[PROGRESS_VARIABLE] = str(folder.events_path(index))
    plan = Plan(cluster, job["wire"], tuple(task for task in tasks if (task[1].digest, task[0]) not in fatal))
    if job["across"]:
        try:
            across.run_plan(world, plan, settings, sys.argv, known)
        except across.RaceFailure as failed:
            _again(folder, index, failed)
    else:
        run_plan(plan, settings, sys.argv)
    if rank == 0:
        folder.tell(index, "end")


def failures(events: Sequence[Mapping[str, Any]], races: Mapping[Task, Race]) -> dict[Task, Failed]:
    """What earlier attempts of this job have found to fail; in each, the rank that failed first explains the others."""
    attempts: list[list[Mapping[str, Any]]] = [[]]
    for event in events:
        if event["did"] == "start":
            attempts.append([])
        elif event["did"] == "failed":
            attempts[-1].append(event)
    found: dict[Task, Failed] = {}
    for first in (min(attempt, key=lambda event: float(event["since"])) for attempt in attempts if attempt):
        task = first["race"], first["launch"]
        if task in races:
            known = found.setdefault(task, {})
            left = [e for e in races[task].experiments if e.digest not in known]
            known |= blamed(left, RankFailure(first["rank"], first["phase"], first["kind"], first["why"], Path()))
    return found


def _again(folder: SweepFolder, index: int, failed: RaceFailure) -> NoReturn:
    """End this rank; and have the job's script start all again, unless it was Slurm that ended another."""
    time.sleep(GRACE_S)
    *_, last = (event["did"] for event in folder.events(index) if event["did"] in ("start", "stop"))
    if last != "stop" and not folder.cancelled.exists():
        failure = failed.failure
        facts = {"phase": failure.phase, "kind": failure.kind, "why": failure.message, "since": failed.at}
        folder.tell(index, "failed", rank=failure.rank, race=failed.race, launch=failed.launch, **facts)
        folder.again(os.environ["SLURM_JOB_ID"]).touch()
    sys.stderr.flush()
    os._exit(1)  # not through submitit, which would leave a result: the job would be over


def race_of(data: dict[str, Any]) -> Race:
    """As ``plain`` wrote it."""
    experiments = tuple(Experiment.model_validate(each) for each in data["experiments"])
    return Race(experiments, data["repeats"], data["warmup"], data["launches"])


def plain(race: Race) -> dict[str, Any]:
    """A race as plain data."""
    experiments = [experiment.model_dump(mode="json") for experiment in race.experiments]
    counts = {"repeats": race.repeats, "warmup": race.warmup, "launches": race.launches}
    return {"digest": race.digest, "experiments": experiments, **counts}


def _give_up(folder: SweepFolder, index: int, store: Store, race: Race, launch: int, cluster: Cluster) -> None:
    reason = f"the job was killed {MAX_DEATHS} times while this race ran; log: {folder.submitit}"
    evidence = "measured" if cluster.kind == "physical" else "emulated"
    network = {"network": "physical" if cluster.kind == "physical" else "unshaped"}  # nothing was timed on it
    setting = tidy.Setting(store.path.name, launch, evidence, network)
    store.append(tidy.rows_of_race(race, setting, [], {e.digest: ("failed", reason) for e in race.experiments}))
    folder.tell(index, "gave up", race=race.digest, launch=launch)


if __name__ == "__main__":
    run_job(Path(sys.argv[1]), int(sys.argv[2]))
