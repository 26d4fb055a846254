"""Sessions: calls, failures named with their phase, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import types
import uuid
from pathlib import Path

import psutil
import pytest

from harness.errors import UserError, tells_out_of_memory
from harness.launch import given, phases
from harness.launch import session as session_module
from harness.launch.rank import Raised
from harness.launch.session import RankFailure, open_session
from tests.launch.clusters import EMULATED, LOCAL

WORK = "tests.launch.work:"


@pytest.mark.parametrize("cluster", [LOCAL, EMULATED], ids=lambda cluster: cluster.name)
def test_ranks_serve_many_calls(session, cluster):
    ranks, seen = session(cluster), []
    for payload in ({"a": 1}, b"x" * (3 << 20)):
        results = ranks.call(WORK + "echo", payload, on_progress=seen.append)
        assert results == [(rank, payload, os.SCHED_BATCH, 1) for rank in range(4)]
    assert sorted(message["rank"] for message in seen) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ranks.call(WORK + "total") == [[6, 1, 2], [6, 1, 4], [6, 5, 2], [6, 5, 4]]
    assert "rank 3 echoes" in (ranks.log_dir / "rank-3.log").read_text()
    assert ranks.network["shaped"] == (cluster is EMULATED)
    assert ranks.evidence == "emulated"
    assert ranks.call(WORK + "time_limits") == [{6 * 3600.0}] * 4  # the session's own limits come first


@pytest.mark.parametrize(
    ("cluster", "how", "kind", "text"),
    [
        pytest.param(EMULATED, "raise", "raised", "KeyError: 'no such expert'", marks=pytest.mark.long),
        (EMULATED, "kill", "died", "was killed by SIGKILL"),
        (LOCAL, "abort", "died", "was killed by SIGABRT: op.nbytes. 8 vs 4, at tests/launch/work.py:"),
        pytest.param(LOCAL, "memory", "out_of_memory", "can't allocate memory", marks=pytest.mark.long),
        (LOCAL, "repeated memory", "out_of_memory", "CUDA out of memory"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_rank_that_fails_is_named(tmp_path, cluster, how, kind, text):
    with open_session(cluster, log_dir=tmp_path) as ranks:
        with pytest.raises(RankFailure) as failure:
            ranks.call(WORK + "go_wrong", {"rank": 2, "how": how}, timeout_s=60)
        assert ranks.closed
    error = failure.value
    assert (error.rank, error.phase, error.kind) == (2, "doing mischief", kind)
    assert text in error.message
    assert error.log_path == tmp_path / "rank-2.log"
    assert "\n" not in str(error)


def test_all_ranks_tell_the_one_that_is_out_of_memory(session):
    """The others only see a collective that fails, maybe sooner."""
    lost, memory = "DistBackendError: connection closed by peer", "OutOfMemoryError: CUDA out of memory"
    ranks = session(LOCAL)
    assert ranks.call(WORK + "say", [None, lost, memory, lost]) == [memory] * 4
    assert ranks.call(WORK + "say", [None, lost, None, "other"]) == [lost] * 4
    assert ranks.call(WORK + "say", [None] * 4) == [None] * 4


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB", True),
        ("AcceleratorError: CUDA error: out of memory", True),
        ("RuntimeError: rank 3: DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("_ArrayMemoryError: Unable to allocate 8.00 TiB", True),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)", True),
        ("DistBackendError: NCCL error: Failed to CUDA calloc 4096 bytes: Cuda failure 2 'out of memory'", True),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", False),
        ("KeyError: 'memory'", False),
    ],
)
def test_words_of_a_memory_that_has_run_out(text, memory):
    assert tells_out_of_memory(text) is memory


def test_a_rank_that_hangs_is_named_and_its_stack_logged(tmp_path):
    with open_session(LOCAL, log_dir=tmp_path) as ranks, pytest.raises(RankFailure) as failure:
        ranks.call(WORK + "go_wrong", {"rank": 1, "how": "hang"}, timeout_s=2)
    error = failure.value
    assert (error.rank, error.kind, error.phase) == (1, "hung", "doing mischief")
    assert "; a thread of rank 1 had raised ValueError: in a thread, at tests/launch/jobs.py:" in str(error)
    assert "s in this phase at tests/launch/work.py:" in str(error)
    assert "rank 0 in 'before the barrier' at tests/launch/work.py:" in str(error)
    for rank in range(4):
        assert "go_wrong" in (tmp_path / f"rank-{rank}.log").read_text()
    assert "in go_wrong" in (tmp_path / "rank-1.log").read_text()


def test_a_rank_that_cannot_join_says_why_and_all_end(tmp_path):
    with (
        pytest.raises(RankFailure) as failure,
        open_session(LOCAL, log_dir=tmp_path, preload=("tests.launch.unjoinable",)),
    ):
        pass
    assert time.time() - (tmp_path / "rank-2.log").stat().st_mtime < 10
    assert str(failure.value).startswith(
        "rank 2 raised in phase 'joining the job': OSError: [Errno 101] Network is unreachable, at tests/launch/unjoi"
    )
    assert "Network is unreachable" in (tmp_path / "rank-2.log").read_text()


def test_what_a_lane_raises_is_told_though_its_rank_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "LOST_S", 0.5)
    with open_session(LOCAL, log_dir=tmp_path) as ranks, pytest.raises(RankFailure) as failure:
        ranks.call(WORK + "lose_a_lane", timeout_s=60)
    error = failure.value
    assert (error.rank, error.kind, error.phase) == (2, "raised", "stepping")
    assert re.match(r"RuntimeError: bad day, at tests/launch/jobs.py:\d+ in fail_with", error.message)
    assert "bad day" in error.log_path.read_text()


def test_ranks_that_have_failed_alike_go_on(session, monkeypatch):
    monkeypatch.setattr(session_module, "LOST_S", 1.0)
    for reason in session(LOCAL).call(WORK + "recover", 2.5, timeout_s=60):
        assert "ZeroDivisionError: division by zero" in reason


def test_a_death_explains_what_others_hear_of_it():
    heard = Raised(0, "raised", "RuntimeError: Connection closed by peer", False, 1.0)
    death = Raised(2, "died", "was killed by SIGABRT: op.preamble.length <= op.nbytes. 8 vs 4", False, 2.0)
    assert min(heard, death, key=session_module._order) is death
    other = Raised(1, "raised", "RuntimeError: bad day", False, 3.0)
    assert min(heard, death, other, key=session_module._order) is other


@pytest.mark.parametrize("failures", [*itertools.permutations(range(3))])
def test_the_failure_that_explains_the_others_is_told(failures):
    """In whatever order they are heard of."""
    raised = [
        Raised(0, "raised", "RuntimeError: [gloo/transport/tcp/pair.cc:5] Connection closed by peer", False, 1.0),
        Raised(1, "raised", "RuntimeError: bad day", False, 3.0, "stepping"),
        Raised(1, "died", "exited with status 0", False, 2.0),
        Raised(3, "raised", "ValueError: a later one", False, 4.0),
    ]
    blame = session_module.Session._blame
    ranks = types.SimpleNamespace(_log_of=lambda rank: Path(f"rank-{rank}.log"))
    first = blame(ranks, [*(raised[i] for i in failures), raised[3]])
    assert str(first) == "rank 1 raised in phase 'stepping': RuntimeError: bad day (log: rank-1.log)"


def test_a_users_error_stays_one(tmp_path):
    with open_session(LOCAL, log_dir=tmp_path) as ranks, pytest.raises(UserError, match=r"^model\.top_k: 9: larger"):
        ranks.call(WORK + "go_wrong", {"rank": 0, "how": "user"}, timeout_s=60)


def test_port_in_use_and_rendezvous_by_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            pytest.raises(UserError, match=rf"^rendezvous: 'tcp://127.0.0.1:{port}': Address already in use; choose"),
            open_session(LOCAL, log_dir=tmp_path, rendezvous=f"tcp://127.0.0.1:{port}"),
        ):
            pass
    with open_session(LOCAL, log_dir=tmp_path, rendezvous=f"tcp://127.0.0.1:{port}") as ranks:
        assert [result[0] for result in ranks.call(WORK + "total")] == [6.0] * 4


@pytest.mark.parametrize("rendezvous", ["localhost:1", "tcp://127.0.0.1:99999", "tcp://no-such-host.invalid:2"])
def test_bad_rendezvous(tmp_path, rendezvous):
    with pytest.raises(UserError, match=r"^rendezvous: "), open_session(LOCAL, log_dir=tmp_path, rendezvous=rendezvous):
        pass


def test_physical_clusters_need_their_gpus(tmp_path):
    cluster = LOCAL.model_copy(update={"kind": "physical"})
    with pytest.raises(UserError, match="needs 4 GPUs"), open_session(cluster, log_dir=tmp_path):
        pass


def test_logs_need_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^log_dir: .*can be written"), open_session(LOCAL, log_dir=tmp_path / "file"):
        pass


def test_start_has_a_time_limit(tmp_path):
    limit = pytest.raises(RankFailure, match=r"no start within 0\.01 s")
    with limit, open_session(LOCAL, log_dir=tmp_path, start_timeout_s=0.01):
        pass


def test_the_start_time_limit_can_be_set(tmp_path, monkeypatch):
    assert given.start_timeout_s(use_cuda=True) == 600
    for text in ("soon", "-1", "inf"):
        monkeypatch.setenv("MOEBENCH_START_TIMEOUT_S", text)
        wrong = pytest.raises(UserError, match=rf"^MOEBENCH_START_TIMEOUT_S: '{text}': must be a number of seconds")
        with wrong, open_session(LOCAL, log_dir=tmp_path):
            pass
    monkeypatch.setenv("MOEBENCH_START_TIMEOUT_S", "0.01")
    limit = pytest.raises(RankFailure, match=r"no start within 0\.01 s")
    with limit, open_session(LOCAL, log_dir=tmp_path):
        pass


def test_a_full_scratch_is_named(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(phases.PhaseBoard, "__init__", no_space)
    full = pytest.raises(UserError, match=r"^TMPDIR: .*scratch': No space left on device; free some space")
    with full, open_session(LOCAL, log_dir=tmp_path / "log"):
        pass
    assert not list((tmp_path / "scratch").iterdir())


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_launcher_that_cannot_run_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(session_module.sys, "executable", "/bin/false")
    with pytest.raises(RankFailure, match="the launcher ended"), open_session(LOCAL, log_dir=tmp_path):
        pass


@pytest.mark.parametrize(
    ("cluster", "how"),
    [
        ("LOCAL", signal.SIGINT),
        ("EMULATED", signal.SIGKILL),
        pytest.param("LOCAL", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("EMULATED", signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_the_supervisors_end_leaves_nothing(tmp_path, cluster, how):
    mark = uuid.uuid4().hex
    program = f"""
        import signal
        from pathlib import Path
        from harness.launch.session import open_session
        from tests.launch import clusters
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off in the background
        with open_session(clusters.{cluster}, log_dir=Path({str(tmp_path / "logs")!r})) as ranks:
            print("ready", flush=True)
            ranks.call("tests.launch.work:go_wrong", {{"rank": 1, "how": "hang"}})
    """
    environment = dict(os.environ, MARK=mark, TMPDIR=str(tmp_path), PYTHONPATH=str(Path.cwd()))
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == b"ready\n"
        assert len(marked(mark)) >= 6  # supervisor, launcher, four ranks
        assert list(tmp_path.glob("moebench-*"))
        supervisor.send_signal(how)
        supervisor.wait(30)
    deadline = time.monotonic() + 10
    while (marked(mark) or list(tmp_path.glob("moebench-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not marked(mark)
    assert not list(tmp_path.glob("moebench-*"))


def marked(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
