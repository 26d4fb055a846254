"""The allocation: results, progress, the job's own errors, and nothing left after Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.launch.allocation import AllocationFailure, submit
from harness.launch.session import RankFailure
from tests.launch import jobs
from tests.launch.clusters import LOCAL
from tests.launch.test_session import marked


def test_a_session_inside_an_allocation(tmp_path):
    seen = []
    result = submit(
        jobs.in_allocation, LOCAL, tmp_path / "logs", folder=tmp_path, timeout_min=2, name="t", on_progress=seen.append
    )
    assert result == [[6, 1, 2], [6, 1, 4], [6, 5, 2], [6, 5, 4]]
    assert seen == [{"done": 0}, {"done": 1}]


@pytest.mark.parametrize("mask", ["2,3,GPU-8f6a1c0e-77aa,MIG-1b2c", pytest.param("", marks=pytest.mark.long), None])
def test_a_job_sees_the_gpus_that_its_caller_sees(tmp_path, monkeypatch, mask):
    """submitit sets a mask of its own, and renumbers the GPUs that it is asked for."""
    if mask is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert submit(jobs.environment, "CUDA_VISIBLE_DEVICES", folder=tmp_path, timeout_min=5, name="t") == mask


@pytest.mark.parametrize("error", [UserError("field: 3: too large"), RankFailure(1, "p", "hung", "m", Path("log"))])
def test_the_jobs_own_errors_come_back(tmp_path, error):
    with pytest.raises(type(error), match=str(error).replace("(", r"\(").replace(")", r"\)")):
        submit(jobs.fail_with, error, folder=tmp_path, timeout_min=5, name="t")


def test_a_crash_names_the_log(tmp_path):
    with pytest.raises(AllocationFailure, match="ZeroDivisionError: by nothing") as failure:
        submit(jobs.fail_with, ZeroDivisionError("by nothing"), folder=tmp_path, timeout_min=5, name="t")
    assert "ZeroDivisionError" in failure.value.log_path.read_text()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^folder: .*choose a folder that can be written"):
        submit(jobs.fail_with, None, folder=tmp_path / "file", timeout_min=5, name="t")


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_the_callers_end_ends_the_job(tmp_path, how):
    mark, ready = uuid.uuid4().hex, tmp_path / "ready"
    program = f"""
        from pathlib import Path
        from harness.launch.allocation import submit
        from tests.launch import clusters, jobs
        submit(jobs.hang_in_allocation, clusters.LOCAL, Path({str(tmp_path)!r}), folder={str(tmp_path)!r},
               timeout_min=5, name="t", on_progress=lambda message: Path({str(ready)!r}).touch())
    """
    environment = dict(os.environ, MARK=mark, PYTHONPATH=str(Path.cwd()))
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    ) as caller:
        deadline = time.monotonic() + 60
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(marked(mark)) >= 8  # caller, controller, job, launcher, four ranks
        if how == signal.SIGINT:
            os.killpg(caller.pid, how)  # as a terminal does: to all in the foreground
        else:
            caller.send_signal(how)
        _, errors = caller.communicate(timeout=30)
        assert errors.count("Traceback") == (how == signal.SIGINT)  # the caller's own, not submitit's beside it
    deadline = time.monotonic() + 10
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not marked(mark)
