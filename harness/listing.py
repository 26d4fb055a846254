"""What ``moebench list`` shows: one row per name or file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from harness import presets
from harness.errors import UserError, unknown
from harness.routing import walk
from harness.routing.generators import WHAT
from harness.specs import Workload

KINDS = ("systems", "slots", "models", "clusters", "workloads", "suites")
Names = Sequence[str]  # of presets or of YAML files; none: all


def listing(kind: str, names: Names = ()) -> list[dict[str, Any]]:
    """A short row for each system, preset or suite."""
    rows = {
        "systems": _systems_short,
        "slots": _slots_short,
        "models": _models,
        "clusters": _clusters,
        "workloads": _workloads,
        "suites": _suites,
    }[kind]
    return rows(names)


def full(kind: str, names: Names = ()) -> list[dict[str, Any]]:
    """Everything about each system, preset or suite, for scripts; presets carry their ``digest``."""
    made = {"systems": _systems, "slots": _slots, "suites": _suites}.get(kind)
    if made is not None:
        return made(names)
    return [spec.model_dump(mode="json") | {"digest": spec.digest} | _fitted(spec) for spec in _specs(kind, names)]


def _fitted(spec: Any) -> dict[str, Any]:
    """What a workload is fitted to, where it is fitted to a trace."""
    if not isinstance(spec, Workload) or not (found := walk.told(spec)):
        return {}
    return {"fitted": [dataclasses.asdict(each) for each in found]}


def _specs(kind: str, names: Names) -> list[Any]:
    get = {"models": presets.model, "clusters": presets.cluster, "workloads": presets.workload}[kind]
    return [get(name) for name in names or presets.names(kind)]  # type: ignore[arg-type]


def _systems(names: Names) -> list[dict[str, Any]]:
    from harness.registry import state, system, systems

    chosen = {system(name).name: system(name) for name in names} or systems()
    return [
        {
            "name": name,
            "kind": system.kind,
            "title": system.title,
            **dict(zip(("version", "missing"), state(system), strict=True)),
            "options": dict(system.options),
            "source": system.source,
        }
        for name, system in chosen.items()
    ]


def _systems_short(names: Names) -> list[dict[str, Any]]:
    return [
        {"name": s["name"], "kind": s["kind"], "version": s["version"], "what": s["title"], "missing": s["missing"]}
        for s in _systems(names)
    ]


def _slots(names: Names) -> list[dict[str, Any]]:
    """What recipes of systems are made of: of some slots, or names."""
    from harness import recipes

    rows = recipes.rows()
    words = {row[key] for row in rows for key in ("slot", "name", "short")}
    for name in names:
        if name not in words:
            raise unknown("slots", name, sorted(words), "slots and what they hold")
    return [row for row in rows if not names or {row["slot"], row["name"], row["short"]} & set(names)]


def _slots_short(names: Names) -> list[dict[str, Any]]:
    return [
        {
            "slot": row["slot"] if not at or rows[at - 1]["slot"] != row["slot"] else "",
            "name": row["short"] + (" (default)" if row["default"] else ""),
            "what": row["what"],
            "options": ", ".join(row["options"]),
            "source": _paper(row["source"]),
        }
        for rows in [_slots(names)]
        for at, row in enumerate(rows)
    ]


def _models(names: Names) -> list[dict[str, Any]]:
    return [
        {
            "name": m.name,
            "layers": m.num_layers,
            "M": m.hidden,
            "H": m.ffn,
            "E": m.num_experts,
            "k": m.top_k,
            "shared": m.num_shared_experts,
            "L": m.seq,
            "ffn": m.ffn_type,
            "gate": m.gate,
            "source": _paper(m.source),
        }
        for m in _specs("models", names)
    ]


def _clusters(names: Names) -> list[dict[str, Any]]:
    rows = []
    for c in _specs("clusters", names):
        shape = " x ".join(
            f"{level.size} {level.name}" + (f" ({level.ports} ports)" if level.ports > 1 else "") for level in c.levels
        )
        rows.append(
            {
                "name": c.name,
                "kind": c.kind,
                "ranks": c.num_ranks,
                "levels": shape,
                "device": c.device,
                "source": _paper(c.source),
            }
        )
    return rows


def _workloads(names: Names) -> list[dict[str, Any]]:
    rows = []
    for w in _specs("workloads", names):
        params = ", ".join(f"{key} {value}" for key, value in w.params.items())
        if fitted := walk.told(w):
            params += f" ({walk.in_words(fitted)})"
        rows.append(
            {
                "name": w.name,
                "tokens/rank": str(w.tokens_per_rank),
                "generator": w.generator,
                "what": WHAT.get(w.generator, ""),
                "params": params,
                "source": _paper(w.source),
            }
        )
    return rows


def _suites(names: Names) -> list[dict[str, Any]]:
    from harness.bench import suite

    return [_suite(name) for name in names or suite.names()]


def _suite(name: str) -> dict[str, Any]:
    from harness.bench import suite

    row: dict[str, Any] = dict.fromkeys(("name", "cells", "systems", "phases", "clusters", "lacking"))
    try:
        found = suite.load(name, physical=True, strict=False)
    except UserError as error:
        if presets.is_file(name) or name not in suite.names():
            raise
        return row | {"name": name, "lacking": str(error)}  # one for GPUs that are not here
    cells = [*found.experiments, *(each.experiment for each in found.bad)]
    return row | {
        "name": found.name,
        "cells": len(cells),
        "systems": len({each.system for each in cells}),
        "phases": ", ".join(dict.fromkeys(each.phase for each in cells)),
        "clusters": ", ".join(dict.fromkeys(each.cluster.name for each in cells)),
        "lacking": "; ".join(dict.fromkeys(each.reason for each in found.bad)) or None,
    }


def _paper(source: str) -> str:
    """The paper alone, without section and table."""
    return re.split(r"[,;]| and ", source)[0]
