"""What the time model says of executed exchanges, from the profiler's calibration alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness import ledger
from harness.case import case_of
from harness.errors import bad
from harness.plan.agreement import agreement
from harness.plan.graph import Timeline
from harness.registry import system
from harness.specs import DTYPE_BYTES, Cluster, Experiment
from methods.hiermoe.counts import count
from methods.hiermoe.model import TimeModel, calibrated_costs, choose


def predict_s(experiment: Experiment, costs: Cluster) -> dict[str, float] | None:
    """Seconds of an exchange's forward and backward, and of both (``total``); None for systems that the model does not
    know. A dispatch and a combine each way; the metadata is left out."""
    known: Any = system(experiment.system)
    case = case_of(experiment)
    counts = count(case.routing, case.placement.owner, case.topology)
    model, row_bytes = TimeModel(costs), case.model.hidden * DTYPE_BYTES[case.dtype]
    if experiment.system == "flat":
        one_way = float(model.times(counts, row_bytes, deduplicated=False, exact=True)[0])
    elif hasattr(known, "wire"):
        wire, dimension = known.wire(case), known.dimension(case)
        times = model.times(
            counts, row_bytes, deduplicated=wire.deduplicate, exact=not wire.padded, chunks=wire.num_chunks
        )
        one_way = float(times[(dimension if isinstance(dimension, int) else choose(times)) - 1])
    else:
        return None
    return {"forward": 2 * one_way, "backward": 2 * one_way, "total": 4 * one_way}


class Simulator:
    """For the report of a run (``harness.report.own_run``): the newest calibrations of its clusters, and nothing else
    of them. ``folder``: the ledger's."""

    agreement = staticmethod(agreement)

    def __init__(self, folder: Path = ledger.LEDGER):
        self.folder = folder

    def predictions(self, run: Any) -> pd.DataFrame:
        """Of every cell in phase ``exchange`` whose system the model knows."""
        rows = []
        for cell, data in run.experiments.items():
            experiment = Experiment.model_validate(data)
            if experiment.phase != "exchange":
                continue
            for direction, seconds in (predict_s(experiment, self._costs(experiment.cluster)) or {}).items():
                rows.append({"cell": cell, "direction": direction, "predicted_s": seconds})
        return pd.DataFrame(rows, columns=["cell", "direction", "predicted_s"])

    def timelines(self, run: Any, cell: str) -> Mapping[str, Timeline]:
        """None: the model has no tasks."""
        return {}

    def _costs(self, cluster: Cluster) -> Cluster:
        found = ledger.latest(cluster, self.folder)
        costs = None if found is None else calibrated_costs(found)
        if costs is None:
            raise bad("cluster", cluster.name, f"has no costs of all stages; moebench profile {cluster.name}")
        return costs
