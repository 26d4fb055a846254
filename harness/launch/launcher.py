"""Starts the ranks of a session and outlives none of it: ``python -m harness.launch.launcher FD``.

Imports torch once and forks a rank per slot, because eight imports on two cores take longer than most experiments.
Emulated, it is pid 1 of the session's namespaces: when it ends, by whatever cause, the kernel kills every rank and
removes every namespace and link. It ends when the session's end of the control connection closes.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, wait
from typing import NoReturn

from harness.launch import rank as rank_module
from harness.launch.kernel import use_batch_scheduling
from harness.launch.network import Network, NoNetwork, build
from harness.launch.rank import Setup

#: what our own modules import where they use it, so that ranks that are no children of a launcher need not wait for it
USED_LATER = ("networkx", "scipy.optimize")
SWITCH = -1  # in place of a rank: the process that joins the nodes of a delayed network


def main(control: Connection) -> None:
    setup: Setup = control.recv()
    sys.path[:] = setup.path
    network, facts = None, {"scheduler": use_batch_scheduling()}
    if setup.emulate:
        try:
            network = build(setup.cluster)
        except NoNetwork as error:
            control.send(("no_network", str(error)))
            return
        facts |= network.facts
    wakeup, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)

    if setup.use_cuda:
        spawned = [_spawn(setup, rank) for rank in range(setup.cluster.num_ranks)]
        pids = [process.pid for process in spawned]  # all kept: a forgotten one that has died is reaped by the next
    else:
        _import_once(setup)
        pids = [_fork(setup, rank, network, [control.fileno(), wakeup, signalled]) for rank in range(len(setup.fds))]
    for fd in setup.fds:
        os.close(fd)
    control.send(("started", facts))
    alive = dict(zip(pids, range(len(pids)), strict=True))
    if network and network.switch_pid:
        alive[network.switch_pid] = SWITCH
    try:
        _watch(control, wakeup, alive)
    except (EOFError, OSError):
        pass
    finally:
        _end(setup, alive)


def _import_once(setup: Setup) -> None:
    for module in (
        "torch.distributed",
        "harness.comm.job",
        "harness.comm.wire",
        *setup.preload,
        *(USED_LATER if setup.preload else ()),
    ):
        try:
            importlib.import_module(module)
        except ImportError as error:  # a rank that needs it will say so itself
            print(f"{module} was not imported before the fork: {error}", file=sys.stderr)
    gc.collect()
    gc.freeze()  # the ranks share these pages as long as nobody writes to them


def _fork(setup: Setup, rank: int, network: Network | None, close: list[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in close:
            os.close(fd)
        namespace = network.of_ranks[rank] if network else None
        rank_module.main(setup, rank, namespace, network.counters if network else None)
        code = 0
    finally:
        os._exit(code)


def _spawn(setup: Setup, rank: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "harness.launch.rank"], stdin=subprocess.PIPE, pass_fds=setup.fds)
    assert process.stdin is not None
    process.stdin.write(pickle.dumps((setup, rank)))
    process.stdin.close()
    return process


def _watch(control: Connection, wakeup: int, alive: dict[int, int]) -> NoReturn:
    """Report every rank that ends; pass on requests; until the session's end closes (EOFError)."""
    while True:
        for ready in wait([control, wakeup]):
            if ready == wakeup:
                os.read(wakeup, 4096)
                _report_ended(control, alive)
            elif control.recv() == "dump stacks":
                for pid, rank in alive.items():
                    if rank != SWITCH:
                        os.kill(pid, signal.SIGUSR1)


def _report_ended(control: Connection, alive: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid in alive:
            control.send(("ended", alive.pop(pid), os.waitstatus_to_exitcode(status)))


def _end(setup: Setup, alive: dict[int, int]) -> None:
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    for pid in alive:
        os.waitpid(pid, 0)
    shutil.rmtree(setup.private, ignore_errors=True)
    if os.getpid() != 1:
        os.killpg(0, signal.SIGKILL)  # what the ranks have started; as pid 1, the kernel does it


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
