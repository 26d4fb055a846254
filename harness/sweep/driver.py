"""Runs a sweep's jobs on this machine, one after another, so that none disturbs another's times."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from harness.launch.kernel import die_with_parent
from harness.sweep.folder import SweepFolder


def main(run_dir: Path, indices: list[int]) -> None:
    """A job that is killed starts again, as Slurm would requeue it; none outlives this process."""
    folder = SweepFolder(run_dir)
    restarts = int(folder.read()["cluster"]["max_restarts"])
    for index in indices:
        for _ in range(1 + restarts):
            if folder.cancelled.exists():
                return
            with (folder.submitit / f"{index}.log").open("ab") as log:
                command = [sys.executable, "-m", "harness.sweep.worker", str(run_dir), str(index)]
                code = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent
                ).returncode
            if code >= 0:
                break
        if code:
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            folder.tell(index, "exit", code=code, why=f"{how}; log: {folder.submitit / f'{index}.log'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(each) for each in sys.argv[2:]])
