"""``sbatch``, except that a full queue is an error at once: sbatch itself would go on asking for minutes."""

from __future__ import annotations

import re
import subprocess
import sys

WAITS = "temporarily unable to accept job"
#: how many jobs of a user, an account or a quality of service may be in the queue at once
_LIMIT = re.compile(r"(Assoc|QOS)(Max|Grp)Submit\w*Limit")


def full(said: str) -> str:
    """Slurm's word for it if it refused for what is in the queue now, so that it may take the same job later."""
    found = _LIMIT.search(said)
    return found[0] if found else WAITS if WAITS in said else ""


def main(words: list[str]) -> int:
    with subprocess.Popen(["sbatch", *words], stderr=subprocess.PIPE, text=True) as sbatch:
        assert sbatch.stderr is not None
        for line in sbatch.stderr:
            sys.stderr.write(line)
            if WAITS in line:  # it sleeps now, so nothing is half submitted
                sbatch.kill()
                return 1
    return sbatch.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
