"""Figures of simulated studies, with the reported numbers as open diamonds where the paper prints them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from harness.report.figures import legend, looks, stack, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _SOFT = "#1c2430", "#5b6675"


def spread(
    frame: pd.DataFrame,
    *,
    value: str,
    label: str,
    panel: str,
    printed: Mapping[tuple[str, str], float],
    xlabel: str,
    order: Sequence[str],
) -> Figure:
    """How ``value`` spreads over configurations: per ``panel`` and ``label`` the range as a line, the middle half as a
    bar, the mean as the label's mark, and the mean that the paper prints (``printed``, by panel and label) as a
    diamond. Several marks above each other need no legend: each row has its name."""
    panels = list(frame.groupby(panel, sort=True))
    fig, axes = stack([0.4 * len(order)] * len(panels))
    look = looks(order)
    for ax, (name, rows) in zip(axes, panels, strict=True):
        for y, each in enumerate(order):
            values = rows[rows[label] == each][value].to_numpy()
            if not len(values):
                continue
            mine = look[each]
            low, first, third, high = np.quantile(values, [0, 0.25, 0.75, 1])
            ax.hlines(y, low, high, color=mine.color, lw=1.2)
            ax.barh(y, third - first, left=first, height=0.5, facecolor=mine.pale, edgecolor=mine.color, lw=0.8)
            ax.plot(values.mean(), y, mine.marker, color=mine.color, mec="white", ms=7.5, zorder=3)
            note = f"{values.mean():.2f}"
            if (str(name), each) in printed:
                ax.plot(printed[str(name), each], y, "d", mfc="white", mec="black", ms=7, zorder=4)
                note += f" (reported {printed[str(name), each]:.2f})"
            ax.annotate(note, (high, y), (7, 0), textcoords="offset points", va="center", fontsize=8.5)
        _rows(ax, order)
        ax.set_title(f"{panel} {name} [simulated]")
        low, high = frame[value].min(), frame[value].max()
        ax.set_xlim(low - 0.03 * (high - low), high + 0.22 * (high - low))
    axes[-1].set_xlabel(xlabel)
    handles: list[Any] = [
        Line2D([], [], color=_INK),
        plt.Rectangle((0, 0), 1, 1, fc="#c9d2dc", ec=_INK),
        Line2D([], [], color=_INK, ls="none", marker="o"),
        Line2D([], [], color=_INK, ls="none", marker="d", mfc="white"),
    ]
    names = ["range", "middle half", "mean, simulated", "mean, reported"]
    fig.legend(handles, names, loc="outside upper left", ncols=4, frameon=False, fontsize=9.5)
    return fig


def moves(
    frame: pd.DataFrame, *, value: str, change: str, panel: str, printed: Mapping[str, float], xlabel: str
) -> Figure:
    """Where each ``change`` of an assumption moves ``value`` to, per ``panel``, from the first change (the default, a
    dotted line); the reported value (``printed``, by panel) as a dashed line."""
    changes = list(dict.fromkeys(frame[change]))
    panels = list(frame.groupby(panel, sort=True))
    fig, axes = plt.subplots(
        1,
        len(panels),
        figsize=(9.6, 0.27 * len(changes) + 1.3),
        sharey=True,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (ax, (name, rows)), color in zip(zip(axes.flat, panels, strict=True), ("#0173b2", "#de8f05"), strict=False):
        at = dict(zip(rows[change], rows[value], strict=True))
        default = at[changes[0]]
        for y, each in enumerate(changes):
            if each in at:
                ax.hlines(y, default, at[each], color=color, lw=2)
                ax.plot(at[each], y, "o", color=color, ms=6, zorder=3)
        ax.axvline(default, color=_SOFT, lw=1, ls=":")
        if str(name) in printed:
            ax.axvline(printed[str(name)], color=_INK, lw=1.2, ls="--")
        _rows(ax, changes)
        ax.set_title(f"{panel} {name} [simulated]")
        ax.set_xlabel(xlabel)
    handles = [Line2D([], [], color=_SOFT, ls=":"), Line2D([], [], color=_INK, ls="--")]
    fig.legend(handles, ["default assumptions", "reported"], loc="outside upper left", ncols=2, frameon=False)
    return fig


def lines(frame: pd.DataFrame, *, x: str, y: str, label: str, panels: tuple[str, str], ylabel: str) -> Figure:
    """``y`` (a ratio, log scale) over ``x``, a line a ``label``. A row of panels for each value of the first column of
    ``panels``, in it one for each value of the second, which says what ``x`` is there."""
    across = list(dict.fromkeys(frame[panels[1]]))
    down = list(dict.fromkeys(frame[panels[0]]))
    fig, grid = plt.subplots(
        len(down),
        len(across),
        figsize=(9.6, 2.6 * len(down) + 0.4),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    look = looks(dict.fromkeys(frame[label]))
    for (row, name), (column, what) in itertools.product(enumerate(down), enumerate(across)):
        ax, rows = grid[row, column], frame[(frame[panels[0]] == name) & (frame[panels[1]] == what)]
        for each, line in rows.groupby(label, sort=False):
            line = line.sort_values(x)
            mine = look[str(each)]
            ax.plot(line[x], line[y], color=mine.color, marker=mine.marker, ms=6, lw=1.5)
        ax.set_title(f"{name}\n[simulated]", fontsize=9)
        ax.set_xscale("log", base=2)
        values = sorted(set(rows[x]))
        ax.set_xticks(values, [f"{v:g}" for v in values])
        ax.set_xticks([], minor=True)
        ax.grid(True)
        ax.set_xlabel(str(what))
        if column == 0:
            ax.set_ylabel(ylabel)
            ax.set_yscale("log")
    for ax in grid[:, 0]:  # when all of a row have said how far it reaches
        marks = ticks(*ax.get_ylim())
        ax.set_yticks(marks, [f"{mark:g}×" for mark in marks])
        ax.set_yticks([], minor=True)
    legend(fig, look, frame[label])
    return fig


def against(
    frame: pd.DataFrame, *, x: str, y: str, label: str, panel: str, band: float, axes: tuple[str, str]
) -> Figure:
    """``y`` against ``x``, both on one logarithmic scale, a mark a ``label`` and a panel a ``panel``; equal values lie
    on the line, those within the share ``band`` of it on the band. ``axes``: their names."""
    panels = list(frame.groupby(panel, sort=False))
    fig, grid = plt.subplots(1, len(panels), figsize=(9.6, 4.6), squeeze=False, layout="constrained")
    look = looks(dict.fromkeys(frame[label]))
    low, high = 0.8 * frame[[x, y]].min().min(), 1.25 * frame[[x, y]].max().max()
    ends = np.array([low, high])
    for ax, (name, rows) in zip(grid[0], panels, strict=True):
        ax.fill_between(ends, ends * (1 - band), ends * (1 + band), color="#e7ebf0", lw=0)
        ax.plot(ends, ends, color=_SOFT, lw=1)
        for each, points in rows.groupby(label, sort=False):
            mine = look[str(each)]
            ax.plot(points[x], points[y], mine.marker, color=mine.color, mec="white", ms=8)
        marks = ticks(low, high)
        for axis, name_of in ((ax.xaxis, axes[0]), (ax.yaxis, axes[1])):
            axis.set_label_text(name_of)
        ax.set(title=f"{name}", xscale="log", yscale="log", xlim=ends, ylim=ends)
        for set_ticks in (ax.set_xticks, ax.set_yticks):
            set_ticks(marks, [f"{mark:,g}" for mark in marks])
            set_ticks([], minor=True)
    legend(fig, look, frame[label])
    return fig


def _rows(ax: Axes, names: Iterable[str]) -> None:
    """Named rows, the first on top."""
    shown = list(names)
    ax.set_yticks(range(len(shown)), shown)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(True, axis="x")
    ax.set_axisbelow(True)


__all__ = ["lines", "moves", "spread"]
