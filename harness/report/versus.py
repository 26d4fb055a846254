"""Two runs of the same cells side by side: the sections of ``notebooks/compare.ipynb``.

They did not run interleaved, so their ratio is unpaired: what differed between the two times, other than the code,
does not cancel. ``moebench regress`` is the instrument for a small difference.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from harness.bench.stats import CONFIDENCE
from harness.errors import bad
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
        point, low, high = _unpaired(there[cell, direction], here)
        times = {"time_s": np.exp(np.log(here["value"]).mean())}
        times["other_s"] = np.exp(np.log(there[cell, direction]["value"]).mean())
        identity = {key: here.iloc[0][key] for key in compare.IDENTITY}
        rows.append({**identity, "direction": direction, **times, "ratio": point, "low": low, "high": high})
    columns = [*compare.IDENTITY, "direction", "time_s", "other_s", "ratio", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _unpaired(a: pd.DataFrame, b: pd.DataFrame) -> tuple[float, float, float]:
    """exp of the difference of mean logs with Welch's interval: over launch means where both have several, and over
    all samples; the wider, as in ``harness.bench.stats``."""
    logs = [np.log(each["value"].to_numpy()) for each in (a, b)]
    means = [np.log(each.groupby("launch")["value"].apply(lambda v: np.exp(np.log(v).mean()))) for each in (a, b)]
    center = float(means[0].mean() - means[1].mean())
    half = math.nan
    for x, y in (logs, [each.to_numpy() for each in means]):
        if min(len(x), len(y)) > 1:
            vx, vy = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
            freedom = (vx + vy) ** 2 / max(vx**2 / (len(x) - 1) + vy**2 / (len(y) - 1), 1e-300)
            width = float(scipy_stats.t.ppf((1 + CONFIDENCE) / 2, max(freedom, 1.0)) * math.sqrt(vx + vy))
            half = width if math.isnan(half) else max(half, width)
    return math.exp(center), math.exp(center - half), math.exp(center + half)


def table(run: Run, other: Run) -> Html:
    """All cells that both have."""
    frame = ratios(run, other)
    run.write_table(f"versus_{other.name}", frame)
    if frame.empty:
        return Html(page.missing(f"{run.name} and {other.name} have no timed cell in common.", "moebench run"))
    parts = []
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
            Column("evidence", "evidence", page.badge),
        ]
        parts.append(page.table(group, columns, f"{case['phase']} of {case['model']} on {case['cluster']}"))
    return Html(*parts)


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
