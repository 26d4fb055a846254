"""What ``moebench list`` shows: one row per name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from harness import presets

if TYPE_CHECKING:
    from harness.system import System

KINDS = ("systems", "models", "clusters", "workloads")


def listing(kind: str) -> list[dict[str, Any]]:
    """A short row for each system or preset."""
    return {"systems": _systems_short, "models": _models, "clusters": _clusters, "workloads": _workloads}[kind]()


def full(kind: str) -> list[dict[str, Any]]:
    """Everything about each system or preset, for scripts; presets carry their ``digest``."""
    if kind == "systems":
        return _systems()
    get = {"models": presets.model, "clusters": presets.cluster, "workloads": presets.workload}[kind]
    specs = [get(name) for name in presets.names(kind)]  # type: ignore[arg-type]
    return [spec.model_dump(mode="json") | {"digest": spec.digest} for spec in specs]


def _systems() -> list[dict[str, Any]]:
    from harness.registry import systems

    return [
        {
            "name": name,
            "kind": system.kind,
            "title": system.title,
            **_state(system),
            "options": dict(system.options),
            "source": system.source,
        }
        for name, system in systems().items()
    ]


def _state(system: type[System]) -> dict[str, str | None]:
    """Version, and what is missing; a system that cannot even tell is one that is missing something."""
    try:
        return {"version": system.version(), "missing": system.missing()}
    except Exception as error:  # a half-installed package may raise anything
        return {"version": None, "missing": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _systems_short() -> list[dict[str, Any]]:
    return [
        {"name": s["name"], "kind": s["kind"], "version": s["version"], "what": s["title"], "missing": s["missing"]}
        for s in _systems()
    ]


def _models() -> list[dict[str, Any]]:
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
        for m in map(presets.model, presets.names("models"))
    ]


def _clusters() -> list[dict[str, Any]]:
    rows = []
    for c in map(presets.cluster, presets.names("clusters")):
        shape = " x ".join(f"{level.size} {level.name}" for level in c.levels)
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


def _workloads() -> list[dict[str, Any]]:
    rows = []
    for w in map(presets.workload, presets.names("workloads")):
        params = ", ".join(f"{key} {value}" for key, value in w.params.items())
        rows.append(
            {
                "name": w.name,
                "tokens/rank": w.tokens_per_rank,
                "generator": w.generator,
                "params": params,
                "source": _paper(w.source),
            }
        )
    return rows


def _paper(source: str) -> str:
    """The paper alone, without section and table."""
    return re.split(r"[,;]| and ", source)[0]
