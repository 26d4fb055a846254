"""A sweep in a notebook: a grid of its cells that follows the jobs, and tables of what is there so far.

from harness.sweep import attach

sweep = attach("results/runs/hiermoe-emulated")
sweep.watch()                      # the grid, until nothing is open or the cell is interrupted
sweep.speedups("flat")             # of the cells that have a time
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    import pandas as pd

    from harness.sweep.states import Sweep

#: one letter a state, so that the grid does not speak by colour alone
MARKS = {
    "ok": ("✓", "#2e7d32"), "cpu_bound": ("c", "#8d6e00"), "refused": ("–", "#757575"), "running": ("▶", "#1565c0"),
    "queued": ("·", "#9e9e9e"), "requeued": ("↻", "#1565c0"), "unsubmitted": ("?", "#9e9e9e"),
    "cancelled": ("x", "#757575"),
}  # fmt: skip
_FAILED = ("!", "#c62828")
SHOWN = ("direction", "phase", "model", "workload", "cluster", "evidence")


def grid(sweep: Sweep) -> str:
    """HTML: systems beside, cases below, a mark for every launch of a cell; the reason and log of each in its title."""
    cells = sweep.cells()
    systems = list(dict.fromkeys(cells["system"]))
    cases = cells.groupby(["phase", "model", "cluster", "workload"], sort=False)
    rows = []
    for case, here in cases:
        marks = {
            str(system): Markup("").join(map(_mark, of.to_dict("records"))) for system, of in here.groupby("system")
        }
        columns = Markup("").join(Markup("<td>{}</td>").format(marks.get(system, "")) for system in systems)
        rows.append(Markup("<tr><th>{}</th>{}</tr>").format(", ".join(map(str, case)), columns))
    head = Markup("").join(Markup("<th>{}</th>").format(system) for system in systems)
    counts = ", ".join(f"{count} {state}" for state, count in sweep.counts(cells).items())
    eta = sweep.eta_s(cells)
    left = "" if eta is None or not eta else f"; about {max(1, round(eta / 60))} min left"
    return str(
        Markup("<p><b>{}</b>: {}{}</p><table><tr><th></th>{}</tr>{}</table>").format(
            sweep.name, counts, left, head, Markup("").join(rows)
        )
    )


def _mark(cell: Mapping[Any, Any]) -> Markup:
    letter, colour = MARKS.get(str(cell["state"]), _FAILED)
    words = f"launch {cell['launch']}: {cell['state']} {cell['reason']} {cell['log']}".strip()
    return Markup('<span style="color:{}" title="{}">{}</span>').format(colour, escape(words), letter)


def watch(sweep: Sweep, every_s: float = 5.0) -> None:
    """Show the grid and renew it until nothing of the sweep is open."""
    from IPython.display import HTML, display

    num_open = sweep.num_open()  # asked ahead of drawing, so that the last grid shows the end
    handle = display(HTML(grid(sweep)), display_id=True)
    while handle is not None and num_open:
        time.sleep(every_s)
        num_open = sweep.num_open()
        handle.update(HTML(grid(sweep)))


def speedups(sweep: Sweep, reference: str) -> pd.DataFrame:
    """Time of ``reference`` over that of each other cell of its race, of what is there: what ``harness.report.compare``
    knows of it, as far as it fits a screen. Above 1 is faster than ``reference``; low and high: 95 % interval."""
    from harness.report import compare
    from harness.report.run import load

    run = load(sweep.folder.run_dir, baseline=reference)
    found = compare.speedups(run, reference).rename(columns={"point": "speedup"})
    return found[["label", *SHOWN, "speedup", "low", "high", "num_launches", "status"]]
