"""Frames behind the report's tables and figures: one row a number, with its interval and its evidence.

Only selection and joining happens here; every estimate is ``harness.bench.stats``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from harness.bench import stats
from harness.bench.store import SIMULATED
from harness.report.run import GROUP, TIMED, WRONG, Run
from harness.routing import walk

DIRECTIONS = ("forward", "backward", "total")
IDENTITY = [*GROUP, "workload", "race", "cell", "label"]
ESTIMATE = ["point", "low", "high", "num_launches", "num_samples", "scope"]
SKEWS = ("expert", "rank", "node", "link", "group")  # the last of routings that mind groups of experts


@functools.lru_cache(maxsize=8)
def samples(run: Run) -> pd.DataFrame:
    """Whole-job times of one repetition each (rank -1) whose status lets them count: none of a cell that was wrong in
    any launch."""
    rows = run.metric("time_s")
    wrong = run.rows[run.rows["status"].isin(WRONG)]["cell"]
    rows = rows[(rows["rank"] == -1) & rows["status"].isin(TIMED) & (rows["value"] > 0) & ~rows["cell"].isin(wrong)]
    return rows.drop_duplicates(["cell", "launch", "rep", "direction"])


@functools.lru_cache(maxsize=8)
def drifting(run: Run) -> frozenset[str]:
    """Digests of races whose every repetition has another routing."""
    return frozenset(run.metric("step")["race"])


@functools.lru_cache(maxsize=8)
def times(run: Run) -> pd.DataFrame:
    """``IDENTITY``, direction, estimate of the time in s, its speed of light in s, and their quotient ``fraction``."""
    light = run.metric("speed_of_light_s").groupby(["cell", "direction"])["value"].median()

    def row(rows: pd.DataFrame) -> dict[str, Any]:
        first = rows.iloc[0]
        estimate = plain(stats.interval(rows), first)
        light_s = float(light.get((first["cell"], first["direction"]), math.nan))
        return {
            **_estimate(estimate),
            "speed_of_light_s": light_s,
            "fraction": light_s / estimate.point,
            **_status(rows),
        }

    columns = [*ESTIMATE, "speed_of_light_s", "fraction", "status", "reason"]
    return _each(run, samples(run), ["cell", "direction"], row, [*IDENTITY, "direction", *columns])


def references(run: Run, reference: str) -> dict[str, str]:
    """Race -> the cell that ``reference`` names there: its label, or a system's name where only one cell of it is."""
    cells = run.rows[["race", "cell", "system", "label"]].drop_duplicates("cell")
    found = {}
    for race, here in cells.groupby("race"):
        named = here[here["label"] == reference]
        named = named if len(named) else here[here["system"] == reference]
        if len(named) == 1:
            found[str(race)] = str(named["cell"].iloc[0])
    return found


@functools.lru_cache(maxsize=8)
def speedups(run: Run, reference: str) -> pd.DataFrame:
    """Time of ``reference`` over the time of every other cell of its race, paired by launch and repetition.

    ``IDENTITY``, direction, reference (its label), estimate (> 1: faster than the reference), verdict, status.
    """
    timed, base_of = samples(run), references(run, reference)
    by = dict(list(timed.groupby(["cell", "direction"])))

    def row(rows: pd.DataFrame) -> dict[str, Any] | None:
        first = rows.iloc[0]
        base_cell = base_of.get(first["race"])
        base = by.get((base_cell, first["direction"]))
        if base is None or base_cell == first["cell"]:
            return None
        estimate = plain(stats.ratio(base, rows), first)
        if not estimate.num_samples:
            return None
        simulated = first["evidence"] == SIMULATED
        return {
            **_estimate(estimate),
            "reference": base["label"].iloc[0],
            "verdict": "simulated: no interval" if simulated else verdict(estimate.low, estimate.high),
            **_status(pd.concat([rows, base])),
        }

    columns = [*IDENTITY, "direction", "reference", *ESTIMATE, "verdict", "status", "reason"]
    return _each(run, timed, ["cell", "direction"], row, columns)


