"""One allocation, one job: the sweep runs inside it, and this process waits. Today on this machine, through submitit.

    result = submit(run_suite, suite, folder=path, timeout_min=60, name="quick", on_progress=show)

What runs inside may call ``report`` to say how far it is.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import submitit

from harness import sealed
from harness.devices import MASK
from harness.errors import Failure, RankFailure, UserError, bad, told

POLL_S = 0.1
CANCEL_S = 10.0
PROGRESS_VARIABLE = "MOEBENCH_PROGRESS"


class AllocationFailure(Failure):
    """The job raised something unforeseen, was cancelled, or ran out of time; the message names its log."""

    def __init__(self, message: str, log_path: Path):
        super().__init__(f"{message} (log: {log_path})")
        self.log_path = log_path


def report(message: dict[str, Any]) -> None:
    """Hand a small JSON-able message to whoever waits for this allocation; outside of one, do nothing."""
    path = os.environ.get(PROGRESS_VARIABLE)
    if path:
        with Path(path).open("a") as file:
            file.write(sealed.line(message))


def submit(
    function: Callable[..., Any],
    *args: Any,
    folder: Path,
    timeout_min: float,
    name: str,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """Run ``function(*args)`` as one job and return its result.

    ``function`` and ``args`` are pickled; logs go to a new directory under ``folder``. Ctrl-C, or the death of this
    process, ends the job with everything that it started. Raises the job's own ``UserError`` or ``RankFailure``, else
    ``AllocationFailure``.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # submitit names files by process id and would return the result of an earlier job of the same id
        own = Path(tempfile.mkdtemp(prefix=time.strftime(f"{name}-%Y%m%d-%H%M%S-"), dir=folder)).resolve()
    except OSError as error:
        raise bad("folder", str(folder), f"{error.strerror}; choose a folder that can be written") from None
    progress = own / "progress.jsonl"
    executor = submitit.AutoExecutor(folder=own, cluster="local")
    executor.update_parameters(name=name, timeout_min=timeout_min)  # no GPUs: it knows numbers only, and renumbers
    with _stderr_to(own / "controller.log"):
        job = executor.submit(_inside, os.getpid(), os.environ.get(MASK), progress, function, args)
    try:
        num_read = 0
        while True:
            done = job.done()
            num_read = _tail(progress, num_read, on_progress)
            if done:
                break
            time.sleep(POLL_S)
        return _outcome(job)
    except BaseException:
        _cancel(job)
        raise


class _Raised:
    """What ended the job: as it was where the caller knows how to show it, else in words."""

    def __init__(self, error: BaseException):
        self.error = error if isinstance(error, (UserError, RankFailure)) else None
        self.words = told(error)


def _inside(caller: int, mask: str | None, progress: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What the job runs. ``mask``: the caller's, since submitit sets one of its own, which shows no GPU."""
    threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
    os.environ.pop(MASK, None)
    if mask is not None:
        os.environ[MASK] = mask
    os.environ[PROGRESS_VARIABLE] = str(progress)
    try:
        return function(*args)
    except Exception as error:
        traceback.print_exc()
        return _Raised(error)


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Processes started here write their errors to ``path``: submitit's controller answers Ctrl-C with a traceback."""
    kept = os.dup(2)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _end_with(caller: int) -> None:
    """A job of the local executor would survive its caller, and nobody would know of it."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(caller)], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def _tail(path: Path, num_read: int, on_progress: Callable[[dict[str, Any]], None] | None) -> int:
    """Pass on the whole lines after the first ``num_read`` bytes; returns how many bytes are read now."""
    if on_progress is None or not path.exists():
        return num_read
    with path.open("rb") as file:
        file.seek(num_read)
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.splitlines():
        on_progress(sealed.unline(line.decode()))
    return num_read + len(whole)


def _outcome(job: submitit.Job[Any]) -> Any:
    try:
        result = job.result()
    except submitit.core.utils.FailedJobError as error:  # before or after what it was to do
        last = next((line for line in reversed(str(error).splitlines()) if line.strip(" -")), "no message")
        raise AllocationFailure(f"job {job.job_id} failed: {last.strip()}", job.paths.stderr) from error
    except submitit.core.utils.UncompletedJobError as error:
        raise AllocationFailure(
            f"job {job.job_id} ended without a result: killed, cancelled or past its time limit", job.paths.stderr
        ) from error
    if not isinstance(result, _Raised):
        return result
    raise result.error or AllocationFailure(f"job {job.job_id} failed: {result.words}", job.paths.stderr)


def _cancel(job: submitit.Job[Any]) -> None:
    deadline = time.monotonic() + CANCEL_S
    while not job.done() and time.monotonic() < deadline:
        job.cancel()
        time.sleep(POLL_S)
