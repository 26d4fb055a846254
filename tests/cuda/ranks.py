"""Four ranks on the emulated device, as two nodes of two, in one fork of a process of its own.

``python -m tests.cuda.ranks FOLDER first`` drives every system that the registry finds, those in ``FOLDER/dropped``
too if that is there, through the first of its ``cases.cells_of``, and then the planted faults; with ``rest``, through
the other cells. Every rank writes what it found to ``FOLDER/rank-N.json`` and says in ``FOLDER/rank-N.log`` what it
does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness import registry
from harness.bench import conformance, race
from harness.comm import handover
from harness.comm.job import Job
from harness.plan.graph import Plan, Timeline
from harness.plan.lanes import Executor
from harness.routing.corpus import python_corpus
from harness.topology import Topology
from tests.cuda import cases, emulated, shared, streams

WORLD = Topology(cases.TOPOLOGY).num_ranks
COLLECTIVE_TIMEOUT_S = 120  # of a collective that a rank which failed does not come to
TIMEOUT_S = 600  # of all; a quiet machine takes a tenth of it


@dataclasses.dataclass
class Found:
    """What one rank found in one cell; ``races`` and ``reuses`` by text, with how often each was seen."""

    system: str
    cell: str
    rank: int
    status: str
    reason: str
    races: dict[str, int]
    reuses: dict[str, int]
    cpu_s: float


# ------------------------------------------------------------------------------------------------------- one rank


def drive(job: Job, systems: list[str], first: bool) -> Iterator[Found]:
    """All first cells, or the others. Ends where ranks do not agree on what became of one: some may be left in it."""
    cells = [cell for name in systems for cell in cases.cells_of(name) if cell.first == first]
    if first:
        cells += cases.PLANTED
    for cell in cells:
        start = time.process_time()
        with emulated.task(cell.name), FAULTS[cell.planted]():
            try:
                status, reason = run_cell(job, cell)
            except Exception as error:
                traceback.print_exc()
                status, reason = "raised", f"{type(error).__name__}: {error}"
            torch.cuda.synchronize()
        races, reuses = emulated.hazards()
        yield Found(cell.system, cell.name, job.rank, status, reason, races, reuses, time.process_time() - start)
        if len(set(votes(job, cell.name, status))) > 1:
            return
        gc.collect()
        gc.freeze()  # of what is left, no later collection looks at anything again


def run_cell(job: Job, cell: cases.Cell) -> tuple[str, str]:
    """Its status and reason."""
    if cell.trial:
        row = conformance.check_one(job, cell.system, cell.trial, cell.dtype, cell.options)
        return row["status"], row["reason"]
    payload = {"experiments": [cell.experiment.model_dump(mode="json")], "repeats": 1, "warmup": 1}
    (outcome,) = race.run_race(job, payload)["cells"].values()
    return outcome["status"], outcome["reason"]


def votes(job: Job, what: str, own: str) -> list[str]:
    """What every rank says of ``what``; through the store, since a rank may be stuck in a collective."""
    store = dist.distributed_c10d._get_default_store()
    keys = [f"tests/{what}/{rank}" for rank in range(job.num_ranks)]
    store.set(keys[job.rank], own)
    store.wait(keys, datetime.timedelta(seconds=2 * COLLECTIVE_TIMEOUT_S))
    return [store.get(key).decode() for key in keys]


def say_where() -> None:
    """Messages name the task of a plan, and streams by their lanes."""
    run_streams = Executor._run_streams

    def named(work: Callable[[], None], name: str) -> Callable[[], None]:
        def run() -> None:
            with emulated.task(name):
                work()

        return run

    def run_named(self: Executor, plan: Plan, *args: Any) -> Timeline:
        for lane, stream in self.streams.items():
            emulated.name_stream(stream, lane)  # type: ignore[arg-type]
        for i, task in enumerate(plan.tasks):
            if task.run is not None:
                plan.tasks[i] = dataclasses.replace(task, run=named(task.run, task.name))
        return run_streams(self, plan, *args)

    Executor._run_streams = run_named  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------- faults in the harness


@contextlib.contextmanager
def nothing_recorded() -> Iterator[None]:
    """The harness tells the allocator nothing of tensors that change lanes."""
    used_here = handover.used_here
    handover.used_here = lambda value: value
    try:
        yield
    finally:
        handover.used_here = used_here


@contextlib.contextmanager
def nothing_waited_for() -> Iterator[None]:
    """The executor does not let a lane wait for another one's tasks."""
    wait_event = streams.Stream.wait_event
    streams.Stream.wait_event = lambda self, event: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        streams.Stream.wait_event = wait_event  # type: ignore[method-assign]


@contextlib.contextmanager
def summed_on_the_host() -> Iterator[None]:
    """Conformance sums errors over the ranks in a CPU tensor."""
    errors = conformance._errors

    def of_cpu(job: Job, *args: Any) -> dict[str, float]:
        dist.all_reduce(torch.zeros(1))
        return errors(job, *args)

    conformance._errors = of_cpu
    try:
        yield
    finally:
        conformance._errors = errors


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "nothing recorded": nothing_recorded,
    "nothing waited for": nothing_waited_for,
    "summed on the host": summed_on_the_host,
}


# ------------------------------------------------------------------------------------------------------- all of them


def main(folder: Path, first: bool) -> None:
    torch.set_num_threads(1)
    if (folder / "dropped").exists():
        sys.path.append(str(folder))
        registry.FOLDERS = (*registry.FOLDERS, "dropped")
    systems = {name: system for name, system in registry.systems().items() if cases.not_here(name) is None}
    for system in systems.values():
        for module in system.preload:
            importlib.import_module(module)
    importlib.import_module("harness.compiled")
    python_corpus()
    shared.install()
    gc.collect()
    gc.freeze()
    children = []
    for rank in range(WORLD):
        if (child := os.fork()) == 0:
            be_rank(folder, rank, list(systems), first)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def be_rank(folder: Path, rank: int, systems: list[str], first: bool) -> None:
    """Never returns."""
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.alarm(TIMEOUT_S)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD),
                      LOCAL_SIZE=str(WORLD), GROUP_RANK="0", GLOO_SOCKET_IFNAME="lo")  # fmt: skip
    code = 1
    try:
        emulated.install()
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "rendezvous"), WORLD),  # a server's thread would not survive the forks
            rank=rank,
            world_size=WORLD,
            timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        say_where()
        job = Job(Topology(cases.TOPOLOGY), torch.device("cuda", 0))
        with (folder / f"rank-{rank}.json").open("w", buffering=1) as answers:
            for found in drive(job, systems, first):
                answers.write(json.dumps(dataclasses.asdict(found)) + "\n")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "first")
