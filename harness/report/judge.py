"""What the judge of time says of the cells of a run, for the report of it (``harness.report.own_run``): from the newest
calibrations of its clusters, what the ledger knows of the processor's part in such steps, and nothing else of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness import heldout, ledger
from harness.errors import Unplanned
from harness.plan.agreement import agreement
from harness.plan.graph import Timeline
from harness.report.run import Run
from harness.simulation import Simulation, simulate
from harness.specs import Experiment


class Simulator:
    """``folder``: the ledger's."""

    agreement = staticmethod(agreement)

    def __init__(self, folder: Path = ledger.LEDGER):
        self.folder = folder

    def predictions(self, run: Run) -> pd.DataFrame:
        """Rows of cell, direction and predicted_s; none of systems whose bytes cannot be planned."""
        rows: list[dict[str, Any]] = []
        for cell in run.experiments:
            try:
                samples = self._simulated(run, cell).samples
            except Unplanned:
                continue
            rows += [
                {"cell": cell, "direction": direction, "predicted_s": sum(seconds) / len(seconds)}
                for direction, seconds in samples.items()
            ]
        return pd.DataFrame(rows, columns=["cell", "direction", "predicted_s"])

    def timelines(self, run: Run, cell: str) -> Mapping[str, Timeline]:
        return self._simulated(run, cell).timelines

    def _simulated(self, run: Run, cell: str) -> Simulation:
        experiment = Experiment.model_validate(run.experiments[cell])
        machine, _ = heldout.known(experiment, heldout.machine_of(experiment, self.folder), self.folder)
        return simulate(experiment, machine)


__all__ = ["Simulator"]
