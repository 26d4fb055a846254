"""Four ranks on the emulated device, as two nodes of two, in one fork of a process of their own: ``python -m
tests.cuda.ranks REQUEST ANSWERS`` reads what to do and writes what every rank found, both pickled.

A rank that fails alone would leave the others in a collective: it says so in the store, and all give up together.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harness import registry
from harness.bench import conformance, race
from harness.comm.job import Job
from harness.plan.graph import Plan, Timeline
from harness.plan.lanes import Executor
from harness.topology import Topology
from tests.cuda import cases, emulated

TIMEOUT_S = 240


@dataclasses.dataclass
class Found:
    """What one rank found in one cell."""

    cell: str
    rank: int
    status: str
    reason: str
    races: dict[str, int]
    reuses: dict[str, int]
    seconds: float
    cpu_s: float


def say_where() -> None:
    """Messages name the task of a plan, and streams by their lanes."""
    run = Executor._run_streams

    def named(work: Callable[[], None], name: str) -> Callable[[], None]:
        def run_named() -> None:
            with emulated.task(name):
                work()

        return run_named

    def run_streams(self: Executor, plan: Plan, *args: Any, **kwargs: Any) -> Timeline:
        for lane, stream in self.streams.items():
            emulated.name_stream(stream, lane)
        for i, task in enumerate(plan.tasks):
            if task.run is not None:
                plan.tasks[i] = dataclasses.replace(task, run=named(task.run, task.name))
        return run(self, plan, *args, **kwargs)

    Executor._run_streams = run_streams  # type: ignore[method-assign]


def run_cell(job: Job, cell: cases.Cell) -> tuple[str, str]:
    """Its status and reason."""
    if cell.trial:
        row = conformance.check_one(job, cell.system, cell.trial, cell.dtype)
        return row["status"], row["reason"]
    payload = {
        "experiments": [cell.experiment.model_dump(mode="json")],
        "repeats": 1,
        "warmup": 1,
    }
    (outcome,) = race.run_race(job, payload)["cells"].values()
    return outcome["status"], outcome["reason"]


def run_cells(job: Job, wanted: list[cases.Cell]) -> list[Found]:
    found = []
    for cell in wanted:
        start, cpu = time.perf_counter(), time.process_time()
        with emulated.task(cell.name):
            try:
                status, reason = run_cell(job, cell)
            except Exception as error:
                traceback.print_exc()
                status, reason = "raised", f"{type(error).__name__}: {error}"
        races, reuses = emulated.hazards()
        found.append(
            Found(
                cell.name,
                job.rank,
                status,
                reason,
                races,
                reuses,
                time.perf_counter() - start,
                time.process_time() - cpu,
            )
        )
        if status == "raised":
            break
    return found


def main(request: Path, answers: Path) -> None:
    wanted: dict[str, Any] = pickle.loads(request.read_bytes())
    torch.set_num_threads(1)
    for system in registry.systems().values():
        for module in system.preload if system.missing() is None else ():
            importlib.import_module(module)
    world = Topology(cases.TOPOLOGY).num_ranks
    store = tempfile.mktemp(dir=answers.parent)
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            code = 1
            try:
                found = be_rank(rank, world, store, wanted)
                (answers.parent / f"{answers.name}.{rank}").write_bytes(pickle.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def be_rank(rank: int, world: int, store: str, wanted: dict[str, Any]) -> Any:
    signal.alarm(TIMEOUT_S)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      LOCAL_SIZE=str(world), GROUP_RANK="0", GLOO_SOCKET_IFNAME="lo")  # fmt: skip
    emulated.install()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    say_where()
    job = Job(Topology(cases.TOPOLOGY), torch.device("cuda", 0))
    return run_cells(job, wanted["cells"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
