"""``sbatch``, except that a full queue is an error at once: sbatch itself would go on asking for minutes."""

from __future__ import annotations

import subprocess
import sys

FULL = "temporarily unable to accept job"


def main(words: list[str]) -> int:
    with subprocess.Popen(["sbatch", *words], stderr=subprocess.PIPE, text=True) as sbatch:
        assert sbatch.stderr is not None
        for line in sbatch.stderr:
            sys.stderr.write(line)
            if FULL in line:  # it sleeps now, so nothing is half submitted
                sbatch.kill()
                return 1
    return sbatch.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
