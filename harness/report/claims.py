"""A paper's claims as objects: what it says, what was printed, which experiments test it, and what they found.

A claim is bound to rows of a simulated study, to stored runs, or to the ledger of calibrations; each binding is judged
on its own, by criteria that are written down with the claim, so that no verdict mixes kinds of evidence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from harness import ledger
from harness.errors import bad
from harness.presets import parse_yaml
from harness.report import compare
from harness.report.run import load as load_run
from harness.specs import Name, Spec
from harness.studies import Findings, Study, reported, studies

RESULTS = Path(__file__).resolve().parents[2] / "results"
LEVELS = ("measured", "emulated", "simulated")

Outcome = Literal["reproduced", "partly", "not", "not attempted"]
Text = Annotated[str, Field(min_length=1)]
Where = dict[str, str | int | float | bool | tuple[str, ...]]  # a list: any of them


class Reported(Spec):
    """Names one row of ``results/reported/PAPER.csv``; a key that is not given may have any value there."""

    item: Text
    quantity: Text
    testbed: str | None = None
    model: str | None = None
    system: str | None = None


class Criterion(Spec):
    """What the values found must satisfy. ``within``: of the reported ones, in their unit. ``below``, ``above``: a
    number, or the reported value. Where a value has an interval, all of it must lie below or above."""

    within: float | None = Field(default=None, gt=0)
    below: float | Literal["reported"] | None = None
    above: float | Literal["reported"] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Criterion:
        if self.within is None and self.below is None and self.above is None:
            raise ValueError("needs within, below or above")
        return self

    @property
    def needs_reported(self) -> bool:
        return self.within is not None or "reported" in (self.below, self.above)

    def met(self, found: Value, reported: float) -> bool:
        limits = {side: reported if (v := getattr(self, side)) == "reported" else v for side in ("below", "above")}
        return (
            (self.within is None or abs(found.point - reported) <= self.within)
            and (limits["below"] is None or found.largest < limits["below"])
            and (limits["above"] is None or found.least > limits["above"])
        )


class Experiments(Spec):
    """The rows that test a claim, and how a value is made of them.

    One of ``study`` (with the name of its ``table``, a raw one or one for reading), ``run`` (a stored run) and
    ``ledger`` (the fits of every calibration). ``where`` selects rows. With ``over`` a value is a ratio of the column:
    rows that ``over`` changes ``where`` to, over those of ``where``, paired by the columns ``pair`` (a run pairs by
    launch and repetition itself). ``per``: the estimator is applied to each group, and the least and the largest of
    them are the values. ``differ``: a value is 1 where two columns differ, else 0.
    """

    study: str = ""
    table: str = ""
    run: str = ""
    ledger: bool = False
    where: Where = {}
    over: Where = {}
    pair: tuple[str, ...] = ()
    per: tuple[str, ...] = ()
    column: str = "time_s"
    differ: tuple[str, str] | None = None
    estimator: Literal["mean", "geometric_mean", "least", "largest", "range", "share", "count"] = "mean"

    @model_validator(mode="after")
    def _one_source(self) -> Experiments:
        if (bool(self.study) + bool(self.run) + self.ledger) != 1:
            raise ValueError("give one of study, run and ledger")
        if bool(self.study) != bool(self.table):
            raise ValueError("study and table go together")
        if self.study and self.over and not self.pair:
            raise ValueError("a ratio (over) of a study needs pair: the columns that say which rows belong together")
        if self.estimator == "range" and self.per:
            raise ValueError("per already gives a range; choose another estimator")
        if self.run and not ({"label"} == set(self.where) == set(self.over) and self.estimator == "geometric_mean"):
            raise ValueError("a run is judged by geometric_mean, with where and over of a label")
        return self

    @property
    def num_values(self) -> int:
        return 2 if self.per or self.estimator == "range" else 1

    @property
    def basis(self) -> str:
        """In words."""
        source = f"study {self.study}" if self.study else f"run {self.run}" if self.run else "ledger of calibrations"
        return ", ".join([source, *(f"{key} {_shown(value)}" for key, value in self.where.items())])

    @property
    def method(self) -> str:
        """The estimator in words."""
        each = f"{' ≠ '.join(self.differ)}" if self.differ else self.column
        if self.over:
            each = f"ratio over {', '.join(str(v) for v in self.over.values())}"
        words = f"{self.estimator.replace('_', ' ')} of {each}"
        return f"{words}, least and largest per {', '.join(self.per)}" if self.per else words


def _shown(value: object) -> str:
    return " or ".join(value) if isinstance(value, tuple) else str(value)


class Claim(Spec):
    """``statement`` in our words; ``source`` in the paper. ``reproduced`` and ``partly``: criteria, chosen from what
    the paper prints and never from a result. Without experiments ``not_attempted`` says why."""

    id: Name
    paper: Name
    statement: Text
    source: Text
    unit: str = "×"
    reported: tuple[Reported, ...] = ()
    experiments: tuple[Experiments, ...] = ()
    reproduced: Criterion | None = None
    partly: Criterion | None = None
    not_attempted: str = ""
    note: str = ""

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if bool(self.experiments) == bool(self.not_attempted):
            raise ValueError("a claim has experiments, or not_attempted says why; one of them")
        if self.experiments and self.reproduced is None:
            raise ValueError("has experiments but no criterion reproduced")
        for each in self.experiments:
            needed = any(c.needs_reported for c in (self.reproduced, self.partly) if c is not None)
            if len(self.reported) != each.num_values and (needed or self.reported):
                raise ValueError(f"{len(self.reported)} reported values for {each.num_values} found ({each.basis})")
        return self


@dataclasses.dataclass(frozen=True)
class Value:
    """One number with its 95 % interval (NaN: none, as a model without noise and a single sample have none)."""

    point: float
    low: float = math.nan
    high: float = math.nan

    @property
    def least(self) -> float:
        return self.point if math.isnan(self.low) else self.low

    @property
    def largest(self) -> float:
        return self.point if math.isnan(self.high) else self.high


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one binding of a claim. ``evidence`` and ``found`` are empty where nothing was attempted: ``why`` says why."""

    claim: Claim
    outcome: Outcome
    reported: tuple[float, ...]
    found: tuple[Value, ...] = ()
    evidence: str = ""
    num_rows: int = 0
    experiments: Experiments | None = None
    why: str = ""


