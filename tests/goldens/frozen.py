"""Frozen numbers: tables of every study, and what is predicted of the emulated suites, one CSV a table under ``data``.

A change of a number is then a line in a diff. ``python -m tests.goldens`` writes them anew and says which have changed.
Times that were measured here are left out. Of a table with more than ``MOST_ROWS`` rows some are kept, evenly spaced,
and the means of all.
"""

from __future__ import annotations

import contextlib
import datetime
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from harness import ledger
from harness.bench import physics, stepwise
from harness.bench.suite import load
from harness.case import cases_of
from harness.registry import system
from harness.report import predicted
from harness.studies import study
from harness.topology import Topology

DATA = Path(__file__).parent / "data"
MOST_ROWS = 200
RELATIVE, OF_LARGEST = 1e-9, 1e-12  # what may differ: of the number itself, of the largest in its column
#: calibrations of this day and before predict; later ones of this machine say other things
CALIBRATED = datetime.datetime.fromisoformat("2026-11-24T00:00:00+00:00")
SIMULATORS = {"fsmoe-emulated": predicted, "hiermoe-emulated": predicted, "hecate-emulated": predicted}
SUITES = (*SIMULATORS, "moetuner-emulated")
#: columns that hold times of this machine
MEASURED = ("solve_s", "seconds", "time_s", "placing_s", "simulated_in_s")
Tables = dict[str, pd.DataFrame]


def of_study(name: str) -> Tables:
    """By ``study.table``."""
    found = study(name).run(lambda text: None)
    every = {**found.tables, **{f"raw-{key}": table for key, table in found.raw.items()}}
    tables = {f"{name}.{key}": _simulated(table) for key, table in every.items()}
    return {key: table for key, table in tables.items() if len(table)}


def of_suite(name: str) -> Tables:
    """Predicted seconds of every cell, and the least that each race allows, of ``flat``'s bytes and of its FLOPs."""
    suite, tables, root = load(name), {}, Path.cwd()
    experiments = {each.digest: each for each in suite.experiments}
    if name in SIMULATORS:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # systems plan by what is there, too
            _calibrations(root / ledger.LEDGER, ledger.LEDGER)
            run = SimpleNamespace(experiments={cell: each.model_dump() for cell, each in experiments.items()})
            run.path, told = Path(folder), _steps_of(suite)
            run.metric = lambda name, told=told: told
            found = SIMULATORS[name].Simulator(ledger.LEDGER).predictions(run)
        labels = [_label(experiments[cell]) for cell in found["cell"]]
        tables[f"{name}.predictions"] = found.assign(cell=labels)
    rows = []
    for race in suite.races:
        if "flat" not in {each.system for each in race.experiments}:
            continue
        flat = next(each for each in race.experiments if each.system == "flat")
        budgets = physics.budgets(flat, system("flat"), cases_of(flat))
        for direction, budget in budgets.items():
            ports = dict(zip((f"port{i}_bytes" for i in range(9)), budget.port_bytes, strict=False))
            limits = {"flops": budget.flops, "least_s": budget.speed_of_light_s}
            rows.append({"race": _label(flat), "direction": direction, **ports, **limits})
    if rows:
        tables[f"{name}.bounds"] = pd.DataFrame(rows)
    return tables


def _steps_of(suite) -> pd.DataFrame:
    """As rows of a run tell them: the timed steps of every cell whose routing drifts."""
    found = [
        {"cell": each.digest, "value": race.warmup + rep}
        for race in suite.races
        for each in race.experiments
        if stepwise.drifts(each)
        for rep in range(race.repeats)
    ]
    return pd.DataFrame(found, columns=["cell", "value"])


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """As it is written."""
    table = table.astype(dict.fromkeys(table.columns[table.dtypes == "category"], object)).reset_index(drop=True)
    numbers = table.select_dtypes("number")
    if len(table) > MOST_ROWS:
        means = pd.DataFrame([numbers.mean()], columns=table.columns)
        rows = np.linspace(0, len(table) - 1, MOST_ROWS).astype(int)
        table = pd.concat([table.iloc[rows], means.astype(object)], ignore_index=True)
    for column in numbers:
        table[column] = [f"{value:.12g}" if pd.notna(value) else "" for value in table[column].astype(float)]
    return table.astype(object).where(table.notna(), "").astype(str)


def changes(name: str, table: pd.DataFrame) -> list[str]:
    """How ``table`` differs from what is frozen of it, a line for each column; none: it does not."""
    path, new = DATA / f"{name}.csv", kept(table)
    if not path.is_file():
        return [f"{name}: is new, {len(new)} rows"]
    old = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(old) != list(new):
        return [f"{name}: columns {', '.join(sorted(set(old) ^ set(new))) or 'in another order'}"]
    if len(old) != len(new):
        return [f"{name}: {len(old)} rows, now {len(new)}"]
    return [line for column in old for line in _changed(f"{name}: {column}", old[column], new[column])]


def _changed(where: str, old: pd.Series, new: pd.Series) -> Iterator[str]:
    before, after = (pd.to_numeric(each, errors="coerce").to_numpy(float) for each in (old, new))
    largest = np.nanmax(np.abs(before), initial=0.0, where=np.isfinite(before))
    near = np.isclose(after, before, rtol=RELATIVE, atol=OF_LARGEST * largest)
    differ = np.flatnonzero(~near & (old != new).to_numpy())
    if len(differ):
        with np.errstate(divide="ignore", invalid="ignore"):
            worst = differ[np.nanargmax(np.append(np.abs(after / before - 1)[differ], 0.0)) % len(differ)]
        yield f"{where}: {len(differ)} of {len(old)}, in row {worst + 1} {old[worst]!r} is now {new[worst]!r}"


def write(name: str, table: pd.DataFrame) -> None:
    DATA.mkdir(exist_ok=True)
    kept(table).to_csv(DATA / f"{name}.csv", index=False, lineterminator="\n")


def _simulated(table: pd.DataFrame) -> pd.DataFrame:
    rows = table[table["evidence"] != "measured"]
    return rows.drop(columns=[column for column in rows if column in MEASURED])


def _calibrations(every: Path, folder: Path) -> None:
    """Those of the repository that are not younger than what is frozen."""
    for path in ledger.files(every):
        for each in ledger.history(path.stem, every):
            if datetime.datetime.fromisoformat(each.date) < CALIBRATED:
                ledger.record(each, folder)


def _label(experiment) -> str:
    options = ",".join(f"{key}={value}" for key, value in sorted(experiment.options.items()))
    shape = "x".join(map(str, Topology(experiment.cluster.shape).shape))
    parts = (experiment.model.name, experiment.cluster.name, shape, experiment.workload.name, experiment.phase)
    return " ".join((*parts, experiment.system, options)).strip()
