"""What the judge of time says of the cells of a run, on machines as they were profiled: the one simulator of all pages.

It knows the newest calibration of each cell's cluster, and nothing of the run but its experiments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness import ledger
from harness.errors import UserError
from harness.plan.agreement import agreement
from harness.plan.graph import Timeline
from harness.plan.machine import Machine
from harness.registry import systems
from harness.simulation import Simulation, simulate
from harness.specs import Experiment


class Simulator:
    """``folder``: the ledger's; ``phases``: those that are predicted."""

    agreement = staticmethod(agreement)

    def __init__(self, folder: Path = ledger.LEDGER, phases: tuple[str, ...] = ("layer",)):
        self.folder, self.phases = folder, phases

    def predictions(self, run: Any) -> pd.DataFrame:
        """Rows of cell, direction and predicted_s, of all native systems; ``UserError`` where none is predicted."""
        rows: list[dict[str, Any]] = []
        why: UserError | None = None
        for cell, experiment in self._experiments(run.experiments).items():
            try:
                found = self._simulated(experiment)
            except UserError as error:
                why = why or error
                continue
            for direction, seconds in found.samples.items():
                rows.append({"cell": cell, "direction": direction, "predicted_s": sum(seconds) / len(seconds)})
        if why is not None and not rows:
            raise why
        return pd.DataFrame(rows, columns=["cell", "direction", "predicted_s"])

    def timelines(self, run: Any, cell: str) -> dict[str, Timeline]:
        """Of rank 0."""
        found = self._simulated(Experiment.model_validate(run.experiments[cell])).timelines
        return {name: Timeline(each.plan, each.start_s[:, 0], each.end_s[:, 0]) for name, each in found.items()}

    def _simulated(self, experiment: Experiment) -> Simulation:
        calibration = ledger.profiled(experiment.cluster, self.folder)
        return simulate(experiment, Machine.profiled(experiment.cluster, calibration, experiment.compute))

    def _experiments(self, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Experiment]:
        every = {cell: Experiment.model_validate(data) for cell, data in records.items()}
        native = {name for name, system in systems().items() if system.kind == "native"}
        return {cell: each for cell, each in every.items() if each.phase in self.phases and each.system in native}


__all__ = ["Simulator"]