class Sources:
    """Where rows come from: studies (each run once, when first asked for), runs and calibrations by folder."""

    def __init__(
        self,
        runs: Path = RESULTS / "runs",
        calibrations: Path = RESULTS / "ledger",
        known: Mapping[str, Callable[[], Findings]] | None = None,
    ):
        """``known``: studies by name; by default all that the methods bring."""
        self.runs, self.calibrations = Path(runs), Path(calibrations)
        self._known = known if known is not None else {name: _quietly(each) for name, each in studies().items()}
        self._found: dict[str, Findings] = {}

    def study(self, name: str) -> Findings | None:
        """None: there is no such study."""
        if name not in self._found and name in self._known:
            self._found[name] = self._known[name]()
        return self._found.get(name)


def _quietly(study: Study) -> Callable[[], Findings]:
    return lambda: study.run(lambda line: None)


def read(path: Path | str) -> list[Claim]:
    """Claims of ``path``, a YAML list; ``UserError`` names the claim and the field."""
    path = Path(path)
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise bad("claims file", str(path), f"cannot be read ({error}); give a readable YAML file") from None
    if not isinstance(data, list) or not data:
        raise bad(path.name, type(data).__name__, "must be a list of at least one claim")
    found: dict[str, Claim] = {}
    for place, each in enumerate(data):
        named = each.get("id") if isinstance(each, Mapping) else None
        claim: Claim = Claim.parse(each, f"{path.name}: {named or f'claim {place}'}")
        if claim.id in found:
            raise bad(f"{path.name}: {claim.id}", claim.id, "is there twice; give every claim an id of its own")
        found[claim.id] = claim
    return list(found.values())


def look_up(table: pd.DataFrame, keys: Reported, where: str = "reported") -> float:
    """The one value that ``keys`` name; ``UserError`` unless there is exactly one."""
    wanted = {key: value for key, value in keys.model_dump().items() if value is not None}
    rows = _select(table, wanted)
    if len(rows) != 1:
        raise bad(where, wanted, f"names {len(rows)} rows of the reported numbers; it must name one")
    return float(rows["value"].iloc[0])


def judge(claims: list[Claim], sources: Sources) -> list[Verdict]:
    """A verdict for every binding of every claim, in order."""
    tables = {paper: reported(paper) for paper in {claim.paper for claim in claims}}
    found = []
    for claim in claims:
        printed = tuple(look_up(tables[claim.paper], keys, f"claim {claim.id}.reported") for keys in claim.reported)
        if claim.not_attempted:
            found.append(Verdict(claim, "not attempted", printed, why=claim.not_attempted))
        found += [_judge(claim, each, printed, sources) for each in claim.experiments]
    return found


def _judge(claim: Claim, experiments: Experiments, printed: tuple[float, ...], sources: Sources) -> Verdict:
    try:
        values, evidence, num_rows = _values(claim, experiments, sources)
    except _NotAttempted as missing:
        return Verdict(claim, "not attempted", printed, experiments=experiments, why=str(missing))
    met = {
        name: criterion is not None
        and all(
            criterion.met(value, said) for value, said in zip(values, printed or [math.nan] * len(values), strict=True)
        )
        for name, criterion in (("reproduced", claim.reproduced), ("partly", claim.partly))
    }
    outcome: Outcome = "reproduced" if met["reproduced"] else "partly" if met["partly"] else "not"
    return Verdict(claim, outcome, printed, values, evidence, num_rows, experiments)


class _NotAttempted(Exception):
    """There is nothing to judge by; the message says why, and what would change that."""


