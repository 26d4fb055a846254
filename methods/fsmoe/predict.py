"""What the simulator says of executed layers, from the profiler's calibration alone: the same plans, priced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness import ledger
from harness.case import case_of
from harness.ledger import Calibration
from harness.plan.agreement import agreement
from harness.plan.cost import Hold
from harness.plan.graph import COMPUTE, Plan, Timeline, Work
from harness.plan.machine import Machine
from harness.plan.passage import Dense
from harness.plan.simulate import simulate
from harness.registry import system
from harness.specs import Experiment
from methods.fsmoe.cut import choose_cut, known_costs, padded_sizes
from methods.fsmoe.schedule import Priced
from methods.fsmoe.step import backward_layer, forward_layer, reduction


def timelines(experiment: Experiment, calibration: Calibration) -> dict[str, Timeline]:
    """The forward and backward plans of phase ``layer`` of one of FSMoE's systems, simulated."""
    policy = system(experiment.system).policy  # type: ignore[attr-defined]
    case = case_of(experiment)
    costs, least_bytes = known_costs(case, calibration)
    cut = choose_cut(case, policy, costs, least_bytes)
    sizes = padded_sizes(case, cut)

    def dense(seconds: float) -> list[Dense]:
        return [Dense("attention", COMPUTE, Work(Hold(seconds)))] if seconds else []

    forward, backward = Plan(), Plan()
    forward_layer(forward, policy, Priced(sizes.forward, cut.degree_forward), dense(sizes.dense_s[0]))
    slices = [
        reduction(num_bytes, count) if num_bytes else None
        for num_bytes, count in zip(cut.reduced_bytes, cut.messages, strict=True)
    ]
    walk = Priced(sizes.backward, cut.degree_backward)
    backward_layer(
        backward,
        policy,
        walk,
        dense(sizes.dense_s[1]),
        in_moe=slices[0],
        beside_dense=slices[1],
        after_layer=slices[2],
    )
    machine = Machine.profiled(costs, calibration, "stand-in" if case.stand_in else "real")
    return {"forward": simulate(forward, machine), "backward": simulate(backward, machine)}


def predict_s(experiment: Experiment, calibration: Calibration) -> dict[str, float]:
    """Seconds of a layer's forward and backward, and of both (``total``)."""
    found = {direction: float(timeline.total_s) for direction, timeline in timelines(experiment, calibration).items()}
    return {**found, "total": sum(found.values())}


def predictions(experiments: Mapping[str, Experiment], calibration: Calibration) -> pd.DataFrame:
    """One row a cell (its digest) and direction: ``predicted_s``."""
    rows = [
        {"cell": cell, "direction": direction, "predicted_s": seconds}
        for cell, experiment in experiments.items()
        for direction, seconds in predict_s(experiment, calibration).items()
    ]
    return pd.DataFrame(rows, columns=["cell", "direction", "predicted_s"])


class Simulator:
    """For the report of a run (``harness.report.own_run``): the newest calibration of its cluster, and nothing else of
    it. ``folder``: the ledger's."""

    agreement = staticmethod(agreement)

    def __init__(self, folder: Path = ledger.LEDGER):
        self.folder = folder

    def predictions(self, run: Any) -> pd.DataFrame:
        """Of every cell of one of FSMoE's systems in phase ``layer``."""
        experiments = experiments_of(run.experiments)
        return predictions(experiments, self._calibration(next(iter(experiments.values()))))

    def timelines(self, run: Any, cell: str) -> dict[str, Timeline]:
        experiment = experiments_of(run.experiments)[cell]
        return timelines(experiment, self._calibration(experiment))

    def _calibration(self, experiment: Experiment) -> Calibration:
        return ledger.profiled(experiment.cluster, self.folder)


def experiments_of(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Experiment]:
    """Resolved experiments of a stored run by cell, FSMoE's systems alone."""
    found = {cell: Experiment.model_validate(data) for cell, data in records.items()}
    return {cell: each for cell, each in found.items() if each.system.startswith("fsmoe") and each.phase == "layer"}
