"""A paper's claims as objects: what it says, what was printed, which experiments test it, and what they found.

A claim is bound to rows of a simulated study, to stored runs, or to the ledger of calibrations; each binding is judged
on its own, by criteria that are written down with the claim, so that no verdict mixes kinds of evidence.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from harness import ledger
from harness.bench import suite
from harness.errors import bad
from harness.options import label_of
from harness.report import compare
from harness.report.claim import Claim, Experiments, Reported, Value, Where, read
from harness.report.run import load as load_run
from harness.specs import Experiment
from harness.studies import Findings, Study, reported, studies

RESULTS = Path(__file__).resolve().parents[2] / "results"
LEVELS = ("measured", "emulated", "simulated")

Outcome = Literal["reproduced", "partly", "not", "not attempted"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one binding of a claim. ``evidence`` and ``found`` are empty where nothing was attempted: ``why`` says why.
    ``tested``: what was found of each condition, in words; ``lacking``: what of a run does not count, or lacks."""

    claim: Claim
    outcome: Outcome
    reported: tuple[float, ...]
    found: tuple[Value, ...] = ()
    evidence: str = ""
    num_rows: int = 0
    experiments: Experiments | None = None
    why: str = ""
    tested: tuple[str, ...] = ()
    lacking: str = ""


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
        hold, tested = _conditions(claim, evidence, sources)
    except _NotAttempted as missing:
        return Verdict(claim, "not attempted", printed, experiments=experiments, why=str(missing))
    met = {
        name: hold
        and criterion is not None
        and all(
            criterion.met(value, said) for value, said in zip(values, printed or [math.nan] * len(values), strict=True)
        )
        for name, criterion in (("reproduced", claim.reproduced), ("partly", claim.partly))
    }
    outcome: Outcome = "reproduced" if met["reproduced"] else "partly" if met["partly"] else "not"
    lacking = _lacking(experiments, sources.runs) if experiments.run else ""
    return Verdict(claim, outcome, printed, values, evidence, num_rows, experiments, "", tested, lacking)


def _conditions(claim: Claim, evidence: str, sources: Sources) -> tuple[bool, tuple[str, ...]]:
    """Whether all of them hold, and each in words."""
    hold, words = True, []
    for each in claim.conditions:
        if each.experiments is None or each.met is None:
            words.append(f"{each.word}: {each.by}")
            continue
        values, level, _ = _values(claim, each.experiments, sources)
        if level != evidence:
            raise bad(f"claim {claim.id}.conditions", each.word, f"is {level}, and the claim {evidence}; one level")
        met = all(each.met.met(value, math.nan) for value in values)
        hold &= met
        found = " to ".join(f"{value.point:.4g}" for value in values)
        words.append(f"{each.word}: {each.experiments.method} is {found}, {'' if met else 'not '}{each.met.words}")
    return hold, tuple(words)


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
    faster, reference = str(experiments.where["label"]), str(experiments.over["label"])
    pooled = compare.pooled_speedup(run, faster, reference)
    if pooled is None:
        raise _NotAttempted(f"the run has no time of {faster} beside one of {reference}")
    if len(pooled.evidence) != 1:
        raise bad(
            f"run {experiments.run}", sorted(pooled.evidence), "holds more than one evidence level; a verdict has one"
        )
    estimate = pooled.estimate
    return (Value(estimate.point, estimate.low, estimate.high),), pooled.evidence[0], pooled.num_races


def _lacking(experiments: Experiments, runs: Path) -> str:
    """Cells of the two labels whose time does not count, or carries a mark, and those that the run does not have of its
    suite: how many, and the first of each."""
    run, labels = load_run(runs / experiments.run), [experiments.where["label"], experiments.over["label"]]
    found = compare.setbacks(run)
    found = found[found["label"].isin(labels)]
    form = "{label}, {phase} on {cluster}, {workload} ({status}: {reason})"
    failed = [form.format_map(each) for each in found.to_dict("records")]
    there = set(run.rows["cell"])
    missing = [
        f"{name}, {each.phase} on {each.cluster.name}, {each.workload.name}"
        for name, each in _cells(experiments.run)
        if name in labels and each.digest not in there
    ]
    return ". ".join(
        f"{what}: {some[0]}" + (f", and {len(some) - 1} more" if len(some) > 1 else "")
        for what, some in (("Not ok", failed), ("Not in the run", missing))
        if some
    )


@functools.cache
def _cells(run: str) -> list[tuple[str, Experiment]]:
    """Of the suite of that name, with their labels; none where a run is of no suite."""
    if run not in suite.names():
        return []
    found = suite.load(run, physical=True, strict=False).experiments
    return [(label_of(each), each) for each in found]


def calibrations(folder: Path) -> pd.DataFrame:
    """Every fit in the ledger, refused ones too, one a row: cluster, date, evidence, and ``ledger.fit_rows``."""
    found = [
        {"cluster": path.stem, "date": each.date, "evidence": each.evidence, "duration_s": each.duration_s, **row}
        for path in ledger.files(folder)
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
