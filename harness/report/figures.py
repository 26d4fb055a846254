"""Figures of the report. One colour, marker and hatch per system throughout; intervals are always drawn."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from harness.report import page
from harness.report.run import GROUP, Run
from harness.report.words import direction_words, group_title, main_direction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X<>"
_HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "++", "oo", "--", "||", "**")
_WIDTH = 9.6  # inches, the width of the page's column

STYLE = {
    "text.parse_math": False,  # a name with dollar signs is a name
    "svg.hashsalt": "moebench",  # the same run renders to the same bytes
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8b95a1",
    "axes.labelcolor": "#1c2430",
    "xtick.color": "#1c2430",
    "ytick.color": "#1c2430",
    "grid.color": "#e3e7ec",
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Look:
    """How one system is drawn."""

    color: tuple[float, float, float]
    marker: str
    hatch: str

    @property
    def pale(self) -> tuple[float, ...]:
        """Face of a bar: opaque, because an SVG hatch pattern ignores transparency."""
        return tuple(0.5 + channel / 2 for channel in self.color)


def styled() -> contextlib.AbstractContextManager[None]:
    """Draw and save inside this: the report's style, and nobody else's."""
    return plt.rc_context(dict(sns.axes_style("ticks"), **STYLE))


def drawn(make: Callable[[], Figure], alt: str, caption: str) -> str:
    """What ``make`` draws, in the report's style, as HTML with its alternative text and caption."""
    with styled():
        return page.figure(make(), alt, caption)


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Label -> look; colour-blind safe and told apart by shape as well."""
    colors = sns.color_palette("colorblind", 10)
    return {
        label: Look(colors[i % 10], _MARKERS[i % len(_MARKERS)], _HATCHES[i % len(_HATCHES)])
        for i, label in enumerate(labels)
    }


def speedup(run: Run, speedups: pd.DataFrame) -> Figure:
    """Speedup over the reference with its interval: a panel a group, a band a workload, a mark a system."""
    panels = list(_panels(speedups))
    heights = [max(1.0, 0.27 * len(rows) + 0.25 * rows["race"].nunique()) for _, rows in panels]
    fig, axes = stack(heights)
    look = looks(run.labels)
    for ax, (title, rows) in zip(axes, panels, strict=True):
        _forest(ax, rows, look)
        ax.set_title(title)
    reference = speedups["reference"].iloc[0]
    axes[-1].set_xlabel(f"speedup: time of {reference} / time of the system (log scale; right of 1 is faster)")
    legend(fig, look, speedups["label"])
    return fig


def light(run: Run, times: pd.DataFrame) -> Figure:
    """Time per cell as a bar with its interval, and its speed of light as a tick on it."""
    panels = list(_panels(times))
    heights = [max(1.0, 0.25 * len(rows) + 0.2 * rows["race"].nunique()) for _, rows in panels]
    fig, axes = stack(heights)
    look = looks(run.labels)
    for ax, (title, rows) in zip(axes, panels, strict=True):
        ys, centers, names = _bands(rows)
        _bars(ax, ys, rows, rows["point"] * 1e3, look)
        ax.hlines(ys, rows["low"] * 1e3, rows["high"] * 1e3, color="#1c2430", lw=1.1)
        bound = rows["speed_of_light_s"].to_numpy() * 1e3
        ax.vlines(bound, ys - 0.45, ys + 0.45, color="#000000", lw=2.2)
        ax.set_yticks(centers, names)
        longest_s = float(rows["point"].max())
        ax.set_xlim(0, 1e3 * min(1.5 * longest_s, 1.04 * float(rows["high"].fillna(rows["point"]).max())))
        ax.set_title(title)
    axes[-1].set_xlabel("time of one repetition, ms (bar: time with 95 % interval; black tick: speed of light)")
    legend(fig, look, times["label"], bars=True)
    return fig


def bytes_crossing(run: Run, traffic: pd.DataFrame) -> Figure:
    """Bytes over every link level of ``traffic``: counted as a bar, planned as a diamond; a panel a level."""
    panels = [
        (f"{title}, level {level}", rows.reset_index(drop=True))
        for title, group in _panels(traffic)
        for level, rows in group.groupby("level", sort=False)
    ]
    heights = [max(1.0, 0.25 * len(rows) + 0.2 * rows["race"].nunique()) for _, rows in panels]
    fig, axes = stack(heights)
    look = looks(run.labels)
    for ax, (title, rows) in zip(axes, panels, strict=True):
        ys, centers, names = _bands(rows)
        _bars(ax, ys, rows, rows["counted_bytes"] / 1e6, look)
        ax.scatter(rows["planned_bytes"] / 1e6, ys, marker="d", s=34, facecolor="white", edgecolor="black", zorder=4)
        ax.set_yticks(centers, names)
        ax.set_xlim(left=0)
        ax.set_title(title)
    axes[-1].set_xlabel("bytes over the link in one repetition, MB (bar: counted; white diamond: planned)")
    legend(fig, look, traffic["label"], bars=True)
    return fig


def skew(run: Run, speedups: pd.DataFrame) -> Figure:
    """Speedup over the reference against the routing's realised max/mean per rank (column ``skew``)."""
    panels = list(_panels(speedups))
    columns = min(2, len(panels))
    rows_of = math.ceil(len(panels) / columns)
    fig, grid = plt.subplots(
        rows_of, columns, figsize=(_WIDTH if columns > 1 else 6.2, 3.1 * rows_of), squeeze=False, layout="constrained"
    )
    look = looks(run.labels)
    for ax in list(grid.flat)[len(panels) :]:
        ax.remove()
    for ax, (title, rows) in zip(grid.flat, panels, strict=False):
        width = 0.012 * (rows["skew"].max() - rows["skew"].min())
        labels = [label for label in look if label in set(rows["label"])]
        for i, label in enumerate(labels):  # a little beside each other, so that no interval hides another
            line = rows[rows["label"] == label].sort_values("skew")
            place = line["skew"] + width * (i - (len(labels) - 1) / 2)
            error = np.abs(line[["low", "high"]].to_numpy().T - line["point"].to_numpy())
            mine = look[label]
            ax.errorbar(place, line["point"], error, color=mine.color, marker=mine.marker, lw=1.3, capsize=3)
        ax.axhline(1, color="#5b6675", lw=1, ls="--")
        ax.grid(True)
        ax.set_title(textwrap.fill(title, 58), fontsize=9.5)
        ax.set_yscale("log")
        marks = ticks(*ax.get_ylim())
        ax.set_yticks(marks, [f"{tick:g}×" for tick in marks])
        ax.set_yticks([], minor=True)
        ax.set_xlabel("realised max/mean load per rank")
        ax.set_ylabel(f"speedup over {rows['reference'].iloc[0]}")
    legend(fig, look, speedups["label"])
    return fig


