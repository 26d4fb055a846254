"""Studies: named simulations that a method's folder brings, with what they found as tables.

A study is found as a system is: ``methods/<name>/studies.py`` holds ``STUDIES``, a mapping from names to ``Study``. The
harness knows none by name. Every row of every table says what evidence it is; a simulated value and the reported one
beside it are two rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness import outputs
from harness.errors import bad, unknown
from harness.registry import NAME, brought
from harness.specs import Model

REPORTED = Path(__file__).resolve().parents[1] / "results" / "reported"
LEVELS = ("measured", "simulated", "reported")
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """What a study found. ``tables`` are for reading, ``raw`` is what they were made from, ``notes`` say what to know
    before believing them (assumptions, what was left out, what stands out)."""

    tables: Mapping[str, pd.DataFrame]
    notes: tuple[str, ...] = ()
    raw: Mapping[str, pd.DataFrame] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, table in {**self.tables, **self.raw}.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"table {name!r}: must be called by letters, digits, '.', '_' and '-'")
            if "evidence" not in table or not set(table["evidence"]) <= set(LEVELS):
                raise ValueError(f"table {name!r}: every row must say its evidence, one of {', '.join(LEVELS)}")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """A table row by row; what is missing is None."""
        table = self.tables[name]
        return table.astype(object).where(table.notna(), None).to_dict("records")  # type: ignore[return-value]

    def write(self, folder: Path) -> list[Path]:
        """Tables as CSV, raw ones as Parquet; returns the files."""
        paths = [folder / f"{name}.csv" for name in self.tables] + [folder / f"{name}.parquet" for name in self.raw]
        for path, table in zip(paths, [*self.tables.values(), *self.raw.values()], strict=True):
            with outputs.whole(path, list_it=True) as file:
                if path.suffix == ".csv":
                    table.to_csv(file, index=False)
                else:
                    table.to_parquet(file, index=False)
        return paths


@dataclasses.dataclass(frozen=True)
class Study:
    """``run`` is told whom to tell about progress."""

    title: str
    run: Callable[[Progress], Findings]


@functools.cache
def studies() -> dict[str, Study]:
    """Every study by name, sorted."""
    return brought("studies", "STUDIES", Study)


def study(name: str) -> Study:
    """The study called ``name``; ``UserError`` with the nearest known name if there is none."""
    known = studies()
    if name not in known:
        raise unknown("study", name, known, "studies")
    return known[name]


def left_out(models: Iterable[Model], what: str) -> tuple[str, ...]:
    """A note for each of ``models`` with shared experts: that the study keeps it, and ``what`` it leaves out."""
    return tuple(
        f"Of {model.name}, shared experts ({model.num_shared_experts} in each layer) have no part in this: {what}."
        for model in models
        if model.num_shared_experts
    )


def reported(paper: str, item: str = "") -> pd.DataFrame:
    """What a paper prints (of ``item`` alone, if named), one value a row, from ``results/reported`` of the repository;
    ``UserError`` if it is missing."""
    path = REPORTED / f"{paper}.csv"
    if not path.is_file():
        raise bad("reported values", str(path), "are not there; run from a clone of the repository")
    rows = pd.read_csv(path, keep_default_na=False)
    return rows[rows["item"] == item] if item else rows
