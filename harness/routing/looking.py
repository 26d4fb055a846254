"""What a trace looks like: skew of every step and layer, and how far the load moves from step to step. Counts are read
for it, no token is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.routing.trace import Trace

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # of a picture


def look(trace: Trace) -> dict[str, Any]:
    """Plain data. By layer: ``tokens``, ``skew`` (max/mean load over experts) and ``drift`` of every step: the
    total-variation distance of its loads from those of the step before, 0 to 1, NaN for the first."""
    header, layers = trace.header, []
    for layer in trace.layers:
        tokens, skew, drift, before = [], [], [], None
        for step in trace.steps:
            if (step, layer) not in trace:
                continue
            load = trace.counts(step, layer).sum(0).astype(np.float64)
            share = load / load.sum() if load.any() else load
            tokens.append(trace.num_tokens(step, layer))
            skew.append(float(share.max() * len(share)) if load.any() else 1.0)
            drift.append(np.nan if before is None else float(np.abs(share - before).sum() / 2))
            before = share
        layers.append({"layer": layer, "tokens": tokens, "skew": skew, "drift": drift})
    first = (trace.steps[0], trace.layers[0]) if len(trace) else None
    ranks = None if first is None else trace.ranks(*first)
    return {
        "path": str(trace.path),
        "kind": header.kind,
        "schema_version": header.schema_version,
        "model": header.model,
        "corpus": header.corpus,
        "steps": trace.steps,
        "num_layers": len(trace.layers),
        "num_experts": header.num_experts,
        "top_k": header.top_k,
        "ranks": None if ranks is None else len(ranks),
        "rule": header.rule,
        "source": header.source,
        "layers": layers,
    }


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a layer."""
    rows = []
    for each in found["layers"]:
        skew, drift, tokens = (np.array(each[name], dtype=float) for name in ("skew", "drift", "tokens"))
        few = f"{tokens.min():.0f}" if tokens.min() == tokens.max() else f"{tokens.min():.0f} to {tokens.max():.0f}"
        rows.append(
            {
                "layer": each["layer"],
                "tokens a step": few,
                "skew, first": float(skew[0]),
                "mean": float(skew.mean()),
                "largest": float(skew.max()),
                "last": float(skew[-1]),
                "drift a step": float(np.nanmean(drift)) if len(drift) > 1 else None,
                "skew, step by step": picture(skew),
            }
        )
    return rows


def picture(values: Sequence[float] | np.ndarray) -> str:
    """Bars from 1 (balanced) to the largest; of many steps the largest of each few.

    >>> picture([1, 2, 3])
    '▁▅█'
    """
    array = np.asarray(values, dtype=float)
    parts = np.array([part.max() for part in np.array_split(array, min(WIDTH, len(array)))])
    top = max(parts.max() - 1, 1e-9)
    return "".join(BARS[int(np.clip(np.ceil((value - 1) / top * 7), 0, 7))] for value in parts)
