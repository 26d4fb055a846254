"""Check one GPU in at most eight minutes: ``python -m tests.gpu.smoke``, from the root of a checkout.

Every step runs in another process, boxed in time, and gives one JSON line: step, name, status, reason, figures,
seconds. What cannot be done here (no GPU, no package, no compiler) is skipped by name. Exit status 1 if a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.step import ROOT, Step

BUDGET_S = 480.0
EMULATED_SLOWER = 4  # than a GPU, on cores that others share
START_S = 90.0  # of a process: libraries of several gigabytes may come from a cold disk
EXAMPLES = """examples:
  python -m tests.gpu.smoke
  python -m tests.gpu.smoke --only 3,4,10 --out smoke.jsonl
  python -m tests.gpu.smoke --emulated      # no GPU: the script itself, on the emulated device of tests/cuda
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and keep the lines; 1 if a step failed."""
    parser = argparse.ArgumentParser("python -m tests.gpu.smoke", description=__doc__, epilog=EXAMPLES)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--emulated", action="store_true", help="without a GPU, on the emulated device of tests/cuda")
    parser.add_argument("--only", default="", metavar="3,4", help="the steps with these numbers")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="also write the lines to this file")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for all steps together")
    parser.add_argument("--steps", default="tests.gpu.steps", help=argparse.SUPPRESS)  # a module with STEPS
    given = parser.parse_args(arguments)
    try:
        chosen = choose(importlib.import_module(given.steps).STEPS, given.only)
    except ValueError as error:
        parser.error(str(error))
    counts = dict.fromkeys(("ok", "failed", "skipped"), 0)
    out = given.out.open("w") if given.out else None
    for line in run(chosen, given.steps, given.emulated, given.budget):
        counts[line["status"]] += 1
        for stream in filter(None, (sys.stdout, out)):
            print(json.dumps(line), file=stream, flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()), file=sys.stderr)
    return 1 if counts["failed"] else 0


def choose(steps: Sequence[Step], only: str) -> list[Step]:
    """The steps whose numbers ``only`` lists; all of them for nothing."""
    known = {str(step.number): step for step in steps}
    wanted = [word.strip() for word in only.split(",") if word.strip()]
    if strange := [word for word in wanted if word not in known]:
        raise ValueError(f"--only: {strange[0]!r}: no such step; known: {', '.join(known)}")
    return [step for number, step in known.items() if not wanted or number in wanted]


def run(steps: Sequence[Step], module: str, emulated: bool, budget_s: float) -> Iterator[dict[str, Any]]:
    """One line a step, in order. A step that fails ends its process: what CUDA has not survived, others do not meet."""
    deadline = time.monotonic() + budget_s
    worker: Worker | None = None
    try:
        for step in steps:
            begin = time.monotonic()
            base = {"step": step.number, "name": step.name}
            if begin >= deadline:
                yield base | {"status": "skipped", "reason": f"the {budget_s:g} s of all steps are spent", "seconds": 0}
                continue
            if step.alone and not emulated and worker:
                worker = worker.close()
            worker = worker or Worker(module, emulated)
            line = base | worker.do(step, step.box_s * (EMULATED_SLOWER if emulated else 1), deadline)
            yield line | {"emulated": True} if emulated else line
            if line["status"] == "failed" or (step.alone and not emulated):
                worker = worker.close()
    finally:
        if worker:
            worker.close()


class Worker:
    """A process that does steps, and what it last said."""

    def __init__(self, module: str, emulated: bool):
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading, "rb", buffering=0)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed in ``close``
        command = [sys.executable, "-m", "tests.gpu.worker", str(writing), module, "emulated" if emulated else "real"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
            cwd=ROOT, pass_fds=[writing], start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        self._ready = False

    def do(self, step: Step, box_s: float, deadline: float) -> dict[str, Any]:
        """Status, reason, figures and seconds of ``step``, which ends by ``deadline`` or with its box."""
        begin = time.monotonic()
        if not self._ready:
            started = self._answer(min(START_S, deadline - begin), "the start of its process")
            if started["status"] != "ready":
                return started | {"seconds": round(time.monotonic() - begin, 2)}
            self._ready, begin = True, time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says how
            self._process.stdin.write(f"{step.number}\n".encode())
            self._process.stdin.flush()
        found = self._answer(max(0.1, min(box_s, deadline - begin)), "it")
        return found | {"seconds": round(time.monotonic() - begin, 2)}

    def close(self) -> None:
        """End the process and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for each in (self._answers, self._log, self._process.stdin):
            assert each is not None
            each.close()

    def _answer(self, limit_s: float, what: str) -> dict[str, Any]:
        """The next line, or why there is none."""
        deadline, line = time.monotonic() + limit_s, b""
        while not line.endswith(b"\n"):
            if not select.select([self._answers], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return _failed(f"{what} took longer than {limit_s:.3g} s and was ended{self._last_words()}")
            part = self._answers.read(1 << 16)
            if not part:
                code = self._process.wait()
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                return _failed(f"its process ended ({how}){self._last_words()}")
            line += part
        return dict(json.loads(line))

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"; its last words: {last[:300]}" if last else ""


def _failed(reason: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason}


if __name__ == "__main__":
    sys.exit(main())