@dataclasses.dataclass(frozen=True)
class Pooled:
    """One ratio over several races, which are weighed alike; ``evidence``: the levels of their rows."""

    estimate: stats.Estimate
    num_races: int
    evidence: tuple[str, ...]


def pooled_speedup(run: Run, label: str, reference: str, direction: str = "total") -> Pooled | None:
    """Geometric mean over races of the time of ``reference`` over that of ``label``; None where no race has both.

    Both name a label, or a system where a race has one cell of it. Paired by launch and repetition; of each launch,
    the repetitions that every race has; those of a race that drifts are other steps, so each stands for their mean.
    The races are the question, not a sample of it: the interval speaks of launches and repetitions.
    """
    timed = samples(run)
    timed = timed[timed["direction"] == direction]
    mine, base = references(run, label), references(run, reference)
    logs, evidence = {}, set()
    for race in sorted(set(mine) & set(base)):
        own, other = (
            timed[timed["cell"] == cells[race]].set_index(["launch", "rep"])["value"] for cells in (mine, base)
        )
        if len(quotient := pd.Series(np.log(other / own)).dropna()):
            drifts = race in drifting(run)
            logs[race] = quotient.groupby("launch").transform("mean") if drifts else quotient
            evidence |= set(timed[timed["race"] == race]["evidence"])
    if not logs:
        return None
    pooled = np.exp(pd.DataFrame(logs).dropna().mean(axis=1)).rename("value").reset_index()
    estimate = stats.interval(pooled)
    if SIMULATED in evidence:
        estimate = dataclasses.replace(estimate, low=math.nan, high=math.nan)
    return Pooled(estimate, len(logs), tuple(sorted(evidence)))


def beside_predictions(run: Run, predicted: pd.DataFrame, direction: str = "total") -> pd.DataFrame:
    """Cells with a time and a prediction (``predicted``: cell, direction, predicted_s): ``IDENTITY``, measured_s (the
    estimate of what ran, on the run's evidence), predicted_s, and error, the prediction over the time less one."""
    found = times(run).rename(columns={"point": "measured_s"}).merge(predicted, on=["cell", "direction"])
    found = found[found["direction"] == direction].reset_index(drop=True)
    found["error"] = found["predicted_s"] / found["measured_s"] - 1
    return found[[*IDENTITY, "measured_s", "predicted_s", "error"]]


def verdict(low: float, high: float) -> str:
    """What an interval of a ratio allows to say."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "one sample: no interval"
    if low > 1:
        return "faster"
    if high < 1:
        return "slower"
    return "no difference shown"


def bound(value: float) -> str:
    """An end of a ratio's interval: two decimals, three where two could not tell on which side of 1 it lies."""
    shown = f"{value:.2f}"
    return f"{value:.3f}" if shown == "1.00" else shown


def traffic(run: Run) -> pd.DataFrame:
    """``IDENTITY``, direction, level, planned_bytes, counted_bytes (NaN where not known) and counted over planned.

    Bytes of the whole job in one repetition: the median over launches and repetitions of the sum over ranks. A timed
    cell whose bytes nobody knows has its rows beside those of its race all the same.
    """
    rows = run.rows[run.rows["metric"].isin(["bytes_planned", "bytes_counted"])]
    rows = rows[np.isfinite(rows["value"])]
    if rows.empty:
        return pd.DataFrame(columns=[*IDENTITY, "direction", "level", "planned_bytes", "counted_bytes", "quotient"])
    whole = rows.groupby(["cell", "metric", "direction", "level"])["rank"].transform("min") == -1
    rows = rows[~whole | (rows["rank"] == -1)]  # the job's own sum where it is stored, else the sum over ranks
    job = rows.groupby(["cell", "metric", "direction", "level", "launch", "rep"])["value"].sum()
    job = pd.concat([job, _totals(job)])
    bytes_ = job.groupby(["cell", "metric", "direction", "level"]).median().unstack("metric")
    bytes_ = bytes_.reindex(columns=["bytes_planned", "bytes_counted"])
    bytes_.columns = pd.Index(["planned_bytes", "counted_bytes"])
    planned = bytes_["planned_bytes"].where(bytes_["planned_bytes"] > 0)
    bytes_["quotient"] = bytes_["counted_bytes"] / planned
    identity = run.rows[IDENTITY].drop_duplicates("cell")
    known = identity.merge(bytes_.reset_index(), on="cell")
    of_race = known[["race", "direction", "level"]].drop_duplicates()
    without = samples(run)[IDENTITY].drop_duplicates("cell")
    without = without[~without["cell"].isin(known["cell"])].merge(of_race, on="race")
    return _sorted(run, pd.concat([known, without], ignore_index=True), ["level"])


