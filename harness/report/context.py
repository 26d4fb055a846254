"""Sections about the run itself: what ran where, its routing, what did not work, its records."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from harness.bench.store import SIMULATED
from harness.errors import UserError
from harness.report import compare, page, words
from harness.report.page import Column, Html
from harness.report.run import GROUP, Run

QUICK = "moebench run --suite quick"
#: in a record, but shown elsewhere, or not a fact that tells anything to a reader of the page
_NOT_FACTS = {
    "experiments",
    "certificates",
    "conditions",
    "seeds",
    "repeats",
    "launch",
    "date",
    "cluster",
    "evidence",
    "wire",
    "job",
    "simulation",
}


def where(run: Run) -> Html:
    """What ran where: clusters and their network, launches and repetitions, versions, commit."""
    counts = (
        run.rows.groupby(GROUP, dropna=False)
        .agg(systems=("label", "nunique"), workloads=("workload", "nunique"), launches=("launch", "nunique"))
        .reset_index()
    )
    reps = compare.samples(run).groupby(GROUP)["rep"].nunique().rename("reps").reset_index()
    counts = counts.merge(reps, on=GROUP, how="left").fillna({"reps": 0})
    for cores in ("own_cores", "foreign_cores"):
        used = run.metric(cores).groupby(GROUP)["value"].median().rename(cores).reset_index()
        counts = counts.merge(used, on=GROUP, how="left")
    run.write_table("what_ran", counts)
    columns = [
        Column("cluster", "cluster", merge=True),
        Column("phase", "phase"),
        Column("model", "model"),
        Column("dtype", "dtype"),
        Column("evidence", "evidence", page.badge),
        Column("network", "network"),
        *(Column(key, key) for key in ("compute", "wire") if counts[key].nunique() > 1),
        Column("systems", "systems", str, "num"),
        Column("workloads", "workloads", str, "num"),
        Column("launches", "launches", str, "num"),
        Column("reps", "repeats", "{:.0f}".format, "num"),
        Column("own_cores", "cores, own", _number(1), "num"),
        Column("foreign_cores", "cores, others", _number(1), "num"),
    ]
    order = counts.sort_values(["cluster", *(c for c in GROUP if c != "cluster")], ignore_index=True)
    title = "What was simulated" if set(order["evidence"]) == {SIMULATED} else "What ran where"
    parts = [sweep(run.path), page.table(order, columns, title), simulated(run), _systems(run)]
    if run.records:
        parts += [_clusters(run), _models(run), _launch_facts(run)]
    else:
        parts.append(page.missing("No launch left a record, so versions, commit and network are unknown.", QUICK))
    return Html(*parts)


def simulated(run: Run) -> str:
    """What simulated times rest on, how far off that was where it was tried, and what the judge notes; empty where
    everything ran."""
    rows = run.rows[run.rows["evidence"] == SIMULATED]
    notes = rows[rows["metric"] == "note"].groupby("cell")["reason"].agg(lambda said: "; ".join(dict.fromkeys(said)))
    rows = rows[rows["metric"] == "time_s"].drop_duplicates("cell")
    if rows.empty:
        return ""
    rows = rows.assign(note=rows["cell"].map(notes).fillna(""), basis=rows["basis"].fillna("unknown"))
    keys = ["cluster", "phase", "compute", "basis"]
    found = rows.groupby(keys, sort=False).agg(
        cells=("cell", "nunique"), error=("heldout_error", words.heldout), note=("note", _few_notes)
    )
    columns = [
        Column("cluster", "cluster", merge=True),
        Column("phase", "phase"),
        *([Column("compute", "compute")] if rows["compute"].nunique() > 1 else []),
        Column("evidence", "evidence", page.badge),
        Column("basis", "rests on", kind="prose"),
        Column("error", "held-out error", kind="prose"),
        Column("cells", "cells", str, "num"),
        Column("note", "notes", kind="prose"),
    ]
    return page.table(found.reset_index().assign(evidence=SIMULATED), columns, "Simulated, not run")


def _few_notes(notes: pd.Series) -> str:
    said = [note for note in notes if note]
    return _few(pd.Series(said)) if said else ""


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
        *(
            Column(level, f"per {level}", _number(2), "num")
            for level in compare.SKEWS
            if level != "group" or frame[level].notna().any()
        ),
        Column("num_empty_experts", "idle experts", _number(0), "num", "experts without tokens"),
        *([Column("fitted", "walks as a trace does", kind="prose")] if frame["fitted"].any() else []),
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
        parts.append(_setbacks(frame, "Refused, failed, not run or marked"))
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


def instead(run: Run, wished: str) -> str:
    """Says that ratios are over another system than ``wished``; empty where they are not."""
    if run.baseline == wished:
        return ""
    return page.fill(
        '<p class="note">{{ wished }} has no time in this run, so ratios are over {{ found }}.</p>',
        wished=wished,
        found=run.baseline,
    )


def beside(run: Run, key: Mapping[str, Any] | None = None) -> str:
    """A table for beside those of times, of the group ``key`` or of all: who has no time, or lost one in some launch,
    and why; empty where nobody."""
    frame = compare.setbacks(run)
    frame = frame[frame["status"] != "cpu_bound"]  # these stand in the tables themselves, with their mark
    if key is not None:
        frame = frame[(frame[list(key)] == pd.Series(dict(key))).all(axis=1)]
    return _setbacks(frame, "Without a time, or with fewer than the others") if len(frame) else ""


def _setbacks(frame: pd.DataFrame, title: str) -> str:
    """Of ``compare.setbacks``, cells of one status and case in one row."""
    keys = [*GROUP, "label", "status", "timed"]
    merged = frame.groupby(keys, sort=False).agg(
        workloads=("workload", lambda s: ", ".join(dict.fromkeys(s))),
        reason=("reason", _few),
        launches=("launches", lambda s: ", ".join(sorted(set(", ".join(s).split(", ")), key=int))),
    )
    merged = merged.reset_index()
    merged["case"] = [
        words.group_title({str(k): v for k, v in case.items()}) for case in merged[GROUP].to_dict("records")
    ]
    merged["time"] = ["in other launches" if timed else "–" for timed in merged["timed"]]
    merged.loc[merged["status"] == "cpu_bound", "time"] = "marked"
    columns = [
        Column("status", "status", page.badge, merge=True),
        Column("label", "system", merge=True),
        Column("case", "case", kind="prose"),
        Column("workloads", "workloads", kind="prose"),
        Column("time", "time"),
        Column("reason", "why", kind="prose"),
        Column("launches", "launches"),
    ]
    return page.table(merged, columns, title)


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


def sweep(run_dir: Path) -> str:
    """Where a sweep fills the run: its cells by state, because the page may show a part of it."""
    from harness.sweep.states import OPEN, Sweep

    if not (run_dir / "sweep" / "sweep.json").exists():
        return ""
    found = Sweep.attach(run_dir)
    table = found.cells()
    counts = found.counts(table)
    part = "so far" if any(state in OPEN for state in counts) else "and nothing is open"
    rows = pd.DataFrame(
        [
            {
                "state": state,
                "cells": count,
                "why": _few(table[table["state"] == state]["reason"]) if state != "ok" else "",
            }
            for state, count in counts.items()
        ]
    )
    columns = [Column("state", "state"), Column("cells", "cells", str, "num"), Column("why", "why", kind="prose")]
    return page.table(rows, columns, "Cells of this sweep", part)


def _systems(run: Run) -> str:
    """What stands behind every name; a system that this installation lacks keeps its name."""
    told = run.rows[run.rows["metric"] == "how"]
    how = told.groupby("system")["reason"].agg(lambda reasons: "; ".join(dict.fromkeys(reasons))).to_dict()
    rows = []
    for name in dict.fromkeys(run.rows.drop_duplicates("label").set_index("label").loc[run.labels, "system"]):
        system = _system(name)
        facts = (
            (system.title, {"package": "real package", "native": "native"}[system.kind], system.source)
            if system
            else ()
        )
        rows.append((name, *(facts or ("not part of this installation", "–", "")), how.get(name, "–")))
    frame = pd.DataFrame(rows, columns=["system", "title", "kind", "source", "how"])
    columns = [
        Column("system", "system"),
        Column("title", "what it is", kind="prose"),
        Column("kind", "kind"),
        Column("source", "source", kind="prose"),
        *([Column("how", "how its experts computed", kind="prose")] if how else []),
    ]
    return page.table(frame, columns, "Systems")


def _system(name: str) -> Any:
    """None: not part of this installation."""
    from harness import registry  # imports torch, which nothing else here needs

    try:
        return registry.system(name)
    except UserError:
        return None


def _clusters(run: Run) -> str:
    rows = []
    for cluster in _specs(run, "cluster"):
        levels = list(cluster.get("levels") or [])
        rates = [f"{x['name']} {_rate(x['bandwidth_bytes_per_s'])}" for x in levels if x.get("bandwidth_bytes_per_s")]
        delays = [f"{x['name']} {x['latency_s'] * 1e6:g} µs" for x in levels if x.get("latency_s")]
        rows.append(
            {
                "name": cluster.get("name", ""),
                "kind": cluster.get("kind", ""),
                "levels": " × ".join(f"{x.get('size')} {x.get('name')}" for x in levels),
                "rates": ", ".join(rates) or "not stated",
                "delays": ", ".join(delays) or "none added",
                "device": cluster.get("device", ""),
            }
        )
    columns = [
        Column("name", "cluster"),
        Column("kind", "kind"),
        Column("levels", "link levels"),
        Column("rates", "rate of a port, one direction"),
        Column("delays", "latency"),
        Column("device", "device"),
    ]
    return page.table(
        pd.DataFrame(rows, columns=[c.key for c in columns]), columns, "Clusters", "outermost level first"
    )


def _models(run: Run) -> str:
    fields = {
        "name": "model", "num_layers": "layers", "hidden": "hidden M", "ffn": "FFN H", "num_experts": "experts E",
        "top_k": "top-k", "num_shared_experts": "shared experts", "ffn_type": "FFN", "gate": "gate",
    }  # fmt: skip
    frame = pd.DataFrame(_specs(run, "model"), columns=list(fields)).drop_duplicates()
    frame["num_shared_experts"] = frame["num_shared_experts"].fillna(0).astype(int)
    numbers = ("num_layers", "hidden", "ffn", "num_experts", "top_k", "num_shared_experts")
    columns = [Column(key, title, str, "num" if key in numbers else "text") for key, title in fields.items()]
    return page.table(frame, columns, "Models")


def _specs(run: Run, field: str) -> list[dict[str, Any]]:
    """The distinct models or clusters of the run's experiments, by name."""
    found = [e[field] for e in run.experiments.values() if isinstance(e.get(field), dict)]
    distinct = {json.dumps(spec, sort_keys=True): spec for spec in found}
    return sorted(distinct.values(), key=lambda spec: str(spec.get("name")))


