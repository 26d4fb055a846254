"""One rank: joins the job, then serves calls until the session ends.

Forked by ``harness.launch.launcher`` (CPU), or started afresh as ``python -m harness.launch.rank`` (CUDA, which does
not survive a fork).
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import importlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.errors import Kind, UserError, tells_out_of_memory, told, words
from harness.launch import gpus
from harness.launch.kernel import die_with_parent, enter_network
from harness.launch.network import INTERFACE, Counters
from harness.launch.phases import PhaseBoard
from harness.specs import Cluster
from harness.topology import Topology

TIMEOUT = datetime.timedelta(hours=6)  # of collectives: the session's own limits end a call, and name the rank


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the session decides before any rank runs."""

    cluster: Cluster
    private: Path  # directory of this session: phases, rendezvous
    log_dir: Path
    wire: str
    rendezvous: str | None  # None: a file in ``private``
    use_cuda: bool
    emulate: bool
    preload: tuple[str, ...]  # modules that every rank needs, imported once before the fork
    path: list[str]  # sys.path of the caller
    fds: tuple[int, ...]  # each rank's end of its control connection

    @property
    def ranks_per_node(self) -> int:
        return self.cluster.num_ranks if self.use_cuda else self.cluster.shape[-1]

    def log_path(self, rank: int) -> Path:
        return self.log_dir / f"rank-{rank}.log"


@dataclasses.dataclass(frozen=True)
class Raised:
    """What a rank sends instead of a result."""

    rank: int
    kind: Kind
    message: str  # one line
    user_error: bool
    at_s: float  # time.monotonic()
    phase: str = ""  # in which it was


class Line:
    """To the session; any thread may speak."""

    def __init__(self, control: Connection):
        self._control, self._lock = control, threading.Lock()

    def say(self, message: Any) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)  # what cannot be sent is found before anything is
        with self._lock:
            self._control.send_bytes(data)


def main(setup: Setup, rank: int, namespace: str | None = None, counters: Counters | None = None) -> None:
    """Run ``rank`` until its control connection closes."""
    control = Connection(setup.fds[rank])
    line = Line(control)
    try:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session decides when a rank ends
        with setup.log_path(rank).open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        Path("/proc/self/oom_score_adj").write_text("500")  # when memory runs out, a rank goes before its supervisor
        for fd in setup.fds:
            if fd != setup.fds[rank]:
                os.close(fd)
        phase = PhaseBoard(setup.private / "phases", setup.cluster.num_ranks).writer(rank)
        phase("joining the job")
        if namespace is not None:
            enter_network(f"/run/netns/{namespace}")
        job = _join(setup, rank, phase, counters, line)
    except BaseException as error:
        line.say(raised(rank, error, "joining the job"))
        return
    phase("idle")
    line.say(("result", None))
    _serve(job, control, line)


def _join(setup: Setup, rank: int, phase: Any, counters: Counters | None, line: Line) -> Any:
    local, node = rank % setup.ranks_per_node, rank // setup.ranks_per_node
    world = setup.cluster.num_ranks
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(local),
        LOCAL_WORLD_SIZE=str(setup.ranks_per_node),
        LOCAL_SIZE=str(setup.ranks_per_node),
        GROUP_RANK=str(node),
        GLOO_SOCKET_IFNAME=INTERFACE if setup.emulate and setup.cluster.num_nodes > 1 else "lo",
    )
    import torch
    import torch.distributed as dist

    from harness.comm.job import Job

    device = gpus.device_of(setup.cluster, local, setup.ranks_per_node, setup.use_cuda)
    # a rank on the CPU is one core; beside a GPU the cores have nothing to do but to draw weights
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // setup.ranks_per_node) if setup.use_cuda else 1)
    if setup.rendezvous is None:
        where: dict[str, Any] = {"store": dist.FileStore(str(setup.private / "rendezvous"), world)}
    else:
        where = {"init_method": setup.rendezvous}
    dist.init_process_group(
        "nccl" if setup.use_cuda else "gloo",
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
        device_id=device if setup.use_cuda else None,
        **where,
    )
    if not setup.use_cuda:
        from harness.comm import wire

        wire.install(setup.wire)  # type: ignore[arg-type]
    job = Job(
        Topology(setup.cluster.shape),
        device,
        timeout=TIMEOUT,
        report_phase=phase,
        counters=counters,
        progress=lambda message: line.say(("progress", message)),
        failing=lambda error: line.say(("failing", raised(rank, error, job.doing))),
        recovered=lambda: line.say(("recovered", rank)),
        log_path=setup.log_path(rank),
    )

    def in_a_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            line.say(("in a thread", raised(rank, args.exc_value, job.doing)))

    threading.excepthook = in_a_thread
    return job


def _serve(job: Any, control: Connection, line: Line) -> None:
    while True:
        try:
            data = control.recv_bytes()
        except EOFError:
            return
        try:
            target, payload = pickle.loads(data)
            module, name = target.split(":")
            job.phase(f"importing {module}")
            function = getattr(importlib.import_module(module), name)
            job.phase(name)
            line.say(("result", function(job, payload)))
        except BaseException as error:
            line.say(raised(job.rank, error, job.doing))
        else:
            job.phase("idle")


def raised(rank: int, error: BaseException, phase: str) -> Raised:
    """What ``error`` is to those who wait for the rank; its traceback goes to stderr."""
    traceback.print_exception(error)
    names = " ".join(base.__name__ for base in type(error).__mro__)
    user_error = isinstance(error, UserError)
    return Raised(
        rank,
        "out_of_memory" if tells_out_of_memory(f"{names}: {words(error)}") else "raised",
        words(error) if user_error else told(error),
        user_error,
        time.monotonic(),
        phase,
    )


if __name__ == "__main__":
    from harness.launch import rank as itself  # what it sends must not be named __main__

    given, which = pickle.loads(sys.stdin.buffer.read())  # from the launcher
    sys.path[:] = given.path
    itself.main(given, which)
