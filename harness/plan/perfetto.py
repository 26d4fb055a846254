"""Timelines as Chrome trace events, which https://ui.perfetto.dev and chrome://tracing open, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.plan.graph import Plan, Timeline


def write(path: Path, timelines: Mapping[str, Timeline]) -> Path:
    """One process per (timeline, rank), one thread per lane; microseconds from each timeline's own first start.

    A timeline with more axes than [num_tasks] or [num_tasks, ranks] has no single trace: ``ValueError``."""
    path.write_text(text(timelines), encoding="utf-8")
    return path


def text(timelines: Mapping[str, Timeline]) -> str:
    """What ``write`` writes."""
    found = json.dumps(events(timelines))
    return f'{{"traceEvents": {found}, "displayTimeUnit": "ms", "sha256": "{_digest(found)}"}}'


def _digest(found: str) -> str:
    return hashlib.sha256(found.encode()).hexdigest()


def read(path: Path) -> dict[str, Timeline]:
    """What ``write`` wrote, each [num_tasks, ranks]; tasks wait for none and cost nothing. ``ValueError`` if it is not
    that."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        found = whole["traceEvents"]
        if "sha256" in whole and whole["sha256"] != _digest(json.dumps(found)):
            raise ValueError("its contents are not those of its sha256")
        processes = {event["pid"]: event["args"]["name"] for event in found if event["name"] == "process_name"}
        lanes = {event["tid"]: event["args"]["name"] for event in found if event["name"] == "thread_name"}
        spans: dict[str, list[list[dict[str, Any]]]] = {}
        for process, label in processes.items():
            name = label.split(", rank ")[0]
            spans.setdefault(name, []).append([e for e in found if e["ph"] == "X" and e["pid"] == process])
        return {name: _timeline(ranks, lanes) for name, ranks in spans.items()}
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, RecursionError, UserError) as error:
        raise ValueError(f"{path}: not a trace of moebench ({type(error).__name__}: {error})") from None


def _timeline(ranks: list[list[dict[str, Any]]], lanes: Mapping[int, str]) -> Timeline:
    plan = Plan(lanes.values())
    for event in ranks[0]:
        plan.add(event["name"], lanes[event["tid"]], kind=event["cat"])
    start = np.array([[event["ts"] for event in rank] for rank in ranks]).T / 1e6
    return Timeline(plan, start, start + np.array([[event["dur"] for event in rank] for rank in ranks]).T / 1e6)


def events(timelines: Mapping[str, Timeline]) -> list[dict[str, Any]]:
    """The trace's events; see ``write``."""
    found: list[dict[str, Any]] = []
    process = 0
    for name, timeline in timelines.items():
        start, end = np.asarray(timeline.start_s), np.asarray(timeline.end_s)
        if start.ndim > 2:
            raise ValueError(f"timeline {name}: {start.ndim - 1} axes beside the tasks; select one configuration")
        start, end = start.reshape(len(start), -1), end.reshape(len(end), -1)
        origin = start.min() if start.size else 0.0
        for rank in range(start.shape[1]):
            process += 1
            label = f"{name}, rank {rank}" if start.shape[1] > 1 else name
            found.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": label}})
            for thread, lane in enumerate(timeline.plan.lanes):
                found.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": lane}})
            for here, task in enumerate(timeline.plan.tasks):
                found.append(
                    {
                        "ph": "X",
                        "name": task.name,
                        "cat": task.kind,
                        "pid": process,
                        "tid": timeline.plan.lanes.index(task.lane),
                        "ts": (start[here, rank] - origin) * 1e6,
                        "dur": (end[here, rank] - start[here, rank]) * 1e6,
                    }
                )
    return found
