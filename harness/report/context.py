"""Sections about the run itself: what ran where, its routing, what did not work, its records."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
from markupsafe import Markup

from harness.report import compare, page, words
from harness.report.page import Column, Html
from harness.report.run import GROUP, Run

QUICK = "moebench run --suite quick"
_NOT_FACTS = {
    "experiments",
    "certificates",
    "seeds",
    "repeats",
    "launch",
    "date",
    "cluster",
}  # shown elsewhere or per race


def where(run: Run) -> Html:
    """What ran where: clusters and their network, launches and repetitions, versions, commit."""
    counts = (
        run.rows.groupby(GROUP, dropna=False)
        .agg(systems=("label", "nunique"), workloads=("workload", "nunique"), launches=("launch", "nunique"))
        .reset_index()
    )
    reps = compare.samples(run).groupby(GROUP)["rep"].nunique().rename("reps").reset_index()
    counts = counts.merge(reps, on=GROUP, how="left").fillna({"reps": 0})
    run.write_table("what_ran", counts)
    columns = [
        Column("cluster", "cluster", merge=True),
        Column("phase", "phase"),
        Column("model", "model"),
        Column("dtype", "dtype"),
        Column("evidence", "evidence", page.badge),
        Column("network", "network"),
        Column("compute", "compute"),
        Column("wire", "wire"),
        Column("systems", "systems", str, "num"),
        Column("workloads", "workloads", str, "num"),
        Column("launches", "launches", str, "num"),
        Column("reps", "repetitions", "{:.0f}".format, "num", "timed in each launch"),
    ]
    order = counts.sort_values(["cluster", *(c for c in GROUP if c != "cluster")], ignore_index=True)
    parts = [page.table(order, columns, "What ran where", "repetitions: timed in each launch")]
    if run.records:
        parts.append(_launch_facts(run))
    else:
        parts.append(page.missing("No launch left a record, so versions, commit and network are unknown.", QUICK))
    return Html(*parts)


def routing(run: Run) -> Html:
    """The certificate of every race's routing."""
    frame = compare.skew(run)
    frame = frame.drop_duplicates(["cluster", "model", "workload", "digest", *compare.SKEWS])
    frame = frame.sort_values(["cluster", "model", "rank", "workload"], ignore_index=True)
    run.write_table("routing", frame)
    if frame[list(compare.SKEWS)].isna().all(axis=None):
        return Html(page.missing("No certificate of any routing was stored.", QUICK))
    columns = [
        Column("cluster", "cluster", merge=True),
        Column("model", "model", merge=True),
        Column("workload", "workload"),
        Column("digest", "routing hash", lambda value: Markup("<code>{}</code>").format(value) if value else "–"),
        Column("tokens", "ranks × tokens"),
        *(Column(level, f"per {level}", _number(2), "num") for level in compare.SKEWS),
        Column("num_empty_experts", "idle experts", _number(0), "num", "experts without tokens"),
    ]
    return Html(
        page.table(frame, columns, "Realised imbalance of every routing", "max/mean load; 1.00 is perfectly even")
    )


def setbacks(run: Run) -> Html:
    """What was refused, failed or marked, and why; files that could not be read."""
    frame = compare.setbacks(run)
    run.write_table("setbacks", frame)
    parts = []
    if frame.empty:
        parts.append("<p>Every cell of this run ran, agreed with the oracle and was timed without a mark.</p>")
    else:
        keys = [*GROUP, "label", "status"]
        merged = frame.groupby(keys, sort=False).agg(
            workloads=("workload", lambda s: ", ".join(dict.fromkeys(s))),
            reason=("reason", _few),
            launches=("launches", _few),
        )
        columns = [
            Column("status", "status", page.badge, merge=True),
            Column("label", "system", merge=True),
            Column("phase", "phase"),
            Column("cluster", "cluster"),
            Column("model", "model"),
            Column("dtype", "dtype"),
            Column("workloads", "workloads", kind="prose"),
            Column("reason", "why", kind="prose"),
            Column("launches", "launches"),
        ]
        parts.append(page.table(merged.reset_index(), columns, "Refused, failed or marked"))
        used = [(status, words.STATUS_WORDS.get(status, "")) for status in dict.fromkeys(frame["status"])]
        parts.append(
            page.fill(
                "<dl>{% for status, text in used %}<dt>{{ status }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>", used=used
            )
        )
    if run.damaged:
        parts.append(
            page.fill(
                "<h3>Files that could not be read</h3><ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>",
                lines=run.damaged,
            )
        )
    return Html(*parts)


def provenance(run: Run) -> Html:
    """The records of every launch, folded."""
    if not run.records:
        return Html(page.missing("No launch left a record.", QUICK))
    texts = {name: json.dumps(record, indent=1, sort_keys=True, default=str) for name, record in run.records.items()}
    return Html(
        *(
            page.folded(f"record {name} (JSON)", page.fill("<pre>{{ text }}</pre>", text=text))
            for name, text in texts.items()
        )
    )


def _few(values: pd.Series) -> str:
    """The distinct values, or the first three of many (the CSV has them all)."""
    distinct = list(dict.fromkeys(value or "no reason was stored" for value in values))
    more = f"; and {len(distinct) - 3} more like these" if len(distinct) > 3 else ""
    return "; ".join(distinct[:3]) + more


def _launch_facts(run: Run) -> str:
    """Versions, device, commit, network: one line a fact, with the launches that it holds for where they differ."""
    facts: dict[str, dict[str, list[str]]] = {}
    for name, record in run.records.items():
        who = f"launch {record['launch']} on {record.get('cluster')}" if "launch" in record else name
        for key, value in record.items():
            if key not in _NOT_FACTS and value not in (None, "", {}, []):
                facts.setdefault(key, {}).setdefault(_flat(value), []).append(who)
    dates = sorted(str(record["date"])[:19].replace("T", " ") for record in run.records.values() if "date" in record)
    lines = [("date", " to ".join(dict.fromkeys([dates[0], dates[-1]])) + " UTC", "")] if dates else []
    lines += [
        (key.removesuffix("_bytes").replace("_", " "), value, ", ".join(names) if len(values) > 1 else "")
        for key, values in facts.items()
        for value, names in values.items()
    ]
    return page.fill(
        "<h3>What every launch recorded</h3><dl>{% for key, value, names in lines %}<dt>{{ key }}</dt>"
        "<dd>{{ value }}{% if names %} <small>({{ names }})</small>{% endif %}</dd>{% endfor %}</dl>",
        lines=lines,
    )


def _flat(value: Any) -> str:
    """A record's value on one line, as words where it is a mapping."""
    if isinstance(value, dict):
        return "; ".join(f"{k.replace('_', ' ')} {_flat(v)}" for k, v in value.items() if v not in (None, "", {}, []))
    if isinstance(value, list):
        return " ".join(_flat(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _number(digits: int) -> Any:
    return lambda value: f"{value:.{digits}f}" if math.isfinite(value) else "–"


__all__ = ["QUICK", "provenance", "routing", "setbacks", "where"]
