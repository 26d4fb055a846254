"""What the judge of time says of the cells of a run: of every system and phase, on its cluster as it was profiled.

Of the run it knows the experiments and, where ``host_of`` names a system, what the processor does beside in that
system's cells (``heldout.fitted``); these then say nothing about how good predictions are.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness import heldout, ledger
from harness.errors import UserError
from harness.plan.agreement import Agreement, agreement
from harness.plan.graph import Timeline
from harness.plan.host import Seconds, merged
from harness.simulation import Simulation, simulate
from harness.specs import Experiment

WARM, STEPS = 5, 2  # of a training: before those that are predicted, and these; where routing drifts, those that ran


class Simulator:
    """``folder``: the ledger's; ``host_of``: a system."""

    def __init__(self, folder: Path = ledger.LEDGER, host_of: str = ""):
        self.folder, self.host_of = folder, host_of
        self.fitted: set[str] = set()  # cells that host time was taken from
        self._hosts: dict[Path, dict[str, Seconds]] = {}  # of each run, by what it depends on

    def predictions(self, run: Any) -> pd.DataFrame:
        """Rows of cell, direction and predicted_s. ``UserError`` if there are none: why not the first of them."""
        rows: list[dict[str, Any]] = []
        why: UserError | None = None
        hosts = self._hosts_of(run)
        for cell, experiment in _experiments(run).items():
            try:
                found = self._simulated(run, cell, experiment, hosts.get(heldout.shape_of(experiment), {}))
            except UserError as error:
                why = why or error
                continue
            for direction, seconds in found.samples.items():
                rows.append({"cell": cell, "direction": direction, "predicted_s": float(np.mean(seconds))})
        if why is not None and not rows:
            raise why
        return pd.DataFrame(rows, columns=["cell", "direction", "predicted_s"])

    def timelines(self, run: Any, cell: str) -> dict[str, Timeline]:
        """Of a predicted cell by direction, [num_tasks, W]."""
        experiment = _experiments(run)[cell]
        host = self._hosts_of(run).get(heldout.shape_of(experiment), {})
        return dict(self._simulated(run, cell, experiment, host).timelines)

    def agreement(self, frame: pd.DataFrame) -> Agreement:
        """Of a table of cell, race, measured_s and predicted_s; of the cells from which nothing was taken."""
        return agreement(frame[~frame["cell"].isin(self.fitted)])

    def _simulated(self, run: Any, cell: str, experiment: Experiment, host: Seconds) -> Simulation:
        machine, told = heldout.machine_of(experiment, self.folder), run.metric("step")
        ran = told[told["cell"] == cell]["value"].unique()
        warm, steps = (int(ran.min()), len(ran)) if len(ran) else (WARM, STEPS)
        return simulate(experiment, dataclasses.replace(machine, host=host), steps=steps, warm=warm)

    def _hosts_of(self, run: Any) -> dict[str, Seconds]:
        if run.path in self._hosts:
            return self._hosts[run.path]
        found: dict[str, list[Seconds]] = {}
        for cell in heldout.cells_of(run.path) if self.host_of else ():
            if cell.experiment.system != self.host_of:
                continue
            with contextlib.suppress(UserError):  # what nothing can be said of
                found.setdefault(heldout.shape_of(cell.experiment), []).append(heldout.fitted(cell, self.folder))
                self.fitted.add(cell.experiment.digest)
        self._hosts[run.path] = {same: merged(several) for same, several in found.items()}
        return self._hosts[run.path]


def _experiments(run: Any) -> dict[str, Experiment]:
    return {cell: Experiment.model_validate(data) for cell, data in run.experiments.items()}


__all__ = ["Simulator"]
