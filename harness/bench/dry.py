"""What a run would do, told without a rank: every cell, whether its system takes it, and about how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness import memory, registry
from harness.bench import race
from harness.bench.run import expected_s
from harness.bench.suite import Suite
from harness.case import case_of, no_layout, system_of
from harness.errors import OF_A_SYSTEM, UserError, unplannable
from harness.launch import gpus
from harness.specs import Cluster, Experiment


def rows(suite: Suite, launches: int | None = None, here: bool = True) -> Iterator[dict[str, Any]]:
    """A row a cell, in the order of the file. ``launches`` instead of the file's. ``here``: it would run on this
    machine, with the devices that it has. Cells that cannot run come last."""
    clusters = {each.first.cluster.digest: each.first.cluster for each in suite.races}
    lacks = {digest: lacking(cluster) if here else None for digest, cluster in clusters.items()}
    for each in suite.races:
        for experiment in each.experiments:
            count = launches or each.launches
            seconds = 0.0
            try:
                refused = lacks[experiment.cluster.digest] or refusal(experiment)
                seconds = expected_s(experiment, each)
            except UserError as error:
                refused = str(error)
            except OF_A_SYSTEM as error:
                refused = unplannable(experiment.system, error)
            yield _row(experiment, count, 0.0 if refused else count * seconds, refused)
    for bad in suite.bad:
        yield _row(bad.experiment, launches or bad.launches, 0.0, bad.reason)


def _row(experiment: Experiment, launches: int, estimate_s: float, refused: str | None) -> dict[str, Any]:
    return {
        "phase": experiment.phase,
        "model": experiment.model.name,
        "workload": experiment.workload.name,
        "cluster": experiment.cluster.name,
        "ranks": experiment.cluster.num_ranks,
        "system": experiment.system,
        "options": dict(experiment.options),
        "capacity_factor": experiment.model.capacity_factor,
        "layout": experiment.layout.model_dump(mode="json"),
        "launches": launches,
        "estimate_s": estimate_s,
        "refused": refused,
    }


def lacking(cluster: Cluster) -> str | None:
    """Why the ranks of ``cluster`` cannot have their devices on this machine; None if they can."""
    try:
        gpus.suffice(cluster)
    except UserError as error:
        return str(error)
    return None


def refusal(experiment: Experiment, *, installed: bool = False) -> str | None:
    """Why its system will not race, as far as it is known beforehand; None if it may. ``installed``: whether a package
    is to be taken for installed here, and attention that is priced alone will do."""
    cluster, system = experiment.cluster, system_of(experiment)
    case = case_of(experiment, "cuda:0" if cluster.device_type == "cuda" else "cpu")
    missing = None if installed else registry.state(system)[1]
    lacks = no_layout(experiment) or (None if installed else experiment.lacks)
    refused = lacks or missing or race.no_stand_in(system, case) or system.refuse(case)
    return refused or memory.refusal(experiment, system, case)
