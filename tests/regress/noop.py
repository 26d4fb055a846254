"""How often a checkout beside itself raises an alarm on this machine: it should not.

python -m tests.regress.noop 20 build/noop      # twenty tries of some minutes each; those that are there are kept
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from harness.regress import decide, run


def attempt(folder: Path, number: int) -> pd.DataFrame:
    """The table of try ``number``, from its pairs in ``folder`` or from a run of the suite ``quick``."""
    path = folder / f"{number}.csv"
    if not path.exists():
        logs = folder / f"logs-{number}"
        pairs, setbacks = run.race_pairs(run.ROOT, run.ROOT, run.suite_file("quick"), 16, logs, lambda text: None)
        assert not setbacks, setbacks
        pairs.to_csv(path.with_suffix(".part"), index=False)
        path.with_suffix(".part").replace(path)
    return decide.decide(pd.read_csv(path))


def main(num_tries: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    alarms = 0
    for number in range(1, num_tries + 1):
        table = attempt(folder, number)
        found = table[table["verdict"] != "same"]
        alarms += bool(len(found))
        print(f"try {number}: least p (Holm) {table['p_holm'].min():.4f}, {alarms} alarms so far", flush=True)
        if len(found):
            print(found.to_string(index=False))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
