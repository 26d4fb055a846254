"""From a sweep file to jobs: cells grouped by what they need, arrays with a throttle, the code frozen.

    sweep = submit(load("hiermoe"), Path("results/runs/hiermoe-emulated"), on="slurm")

The process that submits may end at once: what the jobs do from there on is theirs (``harness.sweep.worker``).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from harness.bench.run import Plan, plan
from harness.bench.store import Store
from harness.errors import UserError, bad
from harness.specs import Cluster, Workload
from harness.sweep import profile, script
from harness.sweep.folder import SweepFolder
from harness.sweep.freeze import freeze
from harness.sweep.sbatch import full
from harness.sweep.spec import ClusterFile, SlurmCluster, SweepFile, load_cluster, place_of
from harness.sweep.states import FAILED, Sweep, is_alive
from harness.sweep.worker import Job, plain

On = Literal["local", "slurm"]
COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol")


@dataclasses.dataclass(frozen=True)
class Part:
    """What becomes one job."""

    plan: Plan
    across: bool

    @property
    def nodes(self) -> int:
        return self.plan.cluster.num_nodes if self.across else 1

    @property
    def tasks_per_node(self) -> int:
        return self.plan.cluster.shape[-1] if self.across else 1

    def as_job(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "cluster": self.plan.cluster.model_dump(mode="json"),
            "wire": self.plan.wire,
            "across": self.across,
            "tasks": [[launch, plain(race)] for launch, race in self.plan.tasks],
        }


def parts(file: SweepFile, finished: set[tuple[str, int]], launches: int | None = None, on: On = "slurm") -> list[Part]:
    """Unfinished cells as jobs: the same cluster and wire, one launch after another, at most ``cells_per_job`` cells
    (but a race is never cut: its systems run interleaved). ``on`` this machine a job makes Slurm's nodes itself, as any
    other cluster, where they are emulated ones."""
    found = []
    for whole in plan(file.suite, launches, finished):
        across = on == "slurm" and file.across_nodes(whole.cluster)
        if on == "local" and whole.cluster.kind == "physical":
            raise bad(
                "--on", on, f"cluster {whole.cluster.name} of {file.path} is nodes of {file.slurm.path}; use slurm"
            )
        for launch in whole.launches:
            tasks = [task for task in whole.tasks if task[0] == launch]
            for chunk in _chunks(tasks, file.cells_per_job, lambda task: len(task[1].experiments)):
                found.append(Part(Plan(whole.cluster, whole.wire, tuple(chunk)), across))
    return found


def _unfinished(file: SweepFile, store: Store, launches: int | None, on: On = "slurm") -> list[Part]:
    made = parts(file, store.told_finished(), launches, on)
    if not made:
        raise bad(
            "sweep", store.path.name, "every cell has its result here already; moebench report, or another --name"
        )
    return made


def submit(file: SweepFile, run_dir: Path, *, on: On, launches: int | None = None) -> Sweep:
    """Freeze the code and submit every cell of ``file`` that has no result in ``run_dir`` yet and no live job.

    Raises ``UserError`` for what Slurm refuses, naming the line that had asked for it. If the queue fills up, what
    was accepted stays, and ``resume`` submits the rest.
    """
    if on == "slurm":
        require_slurm()
    store, folder = Store(run_dir), SweepFolder(run_dir)
    store.prepare()
    store.refuse_other(simulated=False)
    if (folder.path / "sweep.json").exists():
        raise bad("sweep", folder.name, "exists; moebench resume goes on with it, --name makes another")
    made = _unfinished(file, store, launches, on)
    cells = [
        [e.digest, launch, race.digest, e.system, e.phase, e.model.name, e.cluster.name, e.workload.name]
        for part in made
        for launch, race in part.plan.tasks
        for e in race.experiments
    ]
    facts = {"name": file.name, "file": str(file.path), "cells_per_job": file.cells_per_job, "cells": cells}
    facts["estimate_s"] = sum(part.plan.estimate_s for part in made)
    workloads = [race.first.workload for race in file.suite.races]
    return _make(folder, facts, [part.as_job() for part in made], workloads, on, file.slurm)


def submit_profile(slurm: ClusterFile, run_dir: Path, job: dict[str, Any]) -> Sweep:
    """Submit the ``job`` of a profile (``harness.sweep.profile.job``) as the only one of a sweep; raises as ``submit``
    does."""
    require_slurm()
    Store(run_dir).prepare()
    cells = profile.cells(job)
    facts = {"name": run_dir.name, "file": "", "cells_per_job": len(cells), "cells": cells, "estimate_s": None}
    return _make(SweepFolder(run_dir), facts, [job], [], "slurm", slurm)


def _make(
    folder: SweepFolder,
    facts: dict[str, Any],
    jobs: Sequence[dict[str, Any]],
    workloads: list[Workload],
    on: On,
    slurm: ClusterFile,
) -> Sweep:
    """Write down a sweep, freeze the code, and start its jobs."""
    folder.path.mkdir(exist_ok=True)
    freeze(folder.tree, workloads)
    cluster = {"cluster_file": str(slurm.path), "cluster": slurm.cluster.model_dump(mode="json")}
    folder.write("sweep.json", {**facts, **cluster, "on": on})
    start(folder, [folder.add_job(job) for job in jobs], on, slurm)
    return Sweep.attach(folder.run_dir)


def resume(sweep: Sweep, *, only_failed: bool = False) -> int:
    """Submit what has no result and no live job, or of that only what failed; with the code as it was frozen.

    Returns the number of jobs.
    """
    folder, facts = sweep.folder, sweep.facts
    if facts["on"] == "slurm":
        require_slurm()
    cells = sweep.cells()
    wanted = FAILED if only_failed else (*FAILED, "cancelled")
    tasks = set(zip(*(cells[cells["state"].isin(wanted)][key] for key in ("race", "launch")), strict=True))
    indices = [] if only_failed else [i for i, job in enumerate(sweep.jobs()) if job.state == "unsubmitted"]
    again: dict[str, dict[str, Any]] = {}  # by what they need
    for index in sorted(set(cells[cells["state"].isin(wanted)]["job"])):
        job = folder.job(index)
        for launch, race in job["tasks"]:
            if (race["digest"], launch) in tasks:
                key = json.dumps([job["cluster"], job["wire"], job["across"], launch])
                again.setdefault(key, {**job, "tasks": []})["tasks"].append((launch, race))
    for job in again.values():
        for chunk in _chunks(job["tasks"], facts["cells_per_job"], lambda task: len(task[1].get("experiments", "1"))):
            indices.append(folder.add_job({**job, "tasks": chunk}))
    if indices:
        folder.cancelled.unlink(missing_ok=True)
        start(folder, indices, facts["on"])
    return len(indices)


def cancel(sweep: Sweep) -> None:
    """End every job of the sweep; what has rows keeps them."""
    folder = sweep.folder
    folder.cancelled.touch()
    lines = folder.submissions()
    numbers = sorted({n.partition("_")[0] for line in lines if line["on"] == "slurm" for n in line["ids"].values()})
    if numbers:
        require_slurm()
        subprocess.run(["scancel", *numbers], check=False)
    for line in lines:
        for pid in set(line["ids"].values()) if line["on"] == "local" else ():
            if is_alive(pid, line) and line["host"] == os.uname().nodename:
                os.killpg(int(pid), signal.SIGKILL)


def _chunks(tasks: Sequence[Any], at_most: int, size: Callable[[Any], int]) -> list[list[Any]]:
    """``tasks`` in order, in lists of at most ``at_most`` cells, or of one task that has more."""
    found: list[list[Any]] = []
    room = 0
    for task in tasks:
        if not found or size(task) > room:
            found.append([])
            room = at_most
        found[-1].append(task)
        room -= size(task)
    return found


def start(folder: SweepFolder, indices: Sequence[int], on: str, file: ClusterFile | None = None) -> None:
    """Hand the jobs that are written down to Slurm, or to a driver on this machine that outlives this process."""
    if on == "local":
        start_driver(folder, indices)
        return
    known = {key: value for key, value in folder.read()["cluster"].items() if key in SlurmCluster.model_fields}
    slurm = SlurmCluster.model_validate(known)  # an older moebench may have written it
    groups: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for index in indices:
        groups[shape_of(folder.job(index))].append(index)
    num_taken = 0
    for shape, members in groups.items():
        executor = submitit.SlurmExecutor(folder.submitit, python=script.python(slurm))
        executor.update_parameters(**script.parameters(folder, slurm, *shape))
        waiting = [members[i : i + slurm.max_array_size] for i in range(0, len(members), slurm.max_array_size)]
        while waiting:
            batch = waiting.pop(0)
            try:
                with _impatient(), executor.batch():
                    jobs = [executor.submit(Job(str(folder.run_dir), index)) for index in batch]
            except (FailedJobError, FailedSubmissionError) as error:
                if not (why := full(str(error))):
                    raise _refused(str(error), file, folder) from None
                if len(batch) > 1:  # as many as there is room for
                    waiting[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                    continue
                raise UserError(
                    f"the queue of Slurm is full ({why}): {num_taken} of {len(indices)} jobs are in it; "
                    f"moebench resume {folder.name} submits the others when there is room"
                ) from None
            folder.add_submission("slurm", {i: job.job_id for i, job in zip(batch, jobs, strict=True)})
            num_taken += len(batch)


def scripts(file: SweepFile, run_dir: Path, launches: int | None = None) -> list[str]:
    """What would be submitted, as the text that sbatch would read; nothing is written or started."""
    made = _unfinished(file, Store(run_dir), launches)
    return script.texts(SweepFolder(run_dir), file.slurm.cluster, [(part.nodes, part.tasks_per_node) for part in made])


def listed(file: SweepFile, run_dir: Path, launches: int | None = None) -> list[dict[str, Any]]:
    """What a driver on this machine would run, a row a job; nothing is written or started."""
    rows = []
    for index, part in enumerate(_unfinished(file, Store(run_dir), launches, "local")):
        races = [race for _, race in part.plan.tasks]
        rows.append(
            {
                "job": index,
                "launch": part.plan.launches[0],
                "cluster": part.plan.cluster.name,
                "ranks": part.plan.cluster.num_ranks,
                "races": len(races),
                "cells": sum(len(race.experiments) for race in races),
            }
        )
    return rows


def shape_of(job: dict[str, Any]) -> tuple[int, int]:
    """Nodes of a job, and its tasks on each."""
    cluster = Cluster.model_validate(job["cluster"])
    return (cluster.num_nodes, cluster.shape[-1]) if job["across"] else (1, 1)


def start_driver(folder: SweepFolder, indices: Sequence[int]) -> None:
    """A process of its own that runs the jobs one after another."""
    path = os.pathsep.join(filter(None, [str(folder.tree), os.environ.get("PYTHONPATH")]))  # an empty one is here
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    folder.submitit.mkdir(parents=True, exist_ok=True)
    with (folder.submitit / "driver.log").open("ab") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "harness.sweep.driver", str(folder.run_dir), *map(str, indices)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    began = Path(f"/proc/{driver.pid}/stat").read_text().rpartition(")")[2].split()[19]
    folder.add_submission("local", {i: str(driver.pid) for i in indices}, began=began, host=os.uname().nodename)


def require_slurm() -> None:
    """``UserError`` if Slurm's commands are not here."""
    if absent := [command for command in COMMANDS if not shutil.which(command)]:
        remedy = "run where Slurm's commands are, start slurm/one-machine, or use --on local"
        raise bad("--on", "slurm", f"{', '.join(absent)} not found; {remedy}")


def _refused(error: str, file: ClusterFile | None, folder: SweepFolder) -> UserError:
    found = place_of(error, file or load_cluster(folder.read()["cluster_file"]))
    if not folder.submissions():  # nothing of it exists but files: the corrected sweep may have the name
        shutil.rmtree(folder.path)
    return found


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """submitit calls sbatch, which waits for minutes where the queue is full, through ``harness.sweep.sbatch``."""
    own = submitit.SlurmExecutor._make_submission_command
    command = [sys.executable, str(Path(__file__).with_name("sbatch.py"))]
    submitit.SlurmExecutor._make_submission_command = lambda self, path: [*command, str(path)]  # type: ignore
    try:
        yield
    finally:
        submitit.SlurmExecutor._make_submission_command = own  # type: ignore[method-assign]
