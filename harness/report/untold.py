"""Cells that were to run and of which no row tells: their run was ended, or their sweep's job has not come to them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from harness.bench.store import BLANK, COLUMNS, identity
from harness.specs import Experiment

NOT_RUN = "not run"
_WHY = "no row was stored: the run ended before it, or is still at it"
Launched = tuple[str, int]  # cell, launch


def rows(run_dir: Path, stored: pd.DataFrame, records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row of metric ``status`` for every cell and launch that a record or a sweep names and ``stored`` lacks."""
    known = set(zip(stored["cell"], stored["launch"].astype(int), strict=True))
    found: dict[Launched, dict[str, Any]] = {}
    for key, experiment, facts in (*_recorded(records), *_swept(run_dir)):  # a sweep knows more of a cell
        if key not in known:
            found[key] = {**found.get(key, {}), **_identity(key, experiment), **facts}
    of_cluster = stored.drop_duplicates("cluster").set_index("cluster")
    for each in found.values():
        here = each["cluster"] in of_cluster.index
        for column in ("evidence", "network"):
            if not each.get(column):
                each[column] = of_cluster.loc[each["cluster"], column] if here else "unknown"
    blank = {**BLANK, "run": run_dir.name, "metric": "status", "value": float("nan")}
    blank |= {"rep": -1, "rank": -1, "schema_version": 0}
    return pd.DataFrame([{**blank, **each} for each in found.values()], columns=list(COLUMNS))


def swept(run_dir: Path) -> dict[Launched, dict[str, Any]]:
    """Experiment, as plain data, of every cell and launch of the sweep that fills the run; none where there is none."""
    from harness.sweep.folder import SweepFolder

    folder = SweepFolder(run_dir)
    if not (folder.path / "sweep.json").exists():
        return {}
    return _of_jobs(run_dir.resolve(), len(folder.tasks()))


@functools.lru_cache(maxsize=4)
def _of_jobs(run_dir: Path, num_jobs: int) -> dict[Launched, dict[str, Any]]:
    """A job's file never changes."""
    from harness.sweep.folder import SweepFolder

    folder = SweepFolder(run_dir)
    return {
        (Experiment.model_validate(data).digest, launch): data
        for index in range(num_jobs)
        for launch, race in folder.job(index)["tasks"]
        for data in race.get("experiments", ())
    }


def _recorded(
    records: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[Launched, Mapping[str, Any], dict[str, str]]]:
    """Of every launch that began."""
    for record in records.values():
        network = record.get("network")
        network = network if isinstance(network, Mapping) else {}
        facts = {"evidence": str(record.get("evidence") or ""), "network": str(network.get("network") or "")}
        told = {"status": NOT_RUN, "reason": _WHY} | ({"wire": str(network["wire"])} if "wire" in network else {})
        cells = record.get("experiments")
        for cell, experiment in cells.items() if "launch" in record and isinstance(cells, Mapping) else ():
            yield (str(cell), int(record["launch"])), experiment, facts | told


def _swept(run_dir: Path) -> Iterator[tuple[Launched, Mapping[str, Any], dict[str, str]]]:
    """By the state of the jobs."""
    from harness.sweep.states import Sweep

    if not (experiments := swept(run_dir)):
        return
    for cell in Sweep.attach(run_dir).cells().to_dict("records"):
        key = (cell["cell"], cell["launch"])
        log = f"; log: {cell['log']}" if cell["log"] else ""
        if key in experiments:
            yield key, experiments[key], {"status": cell["state"], "reason": (cell["reason"] or "no word of it") + log}


def _identity(key: Launched, data: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of the store that an experiment decides."""
    cell, launch = key
    try:
        experiment = Experiment.model_validate(data)
    except ValidationError:  # of another version of moebench
        unknown = dict.fromkeys(("system", "phase", "model", "cluster", "workload", "dtype", "wire"), "unknown")
        return {"cell": cell, "launch": launch, "race": cell, **unknown, "compute": "unknown"}
    return {"cell": cell, "launch": launch, **identity(experiment)}