def _totals(values: pd.Series) -> pd.Series:
    """Sum over the directions of whatever lacks its direction ``total``."""
    if values.empty:
        return values
    wide = values.unstack("direction")
    parts = [d for d in ("forward", "backward") if d in wide]
    lacking = wide.drop(columns=parts).isna().all(axis=1)  # neither a total nor a value without direction
    total = wide.loc[lacking, parts].sum(axis=1, skipna=False).dropna() if len(parts) == 2 else wide.iloc[:0, 0]
    index = total.index.to_frame(index=False).assign(direction="total")[values.index.names]
    return pd.Series(total.to_numpy(), index=pd.MultiIndex.from_frame(index), name=values.name)


@functools.lru_cache(maxsize=8)
def skew(run: Run) -> pd.DataFrame:
    """One row a race: ``GROUP``, workload, race, and its routing's certificate with the max/mean per ``SKEWS``."""
    races = run.rows[[*GROUP, "workload", "race"]].drop_duplicates("race")
    realised = run.metric("max_over_mean").groupby(["race", "level"])["value"].median().unstack("level")
    found = []
    for race in ({str(k): v for k, v in row.items()} for row in races.to_dict("records")):
        certificate = run.certificates.get(race["race"], {})
        stated: dict[str, float] = certificate.get("max_over_mean") or {}
        measured = realised.loc[race["race"]] if race["race"] in realised.index else {}
        values = {level: float(measured.get(level, stated.get(level, math.nan))) for level in SKEWS}
        facts = {"digest": certificate.get("digest", ""), "tokens": _tokens(certificate.get("tokens")), **values}
        found.append({**dict(race), **facts, "num_empty_experts": certificate.get("num_empty_experts", math.nan)})
        found[-1]["fitted"] = walk.in_words([walk.Fitted(**each) for each in certificate.get("fitted", ())])
    columns = [*GROUP, "workload", "race", "digest", "tokens", *SKEWS, "num_empty_experts", "fitted"]
    return pd.DataFrame(found, columns=columns).sort_values([*GROUP, "rank", "workload"], ignore_index=True)


def memory(run: Run) -> pd.DataFrame:
    """``IDENTITY``, part, measured_bytes and planned_bytes (NaN where there is no plan): of the rank that has the most
    of it, the most over launches."""
    rows = run.rows[run.rows["metric"].isin(["memory_bytes", "memory_planned_bytes"])]
    if rows.empty:
        return pd.DataFrame(columns=[*IDENTITY, "part", "measured_bytes", "planned_bytes"])
    most = rows.groupby(["cell", "level", "metric"])["value"].max().unstack("metric")
    most = most.reindex(columns=["memory_bytes", "memory_planned_bytes"])
    most.columns = pd.Index(["measured_bytes", "planned_bytes"])
    parts = most.rename_axis(["cell", "part"]).reset_index()
    return _sorted(run, rows[IDENTITY].drop_duplicates("cell").merge(parts, on="cell"), [])


