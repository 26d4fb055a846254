"""Timelines of plans as a Gantt chart: a row a lane, a bar a task, executed ones above simulated ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns

from harness.plan.graph import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _LANE, _TITLE = 9.6, 0.36, 0.42  # inches
_BAR = 0.84  # of a lane's height
_CHARACTER = 0.068  # inches of a label's character
#: kinds with a colour of their own, in the order of the palette; all others share a grey
KINDS = (
    "dispatch", "combine", "gather", "scatter", "experts", "gradients", "attention", "mp-gather", "mp-scatter",
    "optimizer",
)  # fmt: skip
HATCHED = ("gradients",)
#: for a caption
READING = "A bar is a task, its number the chunk; hatched: gradients between ranks. Dotted: the end."
OTHER, _GREY = "other", (0.72, 0.75, 0.78)


def gantt(timelines: Mapping[str, Timeline], *, rank: int = 0) -> Figure:
    """One panel a timeline under its title, all on one time axis from each one's first start.

    A timeline is [num_tasks], or [num_tasks, num_ranks] of which ``rank`` is drawn; ``ValueError`` for more axes or
    no timeline. Bars are coloured by kind (a colour-blind safe palette), slices of a gradient hatched too, and carry
    the number of their chunk, or their kind, where it fits; a lane without tasks takes no row.
    """
    if not timelines:
        raise ValueError("no timeline to draw")
    spans = {title: _spans(title, timeline, rank) for title, timeline in timelines.items()}
    lanes = {title: used_lanes(timeline) for title, timeline in timelines.items()}
    heights = [_LANE * max(1, len(used)) + _TITLE for used in lanes.values()]
    fig, axes = plt.subplots(
        len(timelines),
        1,
        figsize=(_WIDTH, sum(heights) + 0.9),
        height_ratios=heights,
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    longest_s = max((float(end.max()) for _, end in spans.values() if len(end)), default=0.0) or 1.0
    unit, scale = ("ms", 1e3) if longest_s >= 1e-3 else ("µs", 1e6)
    colors = _colors([task.kind for timeline in timelines.values() for task in timeline.plan.tasks])
    for ax, (title, timeline) in zip(axes.flat, timelines.items(), strict=True):
        start, end = spans[title]
        ax.set_xlim(0, longest_s * scale * 1.01)
        _bars(ax, timeline, start * scale, end * scale, lanes[title], colors)
        total = float(end.max()) * scale if len(end) else 0.0
        ax.set_title(f"{title}: {total:{',.0f' if total >= 100 else '.3g'}} {unit}")
        ax.axvline(total, color="#5b6675", lw=1, ls=":")
    axes.flat[-1].set_xlabel(f"time, {unit}")
    handles = [
        plt.Rectangle((0, 0), 1, 1, fc=color, ec="#1c2430", lw=0.6, hatch=_hatch(kind))
        for kind, color in colors.items()
    ]
    fig.legend(handles, list(colors), loc="outside upper left", ncols=min(6, len(colors)), frameon=False, fontsize=9.5)
    return fig


def used_lanes(timeline: Timeline) -> list[str]:
    """Lanes that have a task, in the plan's order."""
    used = {task.lane for task in timeline.plan.tasks}
    return [lane for lane in timeline.plan.lanes if lane in used]


def _spans(title: str, timeline: Timeline, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and end [num_tasks] in seconds since the first start."""
    start, end = np.asarray(timeline.start_s), np.asarray(timeline.end_s)
    if start.ndim > 2:
        raise ValueError(f"timeline {title}: {start.ndim - 1} axes beside the tasks; select one configuration")
    origin = start.min() if start.size else 0.0  # of all ranks: their waiting for each other is part of the picture
    if start.ndim == 2:
        start, end = start[:, rank], end[:, rank]
    return start - origin, end - origin


def _colors(kinds: list[str]) -> dict[str, tuple[float, float, float]]:
    """Kinds that occur, and ``OTHER``, -> colour; the same one in every figure."""
    known = dict(zip(KINDS, sns.color_palette("colorblind", len(KINDS)), strict=True))
    found = {kind: color for kind, color in known.items() if kind in set(kinds)}
    return found if set(kinds) <= set(KINDS) else found | {OTHER: _GREY}


def _bars(
    ax: Axes,
    timeline: Timeline,
    start: np.ndarray,
    end: np.ndarray,
    lanes: list[str],
    colors: Mapping[str, tuple[float, float, float]],
) -> None:
    inches = _WIDTH * 0.9 / ax.get_xlim()[1]  # of a unit of time
    for task, begin, finish in zip(timeline.plan.tasks, start, end, strict=True):
        width = finish - begin
        if width <= 0:
            continue  # a slice of no bytes is not a task to see
        color = colors.get(task.kind, _GREY)
        y = lanes.index(task.lane)
        ax.barh(
            y, width, left=begin, height=_BAR, facecolor=color, edgecolor="#1c2430", lw=0.6, hatch=_hatch(task.kind)
        )
        chunk = task.name.rsplit("[", 1)[1].rstrip("]") if "[" in task.name else ""
        for label in filter(None, (f"{task.kind} {chunk}".strip(), chunk)):
            if len(label) * _CHARACTER < width * inches:
                bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 0.5
                box = {"facecolor": color, "edgecolor": "none", "pad": 0.8} if _hatch(task.kind) else None
                ink = "#000000" if bright else "#ffffff"
                ax.text(begin + width / 2, y, label, ha="center", va="center", fontsize=7.5, color=ink, bbox=box)
                break
    ax.set_ylim(max(len(lanes), 1) - 0.5, -0.5)
    ax.set_yticks(range(len(lanes)), lanes)
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.set_axisbelow(True)


def _hatch(kind: str) -> str:
    return "////" if kind in HATCHED else ""


__all__ = ["HATCHED", "KINDS", "READING", "gantt", "used_lanes"]