def _rate(bytes_per_s: float) -> str:
    bits = bytes_per_s * 8
    return f"{bits / 1e9:g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:g} Mbit/s"


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
                facts.setdefault(key, {}).setdefault(_fact(key, value), []).append(who)
    if "versions" in facts:
        facts["versions"] = {_versions(run): []}
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


def _versions(run: Run) -> str:
    """Of every package in any launch; more than one only where launches differ."""
    found: dict[str, list[str]] = {}
    for record in run.records.values():
        for package, version in dict(record.get("versions") or {}).items():
            found.setdefault(str(package), []).append(str(version))
    return "; ".join(f"{package} {' or '.join(dict.fromkeys(found[package]))}" for package in sorted(found))


def _fact(key: str, value: Any) -> str:
    """One line of a record in words."""
    if key == "git" and isinstance(value, dict):
        changed = (
            f", with uncommitted changes (hash {str(value.get('diff_sha256'))[:12]})" if value.get("dirty") else ""
        )
        return f"commit {value.get('commit')}{changed}"
    if key == "memory_bytes" and isinstance(value, int | float):
        return f"{value / 2**30:.1f} GiB"
    return _flat(value)


def _flat(value: Any) -> str:
    """A record's value on one line, as words where it is a mapping."""
    if isinstance(value, dict):
        return "; ".join(f"{k.replace('_', ' ')} {_flat(v)}" for k, v in value.items() if v not in (None, "", {}, []))
    if isinstance(value, list):
        return " ".join(f"({_flat(item)})" if isinstance(item, dict) else _flat(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _number(digits: int) -> Any:
    return lambda value: f"{value:.{digits}f}" if math.isfinite(value) else "–"


__all__ = ["QUICK", "beside", "provenance", "routing", "setbacks", "where"]
