"""The sections of ``notebooks/summary.ipynb``. Each returns ``Html`` and keeps its table as CSV.

A section without data says what is missing and which command brings it; none of them fails because a run is poor.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from harness.bench.store import SIMULATED
from harness.memory import PARTS
from harness.report import compare, figures, page, words
from harness.report.context import QUICK, beside, provenance, routing, setbacks, where
from harness.report.drift import drift, staleness
from harness.report.page import Column, Html
from harness.report.run import GROUP, Run, in_order, load

_RUN = "moebench run EXPERIMENTS.yaml"
_EVIDENCE = Column("evidence", "evidence", page.badge)
_WORKLOAD = Column("workload", "workload", merge=True)


def headline(run: Run) -> Html:
    """Which system was fastest for what, by how much, on what evidence."""
    found = words.findings(run)
    if not found:
        missing = page.missing("No cell of this run has a time, so nothing can be said about speed.", QUICK)
        return Html(missing, beside(run))
    return Html(
        page.fill(
            """<ul class="headline">{% for f in found %}
<li{% if not f.sure %} class="unsure"{% endif %}>
<h3>{{ f.title }} {{ badge(f.evidence) }} {{ badge(f.network ~ " network") }}</h3>
{% for s in f.sentences %}<p{% if loop.last and not loop.first %} class="note"{% endif %}>{{ s }}</p>{% endfor %}</li>
{% endfor %}</ul>""",
            found=found,
            badge=page.badge,
        )
    )


def speedups(run: Run) -> Html:
    """Ratios to the baseline and to the control, and the times behind them."""
    times = compare.times(run)
    run.write_table("times", times)
    if times.empty:
        return Html(page.missing("No cell of this run has a time.", QUICK), beside(run))
    parts: list[str] = []
    ratios: dict[str, pd.DataFrame] = {}
    for reference in dict.fromkeys((run.baseline, run.control)):
        ratios[reference] = compare.speedups(run, reference)
        run.write_table(
            f"speedups_{''.join(c if c.isalnum() or c in '-_' else '_' for c in reference)}", ratios[reference]
        )
        parts.append(_speedup_figure(run, reference, ratios[reference]))
    for key, cells in run.rows.groupby(GROUP, sort=False):
        named = dict(zip(GROUP, key, strict=True))
        if len(group := times[times["cell"].isin(cells["cell"])]):
            parts += _speedup_tables(run, named, group, ratios)
        parts.append(beside(run, named))
    return Html(*parts)


def traffic(run: Run) -> Html:
    """Bytes per link level, planned and counted."""
    frame = compare.traffic(run)
    run.write_table("bytes", frame)
    if frame.empty:
        return Html(page.missing("No bytes were planned or counted in this run.", QUICK))
    counted = frame[frame["counted_bytes"].notna()]
    if counted.empty:
        first = page.missing(
            "Nothing counted the bytes: that takes interfaces between the nodes, so an emulated or a physical cluster. "
            "Planned bytes stand below.",
            _RUN,
            "with an emulated cluster in that file",
        )
    else:
        first = figures.drawn(
            lambda: figures.bytes_crossing(run, counted),
            alt="Bytes over each counted link level per system and workload, beside the planned bytes.",
            caption="Bytes over a link level in one repetition of the whole job, where they were counted. Counted "
            "bytes include what the wire adds (TCP and IP headers, acknowledgements); planned bytes are payload.",
        )
    columns = [
        _WORKLOAD,
        Column("label", "system", merge=True),
        Column("level", "link level"),
        Column("planned_bytes", "planned, MB", page.megabytes, "num"),
        Column("counted_bytes", "counted, MB", page.megabytes, "num"),
        Column("quotient", "counted / planned", _quotient, "num"),
        _EVIDENCE,
    ]
    unknown = frame["planned_bytes"].isna() & frame["counted_bytes"].isna()
    some = frame[unknown | (frame["planned_bytes"] > 0) | (frame["counted_bytes"] > 0)]
    note = "bytes of one repetition, all ranks" + ("; –: nobody can plan or count them" if unknown.any() else "")
    return Html(first, *_by_group(some, columns, note))


def light(run: Run) -> Html:
    """Times beside their speed of light."""
    frame = compare.times(run)
    frame = frame[frame["race"].isin(frame[frame["speed_of_light_s"].notna()]["race"])]
    if frame.empty:
        what = "No speed of light is known here: it takes a cluster whose links or devices have a stated rate."
        return Html(page.missing(what, _RUN, "with an emulated cluster in that file"))
    drawn = figures.drawn(
        lambda: figures.light(run, frame[frame["speed_of_light_s"].notna()]),
        alt="Time of every system per workload as a bar with its interval, and its speed of light as a black tick.",
        caption="The speed of light is a bound that no implementation of the same communication can pass: the bytes "
        "that must cross the bottleneck link over its rate, or the operations over the device's peak. "
        "Intervals wider than the panel are cut; the table has them whole.",
    )
    columns = [
        _WORKLOAD,
        Column("label", "system", merge=True),
        Column("time", "time, ms", _time, "num"),
        Column("speed_of_light_s", "speed of light, ms", page.milliseconds, "num"),
        Column("fraction", "fraction of it reached", page.percent, "num"),
        _EVIDENCE,
    ]
    return Html(drawn, *_by_group(_with_time(frame), columns))


def skew(run: Run) -> Html:
    """Speedup over the baseline against the realised imbalance."""
    realised = compare.skew(run)[["race", "rank"]].rename(columns={"rank": "skew"})
    frame = compare.speedups(run, run.baseline).merge(realised, on="race").dropna(subset=["skew"])
    frame = frame[frame.groupby(GROUP)["skew"].transform("nunique") > 1] if len(frame) else frame
    run.write_table("skew", frame)
    if frame.empty:
        what = f"A skew axis takes a speedup over {run.baseline} on two or more workloads of different imbalance."
        return Html(page.missing(what, _RUN, "with workloads such as zipf-2 and zipf-4 in that file"))
    return Html(
        figures.drawn(
            lambda: figures.skew(run, frame),
            alt=f"Speedup over {run.baseline} against realised max over mean load per rank, with 95 percent intervals.",
            caption="Each mark is one workload at the imbalance that its routing really has (certificate above); bars "
            "are 95 % intervals of the paired ratio. Lines join the workloads of one system and are no model. "
            "Workloads differ in more than this one number, so equal imbalance need not mean equal speedup.",
        )
    )


def training(run: Run) -> Html:
    """Losses of the training steps, which must agree; their times stand with the speedups."""
    frame = compare.losses(run)
    run.write_table("losses", frame)
    if frame.empty:
        return Html(page.missing("No training step was run.", _RUN, "with phase train_step in that file"))
    agreement = _agreement(run, frame)
    run.write_table("loss_agreement", agreement)
    columns = [
        Column("cluster", "cluster", merge=True),
        Column("dtype", "dtype", merge=True),
        _WORKLOAD,
        Column("label", "system"),
        Column("launch", "launch", str, "num"),
        Column("num_steps", "steps", str, "num"),
        Column("first", "first loss", "{:.4f}".format, "num"),
        Column("last", "last loss", "{:.4f}".format, "num"),
        Column("apart", "largest relative difference", lambda v: "0" if v == 0 else f"{v:.1e}", "num"),
        Column("reference", "from"),
        _EVIDENCE,
    ]
    return Html(
        figures.drawn(
            lambda: figures.loss(run, frame),
            alt="Training loss per step of every system; where systems agree, the curves lie on each other.",
            caption="Loss of every step. Systems that compute the same step must draw the same curve.",
        ),
        page.table(agreement, columns, "Do the systems train the same model?", "step times: speedup tables above"),
    )


def memory(run: Run) -> Html:
    """Bytes of a training step by part, measured, beside what was planned."""
    frame = compare.memory(run)
    run.write_table("memory", frame)
    if frame.empty:
        return Html(page.missing("No training step was run.", _RUN, "with phase train_step in that file"))
    frame["quotient"] = (frame["planned_bytes"] / frame["measured_bytes"]).where(frame["measured_bytes"] > 0)
    wide, quotient = (
        frame.pivot(index=compare.IDENTITY, columns="part", values=value).reindex(columns=PARTS)
        for value in ("measured_bytes", "quotient")
    )
    wide = wide.join(quotient.add_suffix("_planned")).reindex(
        pd.MultiIndex.from_frame(frame[compare.IDENTITY]).unique()
    )
    said = ("activations", "peak")
    columns = [
        _WORKLOAD,
        Column("label", "system"),
        *(Column(part, f"{part}, MB", page.megabytes, "num") for part in PARTS),
        *(Column(f"{part}_planned", f"{part}, planned / measured", _quotient, "num") for part in said),
        _EVIDENCE,
    ]
    note = "each part of the rank that has the most of it"
    groups = wide.reset_index().groupby(GROUP, sort=False)
    return Html(
        *(
            page.table(group, columns, words.group_title(dict(zip(GROUP, key, strict=True))), note)
            for key, group in groups
        )
    )


def _quotient(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _agreement(run: Run, losses: pd.DataFrame) -> pd.DataFrame:
    """A row a system and launch: largest relative difference of its losses from the baseline's (else the first's)."""
    rows = []
    for (_, launch), group in losses.groupby(["race", "launch"], sort=False):
        curves = group.pivot_table(index="step", columns="label", values="loss")
        reference = in_order(curves.columns, run.labels)[0]
        for label in in_order(curves.columns, run.labels):
            apart = ((curves[label] - curves[reference]) / curves[reference]).abs().max()
            first = group[group["label"] == label].iloc[0]
            loss = curves[label].dropna()
            facts = {"launch": launch, "label": label, "reference": reference, "num_steps": len(loss), "apart": apart}
            rows.append({**first[[*GROUP, "workload"]], **facts, "first": loss.iloc[0], "last": loss.iloc[-1]})
    return pd.DataFrame(rows)


def _speedup_figure(run: Run, reference: str, ratios: pd.DataFrame) -> str:
    if ratios.empty:
        rows = run.rows[(run.rows["system"] == reference) & (run.rows["status"] != "ok")]
        why = f" It was {rows.iloc[0]['status']}: {rows.iloc[0]['reason']}." if len(rows) else ""
        what = f"No other system shares a race with times of {reference}, so there is no ratio to it.{why}"
        return page.missing(what, _RUN, f"with {reference} among the systems of that file")
    role = "the baseline" if reference == run.baseline else "the control: native code without a paper's idea"
    simulated = set(ratios["evidence"]) == {SIMULATED}
    mark = "Mark: ratio of times, paired by launch and repetition; bar: 95 % interval; hollow mark: cpu_bound. A bar "
    mark += "that touches the dashed line shows no difference."
    return figures.drawn(
        lambda: figures.speedup(run, ratios),
        alt=f"Speedup over {reference} of every system per workload"
        f"{'' if simulated else ' with 95 percent intervals'}, as in the tables below.",
        caption=f"Speedup over {reference} ({role}). {'Simulated: nothing was run.' if simulated else mark}",
    )


def _speedup_tables(run: Run, key: dict[str, Any], times: pd.DataFrame, ratios: dict[str, pd.DataFrame]) -> list[str]:
    """One group: a row a workload and system; its time, its ratio to the baseline per direction and to the control."""
    main = words.main_direction(times)
    others = [d for d in compare.DIRECTIONS if d in set(times["direction"]) and d != main]
    times = _with_time(times)
    columns = [_WORKLOAD, Column("label", "system"), Column("time", f"time, ms, {main}", _time, "num")]
    for reference, ratio in ratios.items():
        itself = set(compare.references(run, reference).values())
        found = {(row["cell"], row["direction"]): row for row in ratio.to_dict("records")}
        for direction in [main, *others] if reference == run.baseline else [main]:
            name = f"over {reference}, {direction}"
            shown: list[Any] = [
                found.get((cell, direction), "itself" if cell in itself else "–") for cell in times["cell"]
            ]
            times[name] = pd.Series(shown, index=times.index, dtype=object)
            columns.append(Column(name, name, _ratio, "num"))
    launches = sorted(set(times["num_launches"]))
    columns += [Column("num_launches", "launches", str, "num")] if len(launches) > 1 else []
    columns.append(_EVIDENCE)
    if (times["status"] != "ok").any():
        columns.append(Column("status", "mark", lambda value: "" if value == "ok" else page.badge(value)))
    note = f"{key['network']} network, launches: {', '.join(map(str, launches))}; [95 % interval]"
    if key["evidence"] == SIMULATED:
        note = "simulated: nothing was run, and there are no intervals"
    if len(names := times[times["race"].isin(compare.drifting(run))]["workload"].unique()):
        note += (
            f"; {words.listed(names)}: means over different batches, as routing drifts (every step has a time below)"
        )
    parts = [page.table(times[times["direction"] == main], columns, words.group_title(key), note)]
    if others:
        columns = [*columns[:2], Column("direction", "direction"), Column("time", "time, ms", _time, "num"), _EVIDENCE]
        inner = page.table(times[times["direction"] != main], columns, f"{words.group_title(key)}, times by direction")
        parts.append(page.folded(f"times of {' and '.join(others)}", inner))
    return parts


def _by_group(frame: pd.DataFrame, columns: list[Column], note: str = "") -> list[str]:
    """A table a group in its main direction, with the other directions folded below; two columns lead to the rest."""
    parts = []
    for key, group in frame.groupby(GROUP, sort=False):
        named = dict(zip(GROUP, key, strict=True))
        title, main = words.group_title(named), words.main_direction(group)
        shown = group[group["direction"] == main]
        parts.append(
            page.table(
                shown, columns, title, ", ".join(filter(None, [words.direction_words(str(named["phase"]), main), note]))
            )
        )
        if len(others := group[group["direction"] != main]):
            split = [*columns[:2], Column("direction", "direction"), *columns[2:]]
            inner = page.table(others, split, f"{title}, by direction", note)
            parts.append(page.folded(" and ".join(others["direction"].unique()), inner))
    return parts


def _with_time(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with its estimate in one column ``time``, for ``_time``."""
    return frame.assign(
        time=pd.Series(frame[["point", "low", "high"]].to_dict("records"), index=frame.index, dtype=object)
    )


def _time(estimate: dict[str, float]) -> str:
    return page.milliseconds(estimate["point"], estimate["low"], estimate["high"])


def _ratio(value: str | dict[str, float]) -> str:
    return value if isinstance(value, str) else page.ratio(value["point"], value["low"], value["high"])


__all__ = [
    "drift",
    "headline",
    "light",
    "load",
    "provenance",
    "routing",
    "setbacks",
    "skew",
    "speedups",
    "staleness",
    "traffic",
    "training",
    "where",
]
