"""Two runs of the same cells side by side: the sections of ``notebooks/compare.ipynb``.

They did not run interleaved, so their ratio is unpaired: what differed between the two times, other than the code,
does not cancel. ``moebench regress`` is the instrument for a small difference.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special  # stats takes seconds to import

from harness.bench import stats
from harness.bench.stats import CONFIDENCE
from harness.bench.store import SIMULATED
from harness.errors import bad
from harness.plan.agreement import agreement
from harness.report import compare, page, words
from harness.report.page import Column, Html
from harness.report.run import GROUP, Run, load


def other_run(run_dir: str, other: str) -> Run:
    """The run to compare with: a name beside ``run_dir``, or a folder."""
    if not other:
        raise bad("other", other, "name the run to compare with: moebench report compare --run NEW -p other=OLD")
    return load(Path(other) if "/" in other else Path(run_dir).parent / other)


def ratios(run: Run, other: Run) -> pd.DataFrame:
    """``compare.IDENTITY`` of the cells of both, direction, times in s, ratio (of ``other`` over ``run``: above 1,
    ``run`` is faster) with its interval."""
    mine, theirs = compare.samples(run), compare.samples(other)
    there = dict(list(theirs.groupby(["cell", "direction"])))
    rows = []
    for (cell, direction), here in mine.groupby(["cell", "direction"], sort=False):
        if (cell, direction) not in there:
            continue
        beside = there[cell, direction]
        point, low, high = _unpaired(beside, here)
        times = {"time_s": np.exp(np.log(here["value"]).mean()), "other_s": np.exp(np.log(beside["value"]).mean())}
        identity = {key: here.iloc[0][key] for key in compare.IDENTITY}
        facts = {f"other_{key}": beside.iloc[0][key] for key in ("evidence", "status")} | {
            "status": here.iloc[0]["status"]
        }
        rows.append({**identity, "direction": direction, **times, "ratio": point, "low": low, "high": high, **facts})
    return pd.DataFrame(rows, columns=RATIOS)


#: columns of ``ratios``
RATIOS = [*compare.IDENTITY, "direction", "time_s", "other_s", "ratio", "low", "high", "status", "other_evidence"]
RATIOS += ["other_status"]


def _unpaired(a: pd.DataFrame, b: pd.DataFrame) -> tuple[float, float, float]:
    """exp of the difference of mean logs with Welch's interval: over launch means where both have several, and over
    all samples; the wider, as in ``harness.bench.stats``. What is simulated has no spread: beside it the interval is
    that of what ran, and there is none beside another simulation."""
    simulated = [bool((each["evidence"] == SIMULATED).all()) for each in (a, b)]
    if any(simulated):
        one, other = stats.interval(a), stats.interval(b)
        point = one.point / other.point
        if all(simulated):
            return point, math.nan, math.nan
        return (
            (point, one.point / other.high, one.point / other.low)
            if simulated[0]
            else (point, one.low / other.point, one.high / other.point)
        )
    logs = [np.log(each["value"].to_numpy()) for each in (a, b)]
    means = [np.log(each.groupby("launch")["value"].apply(lambda v: np.exp(np.log(v).mean()))) for each in (a, b)]
    center = float(means[0].mean() - means[1].mean())
    half = math.nan
    for x, y in (logs, [each.to_numpy() for each in means]):
        if min(len(x), len(y)) > 1:
            vx, vy = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
            freedom = (vx + vy) ** 2 / max(vx**2 / (len(x) - 1) + vy**2 / (len(y) - 1), 1e-300)
            width = float(special.stdtrit(max(freedom, 1.0), (1 + CONFIDENCE) / 2) * math.sqrt(vx + vy))
            half = width if math.isnan(half) else max(half, width)
    return math.exp(center), math.exp(center - half), math.exp(center + half)


def table(run: Run, other: Run) -> Html:
    """All cells that both have."""
    frame = ratios(run, other)
    run.write_table(f"versus_{other.name}", frame)
    if frame.empty:
        return Html(page.missing(f"{run.name} and {other.name} have no timed cell in common.", "moebench run"))
    parts = [predicted(run, other, frame)]
    for key, group in frame.groupby(GROUP, sort=False):
        case = dict(zip(GROUP, key, strict=True))
        group = group[group["direction"] == words.main_direction(group)]
        cells = [page.ratio(*each) for each in group[["ratio", "low", "high"]].to_numpy()]
        group = group.assign(shown=pd.Series(cells, index=group.index, dtype=object))  # strings are escaped
        columns = [
            Column("workload", "workload", merge=True),
            Column("label", "system"),
            Column("time_s", f"{run.name}, ms", page.milliseconds, "num"),
            Column("other_s", f"{other.name}, ms", page.milliseconds, "num"),
            Column("shown", f"{other.name} / {run.name}", lambda value: value, "num"),
            Column("evidence", f"evidence, {run.name}", page.badge),
            Column("other_evidence", f"evidence, {other.name}", page.badge),
        ]
        if set(group[["status", "other_status"]].to_numpy().flat) != {"ok"}:
            columns += [Column("mark", "mark", lambda value: page.badge(value) if value else "")]
            group = group.assign(mark=group[["status", "other_status"]].max(axis=1).replace("ok", ""))
        parts.append(page.table(group, columns, f"{case['phase']} of {case['model']} on {case['cluster']}"))
    return Html(*parts)


def predicted(run: Run, other: Run, frame: pd.DataFrame) -> str:
    """Where one of the two was simulated and the other ran: how far the one is off, phase by phase and system by
    system, over cells without a mark; empty where not."""
    is_simulated = frame["evidence"] == SIMULATED
    frame = frame[is_simulated != (frame["other_evidence"] == SIMULATED)]
    if frame.empty:
        return ""
    frame = pd.concat(
        group[group["direction"] == words.main_direction(group)] for _, group in frame.groupby("cell", sort=False)
    )
    first = frame["evidence"] == SIMULATED
    frame = frame.assign(
        measured_s=frame["other_s"].where(first, frame["time_s"]),
        predicted_s=frame["time_s"].where(first, frame["other_s"]),
        mark=frame["other_status"].where(first, frame["status"]),
        ran=frame["other_evidence"].where(first, frame["evidence"]),
    )
    clean = frame[frame["mark"] == "ok"]
    parts = [("all", "", clean), *((str(phase), "", rows) for phase, rows in clean.groupby("phase", sort=False))]
    parts += [("all", str(label), rows) for label, rows in clean.groupby("label", sort=False)]
    found = [
        {"phase": phase, "label": label or "all", **dataclasses.asdict(agreement(rows))}
        for phase, label, rows in parts
        if len(rows)
    ]
    run.write_table(f"predicted_{other.name}", pd.DataFrame(found))
    left_out = len(frame) - len(clean)
    simulation, ran = (run, other) if bool(first.iloc[0]) else (other, run)
    note = f"of {simulation.name}, {words.rests_on(_of_cells(simulation, frame))}; errors relative to {ran.name} "
    note += f"({' and '.join(sorted(set(frame['ran'])))}); τ: Kendall's, of the order of the systems of a race"
    note += f"; {left_out} marked cells (cpu_bound) are left out" if left_out else ""
    columns = [
        Column("phase", "phase", merge=True),
        Column("label", "system"),
        Column("num_cells", "cells", str, "num"),
        *(Column(key, title, _percent, "num") for key, title in _ERRORS.items()),
        Column("mean_tau", "τ, mean", lambda tau: f"{tau:.2f}" if math.isfinite(tau) else "–", "num"),
    ]
    return page.table(pd.DataFrame(found), columns, "The simulation against what ran", note) if found else ""


_ERRORS = {"mean_error": "mean |error|", "p95_error": "p95", "largest_error": "largest", "bias": "bias"}


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _of_cells(run: Run, frame: pd.DataFrame) -> pd.DataFrame:
    return run.rows[run.rows["cell"].isin(frame["cell"])]


def only_one(run: Run, other: Run) -> Html:
    """Cells that have no time in one of them, or in neither, with what became of them there."""
    timed = {each.name: set(compare.samples(each)["cell"]) for each in (run, other)}
    both = pd.concat([each.rows.drop_duplicates("cell") for each in (run, other)]).drop_duplicates("cell")
    rows = []
    for cell in both[~both["cell"].isin(set.intersection(*timed.values()))].to_dict("records"):
        told = {f"in_{i}": _became(each, cell["cell"]) for i, each in enumerate((run, other))}
        rows.append({**{key: cell[key] for key in ("phase", "cluster", "model", "workload", "label")}, **told})
    if not rows:
        return Html("<p>Both runs have times of the same cells.</p>")
    columns = [Column(key, key) for key in ("phase", "cluster", "model", "workload", "label")]
    columns += [Column(f"in_{i}", each.name, kind="prose") for i, each in enumerate((run, other))]
    return Html(page.table(pd.DataFrame(rows), columns, "Without a time in one of them, or in both"))


def _became(run: Run, cell: str) -> str:
    """Of a cell in a run, in words."""
    back = compare.setbacks(run)
    back = back[back["cell"] == cell]
    said = "; ".join(f"{one['status']}: {words.shortened(one['reason'])}" for one in back.to_dict("records"))
    if cell in set(compare.samples(run)["cell"]):
        return f"timed ({said})" if said else "timed"
    return said or "is not in it"