def _values(claim: Claim, experiments: Experiments, sources: Sources) -> tuple[tuple[Value, ...], str, int]:
    """Values found, their evidence level, and the number of rows (or pairs) behind them."""
    if experiments.run:
        return _of_run(experiments, sources.runs)
    if experiments.ledger:
        table = calibrations(sources.calibrations)
        if table.empty:
            raise _NotAttempted("the ledger holds no calibration; moebench profile CLUSTER makes one")
    else:
        found = sources.study(experiments.study)
        if found is None:
            raise _NotAttempted(f"there is no study {experiments.study} yet")
        tables = {**found.tables, **found.raw}
        if experiments.table not in tables:
            raise bad(
                f"claim {claim.id}.experiments.table", experiments.table, f"unknown; known are {', '.join(tables)}"
            )
        table = tables[experiments.table]
    where = f"claim {claim.id}.experiments"
    rows = _select(table, experiments.where, where)
    if experiments.ledger and rows.empty:
        raise _NotAttempted(f"no calibration has {', '.join(f'{k} {v}' for k, v in experiments.where.items())}")
    if rows.empty:
        raise bad(f"{where}.where", experiments.where, f"selects no row of {experiments.study}")
    if experiments.over:
        base = _select(table, {**experiments.where, **experiments.over}, where)
        pairs = _needed(rows, [*experiments.pair, experiments.column], where).merge(
            base[[*experiments.pair, experiments.column, "evidence"]],
            on=list(experiments.pair),
            suffixes=("", "_over"),
            validate="one_to_one",
        )
        if len(pairs) != len(rows):
            raise bad(f"{where}.over", experiments.over, f"has a row for {len(pairs)} of {len(rows)} rows")
        levels = {*pairs["evidence"], *pairs["evidence_over"]}
        rows, values = pairs, pairs[f"{experiments.column}_over"] / pairs[experiments.column]
    elif experiments.differ:
        one, other = (_needed(rows, [column], where)[column] for column in experiments.differ)
        values, levels = (one != other).astype(float), set(rows["evidence"])
    else:
        values, levels = (
            _needed(rows, [experiments.column], where)[experiments.column].astype(float),
            set(rows["evidence"]),
        )
    if len(levels) != 1 or not levels <= set(LEVELS):
        raise bad(f"{where}.where", experiments.where, f"selects evidence {sorted(levels)}; a verdict has one level")
    groups = (
        [part for _, part in values.groupby([rows[key] for key in experiments.per])] if experiments.per else [values]
    )
    points = [point for group in groups for point in _estimate(group, experiments.estimator)]
    if experiments.per:
        points = [min(points), max(points)]
    return tuple(Value(point) for point in points), levels.pop(), len(rows)


def _estimate(values: pd.Series, estimator: str) -> list[float]:
    if estimator in ("mean", "share"):
        return [float(values.mean())]
    if estimator == "geometric_mean":
        return [float(np.exp(np.log(values).mean()))]
    if estimator == "count":
        return [float(values.sum())]
    ends = {"least": float(values.min()), "largest": float(values.max())}
    return [*ends.values()] if estimator == "range" else [ends[estimator]]


def _of_run(experiments: Experiments, runs: Path) -> tuple[tuple[Value, ...], str, int]:
    path = runs / experiments.run
    if not any(path.glob("rows-*.parquet")):
        raise _NotAttempted(f"the run is not there; moebench run --suite {experiments.run} makes it")
    run = load_run(path)
    label, reference = str(experiments.where["label"]), str(experiments.over["label"])
    pooled = compare.pooled_speedup(run, label, reference)
    if pooled is None:
        raise _NotAttempted(f"the run has no time of {label} beside one of {reference}")
    if len(pooled.evidence) != 1:
        raise bad(
            f"run {experiments.run}", sorted(pooled.evidence), "holds more than one evidence level; a verdict has one"
        )
    estimate = pooled.estimate
    return (Value(estimate.point, estimate.low, estimate.high),), pooled.evidence[0], pooled.num_races


def calibrations(folder: Path) -> pd.DataFrame:
    """Every fit in the ledger, refused ones too, one a row: cluster, date, evidence, and ``ledger.fit_rows``."""
    found = [
        {"cluster": path.stem, "date": each.date, "evidence": each.evidence, "duration_s": each.duration_s, **row}
        for path in sorted(folder.glob("*.json"))
        for each in ledger.history(path.stem, folder)
        for row in ledger.fit_rows(each)
    ]
    return pd.DataFrame(found).rename(columns={"held-out error": "held_out_error"})


def _select(table: pd.DataFrame, where: Where | dict[str, Any], name: str = "where") -> pd.DataFrame:
    _needed(table, list(where), name)
    chosen = pd.Series(True, index=table.index)
    for column, value in where.items():
        chosen &= table[column].isin(value) if isinstance(value, tuple) else table[column] == value
    return table[chosen]


def _needed(table: pd.DataFrame, columns: list[str], name: str) -> pd.DataFrame:
    for column in columns:
        if column not in table:
            raise bad(name, column, f"is no column; there are {', '.join(map(str, table.columns))}")
    return table


__all__ = [
    "Claim",
    "Experiments",
    "Reported",
    "Sources",
    "Value",
    "Verdict",
    "calibrations",
    "judge",
    "look_up",
    "read",
]