def loss(run: Run, losses: pd.DataFrame) -> Figure:
    """Loss over training steps, a panel a race; curves that agree lie on each other, so marks are staggered."""
    races = list(losses.groupby("race", sort=False))
    fig, axes = plt.subplots(len(races), 1, figsize=(_WIDTH, 2.7 * len(races)), squeeze=False, layout="constrained")
    look = looks(run.labels)
    for ax, (_, rows) in zip(axes.flat, races, strict=True):
        labels = list(rows["label"].unique())
        for i, label in enumerate(labels):
            curve = rows[rows["label"] == label].groupby("step")["loss"].median()
            mine = look[label]
            every = max(1, len(curve) // 8)
            start = min(i * max(1, every // len(labels)), len(curve) - 1)
            ax.plot(curve, color=mine.color, marker=mine.marker, markevery=(start, every), lw=1.4, ms=6, alpha=0.9)
        first = rows.iloc[0]
        ax.set_title(f"{group_title(dict(first[GROUP]))}, {first['workload']}")
        ax.set_ylabel("loss, nats per token")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(True)
    axes.flat[-1].set_xlabel("training step")
    legend(fig, look, losses["label"])
    return fig


def steps(run: Run, frame: pd.DataFrame, skews: Sequence[str]) -> Figure:
    """Of one race: max/mean load per ``skews`` of each step above, times below; a ring where experts moved behind a
    step, a bar where an interval is known."""
    fig, axes = plt.subplots(
        2, 1, figsize=(_WIDTH, 5.6), height_ratios=[1, 2.4], sharex=True, layout=ConstrainedLayoutEngine(h_pad=0.09)
    )
    above, below = axes
    each = frame.drop_duplicates("step").sort_values("step")
    for level, style in zip(skews, ("-", "--", ":", "-."), strict=False):
        above.plot(each["step"], each[level], style, color="#1c2430", lw=1.5, label=f"per {level}")
    above.set_ylabel("max/mean load")
    above.set_ylim(bottom=1)
    above.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9.5)
    look = looks(run.labels)
    labels = list(dict.fromkeys(frame["label"]))
    for i, label in enumerate(labels):  # a little beside each other, so that no interval hides another
        line, mine = frame[frame["label"] == label], look[label]
        place, time_ms = line["step"] + 0.5 * (i / len(labels) - 0.5), line["point"] * 1e3
        below.plot(place, time_ms, color=mine.color, marker=mine.marker, ms=4.5, lw=1.3)
        below.vlines(place, line["low"] * 1e3, line["high"] * 1e3, color=mine.color, lw=0.9, alpha=0.7)
        moved = line["moves"] > 0
        ring = {"s": 110, "facecolor": "none", "edgecolor": mine.color, "linewidth": 1.4, "zorder": 4}
        below.scatter(place[moved], time_ms[moved], **ring)
    widest = float(frame["high"].fillna(frame["point"]).max())
    below.set_ylim(0, 1e3 * min(1.05 * widest, 1.5 * float(frame["point"].max())))
    below.set_ylabel("time of the step, ms")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        ax.grid(True)
    legend(fig, look, frame["label"])
    return fig


def _panels(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and rows of every group, in the group's main direction."""
    for key, rows in frame.groupby(GROUP, sort=False):
        group: dict[str, Any] = dict(zip(GROUP, key, strict=True))
        direction = main_direction(rows)
        what = direction_words(group["phase"], direction)
        title = f"{group_title(group)}, {what} [{group['evidence']}]"
        yield title, rows[rows["direction"] == direction].reset_index(drop=True)


def stack(heights: list[float]) -> tuple[Figure, list[Axes]]:
    """Panels one below the other, each as high as its content."""
    fig, axes = plt.subplots(
        len(heights),
        1,
        figsize=(_WIDTH, sum(heights) + 0.75 * len(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout=ConstrainedLayoutEngine(h_pad=0.09),
    )
    return fig, list(axes.flat)


def _bands(rows: pd.DataFrame) -> tuple[np.ndarray, list[float], list[str]]:
    """Vertical place of every row (first on top), the centre and the name of every workload's band."""
    new_band = (rows["race"] != rows["race"].shift()).cumsum().to_numpy() - 1
    ys = -(np.arange(len(rows)) + 0.8 * new_band)
    bands = pd.Series(ys).groupby(rows["race"].to_numpy(), sort=False)
    return ys, list(bands.mean()), list(rows.drop_duplicates("race")["workload"])


def _forest(ax: Axes, rows: pd.DataFrame, look: dict[str, Look]) -> None:
    ys, centers, names = _bands(rows)
    for y, row in zip(ys, rows.to_dict("records"), strict=True):
        mine = look[row["label"]]
        hollow = row["status"] != "ok"
        ax.plot([row["low"], row["high"]], [y, y], color=mine.color, lw=2.2, solid_capstyle="butt")
        ax.plot(row["point"], y, mine.marker, color=mine.color, ms=7, mfc="white" if hollow else mine.color, zorder=3)
        edge = row["high"] if math.isfinite(row["high"]) else row["point"]
        ax.annotate(f"{row['point']:.2f}×", (edge, y), (7, 0), textcoords="offset points", va="center", fontsize=8.5)
    ax.axvline(1, color="#5b6675", lw=1, ls="--", zorder=1)
    ax.set_xscale("log")
    low, high = (
        np.nanmin([rows["low"].min(), rows["point"].min()]),
        np.nanmax([rows["high"].max(), rows["point"].max()]),
    )
    ax.set_xlim(min(0.9, low / 1.05), max(1.12, high * 1.18))
    marks = ticks(*ax.get_xlim())
    ax.set_xticks(marks, [f"{tick:g}×" for tick in marks])
    ax.set_xticks([], minor=True)
    ax.grid(True, axis="x")
    ax.set_axisbelow(True)
    ax.set_ylim(ys.min() - 0.8, 0.8)
    ax.set_yticks(centers, names)
    ax.tick_params(axis="y", length=0)


def ticks(low: float, high: float) -> list[float]:
    """Round values of a log axis, as dense as its range allows."""
    steps = {1.6: 0.1, 2.5: 0.2, 4.0: 0.5}
    step = next((step for ratio, step in steps.items() if high / low < ratio), None)
    if step:
        return [round(i * step, 2) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    mantissas = (1, 1.5, 2, 3, 4, 5, 7) if high / low < 15 else (1, 2, 5)
    return [x for d in decades for m in mantissas if low <= (x := round(m * 10.0**d, 9)) <= high]


def _bars(ax: Axes, ys: np.ndarray, rows: pd.DataFrame, widths: pd.Series, look: dict[str, Look]) -> None:
    for y, width, label in zip(ys, widths, rows["label"], strict=True):
        mine = look[label]
        ax.barh(y, width, height=0.82, facecolor=mine.pale, edgecolor=mine.color, hatch=mine.hatch, lw=0.8)
    ax.grid(True, axis="x")
    ax.set_axisbelow(True)
    ax.set_ylim(ys.min() - 0.8, 0.8)
    ax.tick_params(axis="y", length=0)


def legend(fig: Figure, look: dict[str, Look], labels: pd.Series, bars: bool = False) -> None:
    shown = [label for label in look if label in set(labels)]
    if bars:
        handles: list[Any] = [
            plt.Rectangle((0, 0), 1, 1, fc=look[x].pale, ec=look[x].color, hatch=look[x].hatch) for x in shown
        ]
    else:
        handles = [Line2D([], [], color=look[x].color, marker=look[x].marker, ms=7, lw=2) for x in shown]
    fig.legend(handles, shown, loc="outside upper left", ncols=_columns(fig, shown), frameon=False, fontsize=9.5)


def _columns(fig: Figure, labels: Sequence[str]) -> int:
    """Of a legend: as many as fit beside each other by the longest label, at most 5."""
    points = 72 * fig.get_figwidth() / (40 + 5.5 * max(map(len, labels), default=0))
    return max(1, min(5, len(labels), int(points)))
