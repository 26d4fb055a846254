"""Ranks that Slurm has started: one task of a job each, on as many nodes as it has. NCCL on GPUs, gloo on CPU.

Every task calls ``join`` and then ``run_plan``; rank 0 stores. There is no supervisor beside the ranks as on one
machine: where one fails, all have to end (srun --kill-on-bad-exit) and start again.
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import itertools
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
import torch
import torch.distributed as dist
from submitit.helpers import TorchDistributedEnvironment

from harness.bench import race, tidy
from harness.bench.run import Plan, Settings, describe, keep_record, payload_of, record_of_launch, stamp, store_race
from harness.bench.store import Store
from harness.comm import wire as wires
from harness.comm.job import Job
from harness.errors import RankFailure, bad
from harness.launch import gpus
from harness.launch.allocation import report
from harness.launch.kernel import use_batch_scheduling
from harness.launch.network import INTERFACE, Counters
from harness.launch.rank import raised
from harness.launch.slurm import NETWORK_FACTS
from harness.specs import Cluster
from harness.topology import Topology

TIMEOUT = datetime.timedelta(hours=1)  # of a collective
LOST_S = 6.0  # for all to agree to go on without what has failed
PORTS = (20000, 32000)  # below those that kernels hand out by themselves (32768 and up)


class PortTaken(RuntimeError):
    """Something else listens where the ranks were to meet; a new start meets elsewhere."""


class RaceFailure(RuntimeError):
    """This rank failed in a race (or another task of a job), at ``at``: itself, or because another one did."""

    def __init__(self, race: str, launch: int, at: float, failure: RankFailure):
        super().__init__(str(failure))
        self.race, self.launch, self.at, self.failure = race, launch, at, failure


class Watch:
    """In place of a supervisor: ends this rank where what it failed in does not come to an end, because it waits for
    others, or because another of its threads does."""

    def __init__(self) -> None:
        self.task = ("", 0)  # race and launch of what runs
        self.give_up: Callable[[RaceFailure], object] = lambda failed: None  # ends this process
        self.job: Job
        self._timer: threading.Timer | None = None

    def failing(self, error: BaseException) -> None:
        if self._timer is None and isinstance(error, Exception):
            failed = RaceFailure(*self.task, time.time(), failure_of(self.job, error))
            self._timer = threading.Timer(LOST_S, self.give_up, [failed])
            self._timer.daemon = True
            self._timer.start()

    def recovered(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


@dataclasses.dataclass(frozen=True)
class World:
    """The job as one rank sees it, with what its rows say of the network."""

    job: Job
    watch: Watch
    evidence: str
    network: dict[str, Any]


def join(cluster: Cluster) -> World:
    """Meet the other tasks. ``UserError`` if the allocation is not the ``cluster``."""
    faulthandler.enable()  # a watchdog that aborts this process leaves its stacks
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ["MASTER_PORT"] = str(port(os.environ))
    environment = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if environment.world_size != cluster.num_ranks or environment.local_world_size != cluster.shape[-1]:
        have = f"{environment.world_size} tasks, {environment.local_world_size} a node"
        raise bad("cluster", cluster.name, f"has {cluster.num_ranks} ranks, {cluster.shape[-1]} a node, the job {have}")
    device = gpus.device_of(cluster, environment.local_rank, environment.local_world_size)
    use_cuda = device.type == "cuda"
    os.environ["LOCAL_SIZE"] = str(environment.local_world_size)
    facts: dict[str, Any] = {"backend": "nccl" if use_cuda else "gloo", "scheduler": use_batch_scheduling()}
    if not use_cuda:
        torch.set_num_threads(_num_threads(environment.local_world_size))
    try:
        dist.init_process_group(facts["backend"], timeout=TIMEOUT, device_id=device if use_cuda else None)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise PortTaken(f"port {os.environ['MASTER_PORT']} of {environment.master_addr} is taken") from None
        raise
    hosts: list[Any] = [None] * environment.world_size
    dist.all_gather_object(hosts, os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    check_hosts(hosts, cluster)
    virtual = _virtual_nodes(cluster)
    shared_clock = virtual is not None or cluster.num_nodes == 1
    counters = _counters(cluster) if virtual else None
    watch = Watch()
    job = Job(
        Topology(cluster.shape),
        device,
        counters=counters,
        shared_clock=shared_clock,
        timeout=TIMEOUT,
        failing=watch.failing,
        recovered=watch.recovered,
        log_path=log_path(),
    )
    watch.job = job
    network = {"network": "shaped" if virtual else "physical", "shaped": virtual is not None, "reason": ""}
    return World(job, watch, "emulated" if virtual else "measured", network | facts | (virtual or {}))


def port(environment: Mapping[str, str]) -> int:
    """Where the ranks of this start of this job meet: the same on all of them, another one at every start."""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return random.Random("/".join(environment.get(name, "0") for name in names)).randrange(*PORTS)


def check_hosts(hosts: Sequence[str], cluster: Cluster) -> None:
    """``UserError`` unless the ranks of each node follow one another, as everything here assumes. ``hosts``: of every
    rank."""
    size = cluster.shape[-1]
    nodes = [set(hosts[first : first + size]) for first in range(0, len(hosts), size)]
    if any(len(node) > 1 for node in nodes) or len(set(hosts)) != len(nodes):
        runs = [(host, len(list(ranks))) for host, ranks in itertools.groupby(hosts)]
        said = ", ".join(f"{count} on {host}" for host, count in runs)
        remedy = f"ranks of a node must follow one another, {size} a node; srun --distribution=block:block does it"
        raise bad("ranks in their order", said, f"{remedy} (see srun_args and SLURM_DISTRIBUTION)")


def decided(world: World | None, decide: Callable[[], Any]) -> Any:
    """Collective: what rank 0 decides, on all ranks. Where each looked for itself at a file system that all share, each
    could see it at another age, and all would wait for each other."""
    if world is None:
        return decide()
    said: list[Any] = [decide() if world.job.rank == 0 else None]
    dist.broadcast_object_list(said)
    return said[0]


def _num_threads(local_size: int) -> int:
    """Of a rank: what Slurm has given to it, else its share of the node's."""
    return int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or max(1, len(os.sched_getaffinity(0)) // local_size)


def run_plan(
    world: World,
    plan: Plan,
    settings: Settings,
    argv: list[str],
    known: Mapping[tuple[str, int], dict[str, tuple[str, str]]],
) -> None:
    """Collective: every race of ``plan``; rank 0 gathers the answers and stores their rows. ``known``: cells by race
    and launch that need no run, because they have failed, with status and reason. Raises ``RaceFailure``."""
    use_wire(world, plan.wire)
    store, first = Store(settings.run_dir), world.job.rank == 0
    for launch in plan.launches:
        races = [each for number, each in plan.tasks if number == launch]
        if first:
            name = f"launch-{launch}-{plan.cluster.name}-{plan.wire}-{settings.part}-{int(time.time())}"
            record = record_of_launch(plan, launch, races, world.evidence, world.network, argv)
            finish_record = keep_record(store, name, record)
        for each in races:
            if first:
                report({"did": "begin", "text": f"launch {launch}: {describe(each)}", **stamp(each, launch)})
            failed = known.get((each.digest, launch), {})
            remaining = [experiment for experiment in each.experiments if experiment.digest not in failed]
            payload = payload_of(each, remaining, settings, launch)
            world.watch.task = each.digest, launch
            try:
                answers = _answers(world, payload) if remaining else []
            except Exception as error:
                raise RaceFailure(each.digest, launch, time.time(), failure_of(world.job, error)) from error
            if first:
                setting = tidy.Setting(settings.run_dir.name, launch, world.evidence, world.network)
                store_race(store, each, setting, answers, failed)
                report({"did": "race", **stamp(each, launch)})
        if first:
            finish_record()
    leave()


def use_wire(world: World, wire: str) -> None:
    """Whose all-to-all runs under torch.distributed: on GPUs NCCL's, else ``wire``."""
    if world.job.device.type != "cuda":
        wires.install(wire)  # type: ignore[arg-type]
    world.network["wire"] = "nccl" if world.job.device.type == "cuda" else wire


def leave() -> None:
    """Collective: all is done."""
    dist.barrier()
    dist.destroy_process_group()


def _answers(world: World, payload: dict[str, Any]) -> list[Any]:
    return gathered(world, race.run_race(world.job, payload))


def gathered(world: World, answer: Any) -> list[Any]:
    """Collective: the answers of all ranks, on rank 0."""
    answers: list[Any] | None = [None] * world.job.num_ranks if world.job.rank == 0 else None
    dist.gather_object(answer, answers)
    return answers or []


def failure_of(job: Job, error: Exception) -> RankFailure:
    """What ``error`` is to those who read of it."""
    found = raised(job.rank, error, job.doing)
    kind = "hung" if re.search("timed? ?out", found.message, re.IGNORECASE) else found.kind
    return RankFailure(found.rank, job.doing, kind, found.message, Path(job.log_path))


def log_path() -> Path:
    """Where this task's errors go; nowhere that is known where submitit has not started it."""
    try:
        return Path(submitit.JobEnvironment().paths.stderr)
    except (RuntimeError, KeyError):
        return Path()


def _virtual_nodes(cluster: Cluster) -> dict[str, Any] | None:
    """Facts of the shaped network where this Slurm's nodes are virtual ones of one machine; None on real nodes."""
    if cluster.kind != "emulated":
        return None
    if not _facts_path().is_file():
        raise bad(
            "cluster", cluster.name, "is emulated, but the nodes are not slurm/one-machine's; describe them as physical"
        )
    made = json.loads(_facts_path().read_text())
    real = Cluster.model_validate(made["cluster"]).levels
    if [(level.bandwidth_bytes_per_s, level.latency_s) for level in cluster.levels] != [
        (level.bandwidth_bytes_per_s, level.latency_s) for level in real
    ]:
        raise bad("cluster", cluster.name, "has other links than the virtual nodes; start slurm/one-machine with it")
    return dict(made["facts"])


def _counters(cluster: Cluster) -> Counters | None:
    """Bytes at the interfaces of all virtual nodes, read through the slurmd in each; None where the job has not all of
    them, or where more levels lie between them."""
    made = json.loads(_facts_path().read_text())
    if cluster.shape[0] != len(made["daemons"]) or len(cluster.levels) != 2:
        return None
    found = Counters(len(cluster.levels))
    for pid in made["daemons"]:
        fd = os.open(f"/proc/{pid}/net/dev", os.O_RDONLY)
        for level, interface in enumerate((INTERFACE, "lo")):
            found.add(level, fd, interface)
    return found


def _facts_path() -> Path:
    return Path(os.environ.get("SLURM_CONF", "")).parent / NETWORK_FACTS