def losses(run: Run) -> pd.DataFrame:
    """``IDENTITY``, launch, step, loss (the mean over ranks where each stored its own)."""
    rows = run.metric("loss")
    rows = rows[np.isfinite(rows["value"])]
    if rows.empty:
        return pd.DataFrame(columns=[*IDENTITY, "launch", "step", "loss"])
    loss = rows.groupby(["cell", "launch", "rep"])["value"].mean().rename("loss").reset_index()
    loss = loss.rename(columns={"rep": "step"})
    return _sorted(run, rows[IDENTITY].drop_duplicates("cell").merge(loss, on="cell"), ["launch", "step"])


@functools.lru_cache(maxsize=8)
def setbacks(run: Run) -> pd.DataFrame:
    """Cells and launches that gave no time that counts without a mark: refused, failed, cpu_bound, not run, ... with
    why. ``timed``: whether times of the cell count all the same."""
    rows = run.rows[run.rows["status"] != "ok"]
    rows = rows.assign(timed=rows["cell"].isin(samples(run)["cell"]))
    keys = [*GROUP, "workload", "race", "cell", "label", "status", "reason", "timed"]
    found = rows.groupby(keys, dropna=False)["launch"].agg(_distinct).rename("launches").reset_index()
    return found.sort_values(["status", "label", "cluster", "phase", "workload"], ignore_index=True)


def _distinct(values: pd.Series) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))


def _each(
    run: Run,
    rows: pd.DataFrame,
    keys: list[str],
    make: Callable[[pd.DataFrame], dict[str, Any] | None],
    columns: list[str],
) -> pd.DataFrame:
    """``make``'s dictionary for every group of ``rows``, with the group's identity before it."""
    found = []
    for _, group in rows.groupby(keys, sort=False):
        made = make(group)
        if made is not None:
            identity = group[[*IDENTITY, "direction"]].iloc[0].to_dict()
            found.append({str(k): v for k, v in identity.items()} | made)
    return _sorted(run, pd.DataFrame(found, columns=columns), [])


def _sorted(run: Run, frame: pd.DataFrame, last: list[str]) -> pd.DataFrame:
    """Groups together, workloads by realised skew, systems in the report's order."""
    load = dict(zip(skew(run)["race"], skew(run)["rank"], strict=True))
    helpers = {"_label": _places(frame["label"], run.labels), "_skew": frame["race"].map(load)}
    keys = [*GROUP, "_skew", "workload", "_label"]
    if "direction" in frame:
        helpers["_direction"] = _places(frame["direction"], DIRECTIONS)
        keys.append("_direction")
    frame = frame.assign(**helpers).sort_values([*keys, *last], kind="stable", ignore_index=True)
    return frame.drop(columns=list(helpers))


def _places(values: pd.Series, order: Iterable[str]) -> pd.Series:
    return values.map({value: i for i, value in enumerate(order)})


def plain(estimate: stats.Estimate, row: pd.Series) -> stats.Estimate:
    """Without an interval where nothing ran: steps of a simulation differ by their routing, and its error is none of
    repetition."""
    if row["evidence"] != SIMULATED:
        return estimate
    return dataclasses.replace(estimate, low=math.nan, high=math.nan)


def _estimate(estimate: stats.Estimate) -> dict[str, Any]:
    return {name: getattr(estimate, name) for name in ESTIMATE}


def _status(rows: pd.DataFrame) -> dict[str, str]:
    """The mark that the numbers made from ``rows`` carry."""
    marked = rows[rows["status"] != "ok"]
    if marked.empty:
        return {"status": "ok", "reason": ""}
    return {"status": str(marked.iloc[0]["status"]), "reason": str(marked.iloc[0]["reason"])}


def _tokens(tokens: Any) -> str:
    """``8 × 2048`` for equal ranks, else the range."""
    if not isinstance(tokens, list | tuple) or not tokens:
        return str(tokens) if tokens is not None else ""
    low, high = min(tokens), max(tokens)
    return f"{len(tokens)} × {low}" if low == high else f"{len(tokens)} × {low}…{high}"
