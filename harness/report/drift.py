"""Races whose routing drifts: skew and each system's time step by step, what moved when, how old placements were.

A placement made behind step s serves step s + 1 first, so its age there is 1; copies that are chosen behind a gate are
of age 0. Who decides by more than one step knows older loads than that, too.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pandas as pd

from harness.bench import stats
from harness.bench.store import SIMULATED
from harness.comm.moved import COPIES, KINDS, LATE_COPIES, MOVES
from harness.memory import expert_bytes
from harness.report import compare, figures, page, words
from harness.report.columns import EVIDENCE
from harness.report.page import Column, Html
from harness.report.run import GROUP, Run
from harness.specs import Experiment

SKEWS = ("expert", "rank")  # that the figure and the tables show
_STILL = "nothing moved in these steps"
_RUN = "moebench run EXPERIMENTS.yaml"


# ---------------------------------------------------------------------------------------------------------- the frames


@functools.lru_cache(maxsize=8)
def steps(run: Run) -> pd.DataFrame:
    """A row a timed step of every cell whose routing drifts: ``compare.IDENTITY``, step, estimate of its time over
    launches; ``over``, ``over_low`` and ``over_high``: its speedup over the run's control in the same step; ``expert``
    to ``link``: max/mean load; ``drift``; and of each kind of ``harness.comm.moved`` the bytes that all ranks sent."""
    columns = [*compare.IDENTITY, "step", *compare.ESTIMATE, "over", "over_low", "over_high"]
    timed = _samples(run)
    if timed.empty:
        return pd.DataFrame(columns=[*columns, *compare.SKEWS[:4], "drift", *KINDS])
    base_of = compare.references(run, run.control)
    by = dict(list(timed.groupby(["cell", "step"])))
    found = []
    for (_, step), rows in by.items():
        first = rows.iloc[0]
        base = by.get((base_of.get(first["race"]), step), rows.iloc[:0])
        point, over = (compare.plain(each, first) for each in (stats.interval(rows), stats.ratio(base, rows)))
        estimate = {name: getattr(point, name) for name in compare.ESTIMATE}
        ratio = {"over": over.point, "over_low": over.low, "over_high": over.high}
        found.append({**first[compare.IDENTITY], "step": step, **estimate, **ratio})
    frame = pd.DataFrame(found, columns=columns)
    facts = _of_steps(run, "step_max_over_mean").join(_of_steps(run, "drift").rename(columns={"": "drift"}))
    moved = _of_steps(run, "moved_bytes", sums=True).reindex(columns=list(KINDS))
    frame = frame.join(facts, on=["cell", "step"]).join(moved, on=["cell", "step"]).fillna(dict.fromkeys(KINDS, 0.0))
    order = {label: place for place, label in enumerate(run.labels)}
    keys = frame.assign(_label=frame["label"].map(order))
    return frame.loc[keys.sort_values([*GROUP, "workload", "race", "_label", "step"]).index].reset_index(drop=True)


def _samples(run: Run) -> pd.DataFrame:
    """Times that count, with the step that they are of in place of the repetition: pairs are of the same step."""
    told = run.metric("step")[["cell", "launch", "rep", "value"]].rename(columns={"value": "step"})
    timed = compare.samples(run).merge(told, on=["cell", "launch", "rep"])
    return timed.assign(step=timed["step"].astype(int), rep=timed["step"].astype(int))


def _of_steps(run: Run, metric: str, *, sums: bool = False) -> pd.DataFrame:
    """Values of a metric by cell and step (rows) and level (columns), the median over launches; ``sums``: their mean,
    of launches that have none 0."""
    told = run.metric("step")[["cell", "launch", "rep", "value"]].rename(columns={"value": "step"})
    rows = run.metric(metric).merge(told, on=["cell", "launch", "rep"]).astype({"step": int})
    by = rows.groupby(["cell", "step", "level"])["value"]
    if not sums:
        return by.median().unstack("level")
    launches = told.groupby(["cell", "step"])["launch"].nunique().astype(float)
    return by.sum().unstack("level").div(launches, axis=0).dropna(how="all")


def followers(run: Run) -> pd.DataFrame:
    """A row a cell: ``compare.IDENTITY``; ``num_steps``; ``point``, the mean over its steps; ``over``: speedup over
    the control with its interval, paired step by step; ``spread``: its slowest step over its fastest; ``behind``: steps
    behind which experts moved; ``move_bytes`` of each of these; ``copy_bytes`` of a step; ``age``: of the placement in
    steps, in words; ``gain`` with its interval: speedup over the control in the first step behind a move, over that in
    the last before it."""
    found = []
    timed, frame = _samples(run), steps(run)
    base_of = compare.references(run, run.control)
    for cell, rows in frame.groupby("cell", sort=False):
        first = rows.iloc[0]
        base = timed[timed["cell"] == base_of.get(first["race"])]
        mine = timed[timed["cell"] == cell]
        ratio = compare.plain(stats.ratio(base, mine), first)
        behind = rows[rows[MOVES] > 0]["step"].tolist()
        gain = compare.plain(_gain(mine, base, behind), first)
        moved = rows[rows[MOVES] > 0][MOVES]
        found.append(
            {
                **first[compare.IDENTITY],
                "num_steps": len(rows),
                "point": stats.interval(mine).point,
                "over": {"point": ratio.point, "low": ratio.low, "high": ratio.high},
                "spread": rows["point"].max() / rows["point"].min(),
                "behind": behind,
                "move_bytes": float(moved.mean()) if len(moved) else 0.0,
                "copy_bytes": float((rows[COPIES] + rows[LATE_COPIES]).mean()),
                "age": _age(run, rows, behind),
                "gain": {"point": gain.point, "low": gain.low, "high": gain.high},
            }
        )
    return pd.DataFrame(found)


def _age(run: Run, rows: pd.DataFrame, behind: list[int]) -> str:
    parts = []
    if (rows[LATE_COPIES] > 0).any():
        parts.append("0: copies by the step's own gate")
    if (rows[COPIES] > 0).any():
        every = rows[COPIES].min() >= _all_copies(run, rows["cell"].iloc[0])
        parts.append("copies all experts" if every else "1 or more: copies by the steps before")
    if behind:
        ages = [step - max(at for at in behind if at < step) for step in rows["step"] if step > behind[0]]
        least, most = (min(ages), max(ages)) if ages else (1, 1)
        parts.append(f"{least} to {most}: experts moved" if most > least else f"{least}: experts moved")
    return "; ".join(parts) or _STILL


def _all_copies(run: Run, cell: str) -> float:
    """Bytes that a copy of every expert on every rank takes."""
    if cell not in run.experiments:  # its record is damaged
        return math.inf
    each = Experiment.model_validate(run.experiments[cell])
    layers = 1 if each.phase in ("exchange", "layer") else each.model.num_layers
    copies = layers * each.model.num_experts * (each.cluster.num_ranks - 1)
    return float(copies * expert_bytes(each.model, each.dtype))


def _gain(mine: pd.DataFrame, base: pd.DataFrame, behind: list[int]) -> stats.Estimate:
    """The step in which experts move holds the move itself, so it is on neither side."""
    keys = ["launch", "step"]
    pairs = mine[[*keys, "value"]].merge(base[[*keys, "value"]], on=keys, suffixes=("", "_base"))
    over = (pairs["value"] / pairs["value_base"]).set_axis(pd.MultiIndex.from_frame(pairs[keys])).to_dict()
    rows = [
        {"launch": launch, "rep": step, "value": over[launch, step - 1] / over[launch, step + 1]}
        for launch in pairs["launch"].unique()
        for step in behind
        if {(launch, step - 1), (launch, step + 1)} <= over.keys() and step - 1 not in behind
    ]
    return stats.interval(pd.DataFrame(rows, columns=["launch", "rep", "value"]))


def stale(run: Run) -> pd.DataFrame:
    """What it costs to know the past alone, executed: a row a step of a race that drifts, without those in which
    experts moved, whose routing also stands still in another race of its group, where planners have seen it.
    ``IDENTITY``, step, ``since``: how many timed steps it has been so, and ``ratio`` with its interval: the time of the
    step over the time where it stands still, paired by launch."""
    timed, still, found = _samples(run), _standing(run), []
    moved: dict[Any, float] = steps(run).set_index(["cell", "step"])[MOVES].to_dict()
    told = run.metric("step").drop_duplicates(["race", "value"])
    every = compare.samples(run)
    for race, rows in told.groupby("race", sort=False):
        ordered = rows.set_index(rows["value"].astype(int))["reason"].sort_index()
        same = (ordered != ordered.shift()).cumsum()
        since: dict[Any, int] = (same.groupby(same).cumcount() + 1).to_dict()
        hashes: dict[Any, str] = ordered.to_dict()
        for (cell, step), mine in timed[timed["race"] == race].groupby(["cell", "step"], sort=False):
            first = mine.iloc[0]
            oracle = still.get((*first[GROUP], hashes[step]))
            other = every[(every["race"] == oracle) & (every["label"] == first["label"])]
            if other.empty or moved[cell, step]:
                continue
            known = np.exp(np.log(other["value"]).groupby(other["launch"]).mean()).rename("value").reset_index()
            pair = compare.plain(stats.ratio(mine.assign(rep=0), known.assign(rep=0)), first)
            if pair.num_samples:
                ratio = {"point": pair.point, "low": pair.low, "high": pair.high}
                found.append({**first[compare.IDENTITY], "step": step, "since": since[step], "ratio": ratio})
    return pd.DataFrame(found, columns=[*compare.IDENTITY, "step", "since", "ratio"])


def _standing(run: Run) -> dict[tuple[str, ...], str]:
    """Race whose trace stands still, by its group and the hash of its routing."""
    from harness.bench.stepwise import certify_step  # imports torch, which nothing else here needs

    found = {}
    for row in run.rows.drop_duplicates("race").to_dict("records"):
        given = run.experiments.get(row["cell"])
        if given is None or row["race"] in compare.drifting(run) or given["workload"]["generator"] != "trace":
            continue
        digest = certify_step(Experiment.model_validate(given), 0, ran=True).digest
        found[(*(row[key] for key in GROUP), digest)] = row["race"]
    return found


# ---------------------------------------------------------------------------------------------------------- the section


def drift(run: Run) -> Html:
    """Skew over steps, and who adapts how fast; one line where no routing drifts."""
    frame = steps(run)
    if frame.empty:
        what = "The routing of every race that has a time here stands still, or is the model's own."
        return Html(page.missing(what, _RUN, "with a workload that drifts or is replayed in that file"))
    told = followers(run)
    run.write_table("steps", frame)
    run.write_table("followers", told)
    return Html(
        *(part for race, rows in frame.groupby("race", sort=False) for part in _race(run, str(race), rows, told))
    )


def staleness(run: Run) -> Html:
    """What it costs each system to have seen the past alone, executed."""
    frame = stale(run)
    if frame.empty:
        what = "It takes a replayed trace, and a race in which one of its timed steps stands still."
        return Html(page.missing(what, "moebench run --suite hecate-emulated"))
    run.write_table("staleness", frame)
    parts = []
    for _, rows in frame.groupby("race", sort=False):
        wide = rows.pivot(index="label", columns="step", values="ratio").reindex(list(dict.fromkeys(rows["label"])))
        since, first = rows.set_index("step")["since"].to_dict(), rows.iloc[0]
        shown = wide.reset_index().assign(evidence=first["evidence"])
        columns = [Column("label", "system")]
        shown.columns = shown.columns.map(str)
        for step in wide:
            columns.append(Column(str(step), f"step {step}, routing for {since[step]} so", _slower, "num"))
        title = f"Time of a step of {first['workload']}, over the time where planners have seen its routing"
        note = f"above 1: what is not known yet costs; {run.control} plans nothing and tells what else differs"
        note += "; –: experts moved in that step"
        parts.append(page.table(shown, [*columns, EVIDENCE], title, note))
    return Html(*parts)


def _slower(ratio: Any) -> str:
    """Not coloured: more is slower."""
    if not isinstance(ratio, dict):
        return "–"
    interval = f" {page.interval(ratio['low'], ratio['high'])}" if math.isfinite(ratio["low"]) else ""
    return f"{ratio['point']:.2f}×{interval}"


def _race(run: Run, race: str, rows: pd.DataFrame, told: pd.DataFrame) -> list[str]:
    first, mine = rows.iloc[0], told[told["race"] == race]
    title = f"{first['workload']}: {words.group_title(dict(first[GROUP]))}"
    simulated = first["evidence"] == SIMULATED
    bars = (
        "" if simulated or rows["num_launches"].max() < 2 else " Bars: 95 % intervals over launches, cut at the edge."
    )
    drawn = figures.drawn(
        lambda: figures.steps(run, rows, SKEWS),
        alt=f"{title}. Above: max over mean load per expert and rank of each step. Below: time of each step of "
        f"{len(mine)} systems, with a ring where experts moved behind it.",
        caption=f"{title} [{first['evidence']}]. A ring: behind this step, and in its time, experts changed "
        f"places.{bars} Loads are means over layers, with experts in index order.",
    )
    return [
        drawn,
        page.fill("<p>{{ text }}</p>", text=_drift_words(rows)),
        page.fill("<ul>{% for s in said %}<li>{{ s }}</li>{% endfor %}</ul>", said=_sentences(run, mine)),
        page.table(mine, _columns(run, mine), f"Who follows the drift: {first['workload']}", _note(run, mine)),
        page.folded("every step", _every_step(rows, title)),
    ]


def _drift_words(rows: pd.DataFrame) -> str:
    each = rows.drop_duplicates("step").sort_values("step")
    ranks = f"{each['rank'].min():.2f} to {each['rank'].max():.2f}"
    text = f"Steps {each['step'].min()} to {each['step'].max()}: max/mean load per rank is {ranks}, with experts in"
    return f"{text} index order; from step to step {each['drift'].mean():.0%} of the assignments go to another expert."


def _sentences(run: Run, mine: pd.DataFrame) -> list[str]:
    """Who follows, and how far behind, by what was moved; whether times show it."""
    said: list[str] = []
    still = [row["label"] for row in mine.to_dict("records") if row["age"] == _STILL]
    for row in mine.to_dict("records"):
        if row["label"] in still:
            continue
        text = f"{row['label']}: its placement is of age {row['age']}"
        if row["age"].startswith("copies"):
            text = f"{row['label']} {row['age']} at every step, whatever their loads"
        gain = row["gain"]
        if row["behind"] and math.isfinite(gain["point"]):
            shown = compare.verdict(gain["low"], gain["high"])
            verdict = {"faster": "", "slower": "", "no difference shown": ", no difference shown"}.get(
                shown, f" ({shown})"
            )
            if row["evidence"] == SIMULATED:
                verdict = ""
            text += (
                f". Over {run.control}, the first step behind a move is {gain['point']:.2f} times as fast as the last"
            )
            text += f" before it{verdict}"
        said.append(f"{text}.")
    if still:
        said.append(f"{words.listed(still)}: {_STILL}.")
    return said


def _columns(run: Run, mine: pd.DataFrame) -> list[Column]:
    found = [
        Column("label", "system"),
        Column("point", "time, ms, mean over steps", page.milliseconds, "num"),
        Column("over", f"over {run.control}, step by step", _ratio, "num"),
        Column("spread", "slowest / fastest step", "{:.2f}".format, "num"),
        Column("age", "age of its placement, steps", kind="prose"),
    ]
    if mine["behind"].map(len).any():
        found += [
            Column("behind", "experts moved behind step", _listed_steps, "prose"),
            Column("move_bytes", "a move, MB", _bytes, "num"),
            Column(
                "gain", "what a move gains", _ratio, "num", "speedup over the control, behind a move over before it"
            ),
        ]
    if mine["copy_bytes"].any():
        found.append(Column("copy_bytes", "copies a step, MB", _bytes, "num"))
    return [*found, EVIDENCE]


def _note(run: Run, mine: pd.DataFrame) -> str:
    steps_ = words.span(mine["num_steps"])
    return (
        f"means over {steps_} steps, each another batch of another skew; ratios to {run.control} are of the same step"
    )


def _every_step(rows: pd.DataFrame, title: str) -> str:
    """A row a step: its skew, and each system's time."""
    each = rows.drop_duplicates("step").set_index("step")[[*SKEWS, "drift"]]
    estimates: list[Any] = rows[["point", "low", "high"]].to_dict("records")
    times = rows.assign(time=pd.Series(estimates, index=rows.index, dtype=object))
    times = times.pivot(index="step", columns="label", values="time").reindex(
        columns=list(dict.fromkeys(rows["label"]))
    )
    columns = [Column("step", "step", str, "num")]
    columns += [Column(level, f"max/mean per {level}", "{:.2f}".format, "num") for level in SKEWS]
    columns.append(Column("drift", "drift", page.percent, "num", "assignments that go to another expert than before"))
    columns += [Column(label, f"{label}, ms", _time, "num") for label in map(str, times)]
    return page.table(each.join(times).reset_index(), columns, f"{title}, step by step")


def _time(estimate: Any) -> str:
    if not isinstance(estimate, dict):
        return "–"
    return page.milliseconds(estimate["point"], estimate["low"], estimate["high"])


def _ratio(estimate: dict[str, float]) -> str:
    return page.ratio(estimate["point"], estimate["low"], estimate["high"])


def _listed_steps(behind: list[int]) -> str:
    return (", ".join(map(str, behind)) or "–") if len(behind) <= 12 else f"{len(behind)} of the steps"


def _bytes(value: float) -> str:
    return page.megabytes(value) if value else "–"


__all__ = ["drift", "followers", "stale", "staleness", "steps"]
