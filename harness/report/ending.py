"""What the end of ``moebench run`` says: what did not go well, why, the page to read, and the exit status for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from harness.report import compare, words
from harness.report.render import notebooks, suite
from harness.report.run import load

WELL = ("ok", "cpu_bound", "refused")  # a refusal is an answer, and a marked time is a time


def not_ok(run_dir: Path, cells: Iterable[str]) -> list[dict[str, str]]:
    """Of those ``cells`` (digests) of a run, a row for every status and reason that is not ok: what went wrong first,
    then marks, then refusals."""
    back = compare.setbacks(load(run_dir))
    back = back[back["cell"].isin(set(cells))]
    rows = [
        {
            "status": str(status),
            "systems": _distinct(group["label"]),
            "where": _distinct(group["phase"] + " of " + group["model"] + " on " + group["cluster"]),
            "workloads": _distinct(group["workload"]),
            "launches": ", ".join(sorted(set(", ".join(group["launches"]).split(", ")), key=int)),
            "why": words.shortened(str(reason), 400),
        }
        for (status, reason), group in back.groupby(["status", "reason"], sort=False)
    ]
    order = [*(status for status in words.STATUS_WORDS if status not in WELL), "cpu_bound", "refused"]
    return sorted(rows, key=lambda row: order.index(row["status"]) if row["status"] in order else 0)


def status(counts: Mapping[str, int]) -> int:
    """Of the command, by the number of cells of each status: 1 where one went wrong, or none is ok."""
    return int(not counts.get("ok") or any(count for name, count in counts.items() if name not in WELL))


def page_command(run_dir: Path, usual: Path) -> str:
    """What makes the page of the run in ``run_dir``: a paper's own where it is of the paper's suite. ``usual``: the
    folder of runs that need not be named."""
    papers = (name for name in notebooks() if suite(name) == run_dir.name)
    elsewhere = "" if run_dir.parent.resolve() == usual.resolve() else f" --results {run_dir.parent}"
    return f"moebench report {next(papers, run_dir.name)}{elsewhere}"


def _distinct(values: pd.Series) -> str:
    return ", ".join(dict.fromkeys(values))


__all__ = ["not_ok", "page_command", "status"]
