"""Ranks that start once and serve many calls.

    with open_session(cluster, log_dir=path) as session:
        results = session.call("package.module:function", payload, timeout_s=60)

``function(job, payload)`` runs on every rank of the cluster; each rank's result comes back, in rank order. Whatever
ends the session (its ``close``, an exception, Ctrl-C, the death of this process) also ends every rank, namespace
and link.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from harness.errors import Kind, RankFailure, UserError, bad, is_echo
from harness.launch import given, gpus, last_words
from harness.launch.phases import private_board
from harness.launch.rank import Raised, Setup
from harness.specs import Cluster

log = logging.getLogger("moebench")

NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--mount-proc", "--pid", "--fork"]
#: what the launcher is started through, with /run its own, because named network namespaces live there
IN_NAMESPACES = [*NAMESPACES, "--kill-child", "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "moebench"]
COLLECTIVE_CODE = ("/torch/distributed/", "/harness/comm/")  # files of a rank that waits for others
END_S = 10.0  # for the launcher to end all ranks, before this process kills it
#: a rank on CPU keeps the memory that it freed, as torch's CUDA allocator does; else every tensor of a step is mapped
#: and zeroed anew, page by page, which costs more CPU than the copies that are to be timed
KEEP_MEMORY = ":".join(
    f"glibc.malloc.{tunable}"
    for tunable in ("mmap_max=0", f"trim_threshold={16 << 30}", f"top_pad={64 << 20}", "arena_max=1", "hugetlb=1")
)
GRACE_S = 0.5  # after a first failure, for the message or death that explains it
#: after a rank has told that it failed, for all to agree to go on without what has failed; then all are ended
LOST_S = 6.0


class _NoNetwork(RuntimeError):
    pass


@contextlib.contextmanager
def open_session(
    cluster: Cluster,
    *,
    log_dir: Path,
    wire: Literal["recv_first", "gloo"] = "recv_first",
    rendezvous: str | None = None,
    preload: tuple[str, ...] = (),
    start_timeout_s: float | None = None,
) -> Iterator[Session]:
    """Start the ranks of ``cluster`` on this machine; see ``Session``.

    ``wire``: whose all-to-all runs under torch.distributed (gloo only). ``rendezvous``: ``tcp://host:port``; None uses
    a file, which no other program can be in the way of. ``preload``: modules imported once, before ranks are forked.
    ``start_timeout_s``: None is what the environment's MOEBENCH_START_TIMEOUT_S says, else 120 s, and 600 s on GPUs.
    Where an emulated cluster's network cannot be made, its ranks run over plain loopback, ``session.network["shaped"]``
    is False and ``["reason"]`` says why. Raises ``UserError`` and ``RankFailure``.
    """
    log_dir = Path(log_dir)
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad("log_dir", str(log_dir), f"{error.strerror}; choose a folder that can be written") from None
    given.check_rendezvous(cluster, rendezvous)
    use_cuda = gpus.suffice(cluster)
    start_timeout_s = start_timeout_s or given.start_timeout_s(use_cuda)
    reason = "" if cluster.kind == "emulated" else f"a {cluster.kind} cluster is not shaped"
    for emulate in (True, False) if cluster.kind == "emulated" else (False,):
        try:
            session = Session(cluster, log_dir, wire, rendezvous, preload, use_cuda, emulate, reason, start_timeout_s)
        except _NoNetwork as error:
            reason = str(error)
            log.warning("cluster %s runs unshaped: %s", cluster.name, reason)
        else:
            break
    with session:
        yield session


class Session:
    """Running ranks. ``network`` (provenance), ``evidence``, ``call``, ``close``."""

    def __init__(
        self,
        cluster: Cluster,
        log_dir: Path,
        wire: str,
        rendezvous: str | None,
        preload: tuple[str, ...],
        use_cuda: bool,
        emulate: bool,
        reason: str,
        start_timeout_s: float,
    ):
        self.cluster, self.log_dir = cluster, log_dir
        self.evidence: Literal["measured", "emulated"] = "measured" if use_cuda else "emulated"
        self.network: dict[str, Any] = {
            "network": "shaped" if emulate else "physical" if use_cuda else "unshaped",
            "shaped": emulate,
            "reason": reason,
            "backend": "nccl" if use_cuda else "gloo",
            "wire": "nccl" if use_cuda else wire,
            "allocator": "cuda" if use_cuda else os.environ.get("GLIBC_TUNABLES", KEEP_MEMORY),
        }
        self._private, self._phases = private_board(cluster.num_ranks)
        self._oom_kills = _oom_kills()
        pairs = [socket.socketpair() for _ in range(cluster.num_ranks)]
        mine, theirs = socket.socketpair()
        self._ranks = [Connection(ours.detach()) for ours, _ in pairs]
        self._launcher = Connection(mine.detach())
        fds = tuple(rank.fileno() for _, rank in pairs)
        self._setup = Setup(
            cluster, self._private.path, log_dir, wire, rendezvous, use_cuda, emulate, preload, list(sys.path), fds
        )
        self._started = False
        self._launcher_log = log_dir / "launcher.log"
        for path in (self._launcher_log, *map(self._setup.log_path, range(cluster.num_ranks))):
            path.unlink(missing_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            try:
                self._process = self._start(theirs.fileno())
            finally:
                for end in (theirs, *(rank for _, rank in pairs)):
                    end.close()
            self._await_start(start_timeout_s)
        except BaseException:
            self.close()
            raise

    def call(
        self,
        target: str,
        payload: Any = None,
        *,
        timeout_s: float = 600.0,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[Any]:
        """Run ``target``, "package.module:function", as ``function(job, payload)`` on every rank.

        Returns each rank's result; ``on_progress`` gets what ranks hand to ``job.progress`` meanwhile. Payload and
        results are plain data. Raises ``RankFailure``, and ``UserError`` if a rank did; the session is then closed.
        """
        if self.closed:
            raise RuntimeError("the session is closed")
        data = pickle.dumps((target, payload), pickle.HIGHEST_PROTOCOL)
        try:
            for rank in self._ranks:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: its launcher says so
                    rank.send_bytes(data)
            return self._collect(timeout_s, on_progress)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every rank and, with them, the network. May be called twice."""
        if self.closed:
            return
        self._launcher.close()
        if self._process is not None:
            try:
                self._process.wait(END_S if self._started else 0)  # before the start, it may not be listening yet
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        for rank in self._ranks:
            rank.close()
        self._private.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether its ranks have ended."""
        return self._launcher.closed

    def _start(self, control: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "harness.launch.launcher", str(control)]
        missing = [name for name in ("unshare", "ip", "tc") if self._setup.emulate and not shutil.which(name)]
        if missing:
            raise _NoNetwork(f"{' and '.join(missing)} not found; install util-linux and iproute2")
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        environment["PYTHONSAFEPATH"] = "1"  # not before it the current folder, which may hold another checkout
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for GPUs must not initialise CUDA before a fork
        if not self._setup.use_cuda:
            environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            environment["CUDA_VISIBLE_DEVICES"] = ""
            environment.setdefault("GLIBC_TUNABLES", KEEP_MEMORY)
        with self._launcher_log.open("wb") as output:
            return subprocess.Popen(
                [*IN_NAMESPACES, *command] if self._setup.emulate else command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(control, *self._setup.fds),
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone
                preexec_fn=_leave_slurms_warnings_to_the_job if "SLURM_JOB_ID" in os.environ else None,
            )

    def _await_start(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(BrokenPipeError):
            self._launcher.send(self._setup)
        try:
            if not self._launcher.poll(timeout_s):
                raise self._failure(-1, "hung", f"no start within {timeout_s:g} s")
            word, fact = self._launcher.recv()
        except (EOFError, ConnectionResetError):
            last = last_words.line(self._launcher_log) or "no message"
            if self._setup.emulate and "Traceback" not in self._launcher_log.read_text(errors="replace"):
                raise _NoNetwork(
                    f"namespaces are forbidden here ({last}); allow unprivileged user namespaces "
                    "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0)"
                ) from None
            raise self._failure(-1, "died", f"the launcher ended: {last}") from None
        if word == "no_network":
            raise _NoNetwork(fact)
        self._started = True
        self.network |= fact
        self._collect(max(0.0, deadline - time.monotonic()), None, f"no start within {timeout_s:g} s")

    def _collect(
        self, timeout_s: float, on_progress: Callable[[dict[str, Any]], None] | None, late: str | None = None
    ) -> list[Any]:
        """Wait for a result of every rank."""
        waiting = dict(zip(self._ranks, range(len(self._ranks)), strict=True))
        results: dict[int, Any] = {}
        failures: list[Raised] = []
        failing: dict[int, Raised] = {}  # ranks that may yet agree to go on
        heard: list[Raised] = []  # in threads that nobody may need
        deadline = time.monotonic() + timeout_s
        while len(results) < len(self._ranks):
            until = min([deadline, *(each.at_s + LOST_S for each in failing.values())])
            ready = wait([*waiting, self._launcher], max(0.0, until - time.monotonic()))
            if not ready:
                if failures or failing:
                    raise self._blame([*failures, *failing.values()])
                raise self._hung(sorted(waiting.values()), late or f"no result within {timeout_s:g} s", heard)
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    if waiting.pop(connection, None) is None:
                        assert self._process is not None
                        message = ("ended", -1, self._process.wait())
                    else:
                        continue  # the launcher tells how it ended
                if isinstance(message, Raised):
                    failures.append(message)
                    waiting.pop(connection, None)
                    continue
                match message:
                    case ("progress", told):
                        if on_progress:
                            on_progress(told)
                    case ("result", result):
                        results[waiting.pop(connection)] = result
                    case ("failing", told):
                        failing.setdefault(told.rank, told)
                    case ("recovered", rank):
                        failing.pop(rank, None)
                    case ("in a thread", told):
                        heard.append(told)
                    case ("ended", rank, code):
                        failures.append(self._ended(rank, code))
            if failures and deadline > time.monotonic() + GRACE_S:
                deadline = time.monotonic() + GRACE_S
        return [results[rank] for rank in range(len(self._ranks))]

    def _ended(self, rank: int, code: int) -> Raised:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        memory = code == -signal.SIGKILL and _oom_kills() > self._oom_kills
        who = "the launcher or the emulated switch " if rank < 0 else ""
        path = self._log_of(rank)
        said = (last_words.of_dead(path) or last_words.no_room(path)) if not memory else ""
        message = who + how + (f": {said}" if said else "")
        return Raised(rank, "out_of_memory" if memory else "died", message, False, time.monotonic(), self._phase(rank))

    def _blame(self, failures: list[Raised]) -> Exception:
        """The failure that explains the others: the first that does not tell of another rank's end. What a rank has
        said itself explains its own end."""
        spoke = {each.rank for each in failures if each.kind != "died"}
        causes = [each for each in failures if each.kind != "died" or each.rank not in spoke]
        first = min(causes, key=_order)
        failure = RankFailure(first.rank, first.phase, first.kind, first.message, self._log_of(first.rank))
        if not first.user_error:
            return failure
        error = UserError(first.message)
        error.failure = failure
        return error

    def _hung(self, ranks: list[int], message: str, heard: list[Raised]) -> RankFailure:
        """Name the rank that the others wait for: one that is in no collective, in a phase that few share, and
        behind; and where each rank stands. The stacks of all go to their logs."""
        phases = {rank: self._phases.read(rank) for rank in ranks}
        stacks = self._dump_stacks(ranks)
        shared = collections.Counter((phase.text, phase.num_changes) for phase in phases.values())

        def innocence(rank: int) -> tuple[bool, int, int, float]:
            phase = phases[rank]
            in_collective = any(path in stacks.get(rank, "") for path in COLLECTIVE_CODE)
            return in_collective, shared[phase.text, phase.num_changes], phase.num_changes, -phase.age_s

        def at(rank: int) -> str:
            place = last_words.place(stacks.get(rank, ""))
            return f" at {place}" if place else ""

        culprit = min(ranks, key=innocence)
        others = "; ".join(f"rank {rank} in {phases[rank].text!r}{at(rank)}" for rank in ranks if rank != culprit)
        message += f", {phases[culprit].age_s:.1f} s in this phase{at(culprit)}"
        message += "".join(f"; a thread of rank {each.rank} had raised {each.message}" for each in heard)
        message += (f"; also waiting: {others}" if others else "") + f"; their stacks: {self.log_dir}/rank-*.log"
        return self._failure(culprit, "hung", message)

    def _dump_stacks(self, ranks: list[int]) -> dict[int, str]:
        """Have every rank write its stacks to its log; returns what they wrote."""
        paths = {rank: self._setup.log_path(rank) for rank in ranks}
        ends = {rank: path.stat().st_size if path.exists() else 0 for rank, path in paths.items()}
        with contextlib.suppress(OSError):
            self._launcher.send("dump stacks")
            time.sleep(GRACE_S)
        return {rank: path.read_text(errors="replace")[ends[rank] :] for rank, path in paths.items() if path.exists()}

    def _phase(self, rank: int) -> str:
        return self._phases.read(rank).text if rank >= 0 else "start"

    def _log_of(self, rank: int) -> Path:
        return self._setup.log_path(rank) if rank >= 0 else self._launcher_log

    def _failure(self, rank: int, kind: Kind, message: str) -> RankFailure:
        return RankFailure(rank, self._phase(rank), kind, message, self._log_of(rank))


def _order(failure: Raised) -> tuple[int, bool, float]:
    echo = is_echo(failure.message) and (1 if failure.kind == "died" else 2)  # of a death, others hear
    return int(echo), failure.rank < 0, failure.at_s


def _leave_slurms_warnings_to_the_job() -> None:
    """Slurm warns every process of a job before it ends it; the job, not a rank, decides what then happens."""
    for warning in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        signal.signal(warning, signal.SIG_IGN)


def _oom_kills() -> int:
    """How often the kernel has killed a process for memory."""
    match = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


__all__ = ["RankFailure", "Session", "open_session"]
