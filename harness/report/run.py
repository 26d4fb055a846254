"""A stored run as the report reads it: tidy rows with a label per system, the launches' records, the damage."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness import options
from harness.bench.store import Store
from harness.errors import UserError, bad
from harness.report import untold
from harness.report.keep import keep

#: What a race, its cluster and its evidence share; one panel or table of the report is one such group.
GROUP = ["phase", "cluster", "model", "dtype", "wire", "evidence", "network", "compute"]
TIMED = ("ok", "cpu_bound")  # statuses whose times count; cpu_bound ones carry a mark everywhere
WRONG = ("nonconforming", "unphysical")  # in one launch: then no time of the cell counts
USUAL = ("megatron", "flat")  # baseline and control, where they ran


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run. ``rows``: the store's columns plus ``label``, the system with the options that set it apart; a cell that
    was to run and of which nothing is stored has a row that says so.

    ``baseline``, ``control``: labels, or systems, that ratios refer to.
    """

    path: Path
    rows: pd.DataFrame
    records: dict[str, dict[str, Any]]
    damaged: tuple[str, ...]
    baseline: str
    control: str

    @property
    def name(self) -> str:
        return self.path.name

    @functools.cached_property
    def labels(self) -> list[str]:
        """Labels in the order of every figure and table: baseline, control, then by name."""
        system_of = dict(zip(self.rows["label"], self.rows["system"], strict=True))

        def place(label: str) -> tuple[list[bool], str]:
            return [reference not in (label, system_of[label]) for reference in (self.baseline, self.control)], label

        return sorted(system_of, key=place)

    @functools.cached_property
    def experiments(self) -> dict[str, dict[str, Any]]:
        """Resolved experiment of every cell, from the records and the sweep."""
        return {cell: data for (cell, _), data in untold.swept(self.path).items()} | merged(self.records, "experiments")

    @functools.cached_property
    def certificates(self) -> dict[str, dict[str, Any]]:
        """Routing certificate of every race, from the records."""
        return merged(self.records, "certificates")

    def metric(self, name: str) -> pd.DataFrame:
        """Rows of one metric."""
        return self.rows[self.rows["metric"] == name]

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """Keep ``frame`` as ``report/tables/NAME.csv`` (and .tex) beside the run."""
        keep(self.path / "report" / "tables", name, frame)


def load(run_dir: Path | str, *, baseline: str = "", control: str = "", usual: tuple[str, str] = USUAL) -> Run:
    """Read the run in ``run_dir``; ``UserError`` if there is none, or nothing in it, with the known runs.

    ``baseline``, ``control``: labels, or systems; ``UserError`` that names those of the run if it has no such one. By
    default those of ``usual`` that have a time; as baseline else the control, or what has times of the most cells.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise bad("run", str(run_dir), f"no such folder; {known_runs(path.parent)}")
    store = Store(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damage is reported in its own section, below
        rows, records = store.read(damaged="skip"), store.records()
    damaged = list(store.damaged())
    damaged += [
        f"{file}: cannot be read as JSON: what ran where is unknown for its launch"
        for file in sorted(path.glob("record-*.json"))
        if file.stem.removeprefix("record-") not in records
    ]
    if len(more := untold.rows(path, rows, records)):
        rows = pd.concat([rows, more.astype(rows.dtypes)], ignore_index=True) if len(rows) else more
    if rows.empty and not damaged:
        raise bad(
            "run",
            str(run_dir),
            f"holds no rows; fill it with `moebench run`, or choose another; {known_runs(path.parent)}",
        )
    experiments = {cell: data for (cell, _), data in untold.swept(path).items()} | merged(records, "experiments")
    rows = rows.assign(label=_labels(rows, experiments))
    cells = rows.drop_duplicates("cell")
    baseline, control = _one_name(baseline), _one_name(control)
    for field, given in (("baseline", baseline), ("control", control)):
        if given and not _refers(cells, given):
            raise bad(field, given, _no_such(cells, given, path.name))
    timed = cells[cells["cell"].isin(rows[(rows["metric"] == "time_s") & rows["status"].isin(TIMED)]["cell"])]
    if not baseline:
        most = timed["label"].value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable").index
        baseline = next((name for name in (*usual, *most) if _refers(timed, name)), usual[0])
    control = control or (usual[1] if _refers(timed, usual[1]) else baseline)
    return Run(path, rows, records, tuple(damaged), baseline, control)


def _one_name(reference: str) -> str:
    """Of a recipe whose parts are given in any order."""
    if "+" not in reference:
        return reference
    from harness import registry  # imports torch, which nothing else here needs

    try:
        return registry.system(reference).name
    except UserError:
        return reference  # a label


def _refers(cells: pd.DataFrame, name: str) -> bool:
    """Whether ``name`` is one cell of some race: by its label, or as the only one of a system."""
    counts = cells[cells["system"] == name].groupby("race").size()
    return name in set(cells["label"]) or bool((counts == 1).any())


def _no_such(cells: pd.DataFrame, name: str, run: str) -> str:
    """Why it does not, and what does."""
    several = sorted(set(cells[cells["system"] == name]["label"]))
    if several:
        return f"is several in {run}; name one of {', '.join(several)}"
    return f"is no system of {run}; there are {', '.join(sorted(set(cells['label']))) or 'none'}"


def known_runs(folder: Path) -> str:
    """The runs in ``folder`` as words of an error message."""
    found = sorted(path.parent.name for path in folder.glob("*/rows-*.parquet")) if folder.is_dir() else []
    names = list(dict.fromkeys(found))
    return (
        f"known runs: {', '.join(names)}" if names else f"no run is stored in {folder} yet (`moebench run` makes one)"
    )


def merged(records: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """The mapping ``key`` of all records as one."""
    found: dict[str, dict[str, Any]] = {}
    for record in records.values():
        value = record.get(key)
        if isinstance(value, Mapping):
            found.update({str(k): dict(v) for k, v in value.items() if isinstance(v, Mapping)})
    return found


def _labels(rows: pd.DataFrame, experiments: Mapping[str, Mapping[str, Any]]) -> pd.Series:
    """Label of every row: the system, its options, its layout, and its capacity factor where it drops."""

    def label(system: str, cell: str) -> str:
        experiment = experiments.get(cell, {})
        model = experiment.get("model")
        capacity = model.get("capacity_factor") if isinstance(model, Mapping) else None
        return options.label(system, dict(experiment.get("options") or {}), capacity, experiment.get("layout"))

    pairs = {pair: label(*pair) for pair in set(zip(rows["system"], rows["cell"], strict=True))}
    return pd.Series([pairs[p] for p in zip(rows["system"], rows["cell"], strict=True)], index=rows.index, dtype=str)


def in_order(values: Iterable[str], first: Iterable[str]) -> list[str]:
    """Distinct ``values``, those of ``first`` in its order, then the others sorted."""
    found = set(values)
    head = [x for x in first if x in found]
    return [*head, *sorted(found - set(head))]
