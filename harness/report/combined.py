"""Compositions beside the systems of single papers: how much the best one gains on every routing, and in which lane.

A composition is a system whose name joins parts with +; all others are one paper's each. Of every race the fastest of
either kind stand against each other. They were chosen by the times that are compared, so their ratio is a little too
good for whichever kind has more systems.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.bench.store import Store
from harness.plan.graph import Timeline
from harness.report import compare, figures, gantt, page, summary
from harness.report.columns import kept
from harness.report.keep import keep
from harness.report.page import Column, Html
from harness.report.run import Run, load

SUITE = "combined-emulated"
WORTH = 1.15  # what a composition is to gain
SIDE_BY_SIDE = "side by side"
TELLING = 0.02  # share of the slower time from which a lane's difference is named

RACE = [
    Column("phase", "phase", merge=True),
    Column("cluster", "cluster", merge=True),
    Column("model", "model", merge=True),
    Column("workload", "routing"),
]


class Combined:
    """Of ``run``; ``keep`` takes tables."""

    def __init__(self, run: Run, keep: Callable[[str, pd.DataFrame], None]):
        self.run, self.keep = run, keep

    @functools.cached_property
    def pairs(self) -> pd.DataFrame:
        """A row a race of layers or whole steps that has both: the best of either kind (label, cell, seconds) and the
        ratio with its interval, above 1 where the composition is faster."""
        found = compare.times(self.run)
        found = found[(found["direction"] == "total") & (found["phase"] != "exchange")]
        composed = found["label"].map(is_composition)
        rows = []
        for race, here in found.groupby("race", sort=False):
            kinds = [here[~composed[here.index]], here[composed[here.index]]]
            if not all(map(len, kinds)):
                continue
            single, both = (kind.sort_values("point").iloc[0] for kind in kinds)
            ratios = compare.speedups(self.run, single["label"])
            at = ratios[(ratios["cell"] == both["cell"]) & (ratios["direction"] == "total")]
            if at.empty:
                continue
            row: dict[str, Any] = {key: single[key] for key in ("phase", "cluster", "model", "workload", "evidence")}
            row |= {"race": race, **{key: at.iloc[0][key] for key in ("point", "low", "high")}}
            for name, best in (("single", single), ("composition", both)):
                row |= {name: best["label"], f"{name}_cell": best["cell"], f"{name}_s": best["point"]}
            rows.append(row)
        order = ["phase", "cluster", "model", "workload"]
        return pd.DataFrame(rows).sort_values(order, ignore_index=True) if rows else pd.DataFrame()

    # ------------------------------------------------------------------ sections

    def headline(self) -> Html:
        """The best of either kind on every routing."""
        pairs = self.pairs
        if pairs.empty:
            return Html(page.missing("No race has both a composition and a paper's own system.", ""))
        self.keep("combined", pairs.drop(columns=["single_cell", "composition_cell"]))
        reached = pairs[pairs["point"] >= WORTH]
        said = page.fill(
            "<p>The best composition is at least {{ worth }} times as fast as the best single system in {{ n }} of "
            "{{ all }} races, on {{ routings }} routing{{ 's' if routings != 1 }}.{% if told %} The interval lies "
            "above 1 in {{ sure }} of them; where it does not, no gain is shown.{% endif %}</p>",
            worth=WORTH,
            n=len(reached),
            told=len(reached) and reached["low"].notna().any(),
            sure=int((reached["low"] > 1).sum()),
            all=len(pairs),
            routings=reached["workload"].nunique(),
        )
        shown = pairs.assign(ratio=self._ratios(pairs))
        columns = [
            *RACE,
            Column("single", "best single system"),
            Column("single_s", "ms", page.milliseconds, "num"),
            Column("composition", "best composition"),
            Column("composition_s", "ms", page.milliseconds, "num"),
            Column("ratio", "gain [95 % interval]", kept, "num"),
            Column("evidence", "evidence", page.badge),
        ]
        return Html(said, page.table(shown, columns, "The best composition against the best single system"))

    def lanes(self) -> Html:
        """Where the time of both went: how long each kind of task keeps each lane busy, and how much of all that other
        tasks hide; the mean over ranks."""
        rows = []
        for pair in self.pairs.to_dict("records"):
            timelines = [self._timelines(pair[f"{kind}_cell"]) for kind in ("single", "composition")]
            if not all(timelines):
                continue
            before, after = map(busy, timelines)
            least = TELLING * max(pair["single_s"], pair["composition_s"])
            same = {key: pair[key] for key in ("phase", "cluster", "model", "workload")}
            for lane, kind in sorted(before.keys() | after.keys()):
                old, new = before.get((lane, kind), 0.0), after.get((lane, kind), 0.0)
                if abs(old - new) >= least:
                    each = {"single_s": old, "composition_s": new, "saved_s": old - new}
                    rows.append({**same, "lane": lane, "kind": kind, **each})
            old, new = (hidden(each) for each in timelines)
            each = {"single_s": old, "composition_s": new, "saved_s": new - old}
            rows.append({**same, "lane": "all", "kind": SIDE_BY_SIDE, **each})
        if not rows:
            return Html(page.missing("No race has timelines of both.", ""))
        frame = pd.DataFrame(rows)
        self.keep("combined_lanes", frame)
        columns = [
            *RACE,
            Column("lane", "lane"),
            Column("kind", "task"),
            Column("single_s", "single, ms busy", page.milliseconds, "num"),
            Column("composition_s", "composition, ms busy", page.milliseconds, "num"),
            Column("saved_s", "saved, ms", lambda value: f"{'+' * (value > 0)}{page.significant(value * 1e3)}", "num"),
        ]
        note = f"differences of at least {TELLING:.0%} of the time, and how much of it lanes work {SIDE_BY_SIDE}"
        return Html(page.table(frame, columns, "Where the gain comes from", note))

    def bounds(self) -> Html:
        """Exchanges beside the least time in which their own bytes pass the busiest port of either level."""
        found = compare.times(self.run)
        found = found[
            (found["phase"] == "exchange") & found["speed_of_light_s"].notna() & (found["direction"] == "total")
        ]
        if found.empty:
            return Html(page.missing("No exchange of this run has a known lower bound.", ""))
        ends = zip(*(found[end] / found["speed_of_light_s"] for end in ("point", "low", "high")), strict=True)
        shown = found.assign(over=[page.ratio(*each) for each in ends])
        self.keep("combined_bounds", found)
        columns = [
            *RACE,
            Column("label", "system"),
            Column("point", "ms", page.milliseconds, "num"),
            Column("speed_of_light_s", "lower bound, ms", page.milliseconds, "num"),
            Column("over", "time over bound [95 % interval]", kept, "num"),
            Column("evidence", "evidence", page.badge),
        ]
        note = "there and back, forward and backward; the bound of what a system sends falls as it sends less"
        return Html(page.table(shown, columns, "How near exchanges come to their lower bounds", note))

    def unpaid(self) -> Html:
        """Races in which combining does not pay."""
        pairs = self.pairs
        lost = pairs[~(pairs["low"].fillna(pairs["point"]) > 1)] if len(pairs) else pairs
        if lost.empty:
            return Html(page.missing("There is none: in every race a composition is shown to be faster.", ""))
        columns = [
            *RACE,
            Column("single", "best single system"),
            Column("composition", "best composition"),
            Column("ratio", "its gain [95 % interval]", kept, "num"),
        ]
        note = "no gain is shown where the interval contains 1"
        return Html(page.table(lost.assign(ratio=self._ratios(lost)), columns, "Where combining does not pay", note))

    def races(self) -> Html:
        """Times and refusals of all systems."""
        every = page.folded("every system", summary.speedups(self.run).html)
        return Html(every, page.folded("what was refused, failed or marked", summary.setbacks(self.run).html))

    def timelines(self) -> Html:
        """Of the race with the largest gain."""
        if self.pairs.empty:
            return Html()
        pair = self.pairs.sort_values("point").iloc[-1]
        drawn = {}
        for kind in ("single", "composition"):
            for direction, timeline in self._timelines(pair[f"{kind}_cell"]).items():
                drawn[f"{pair[kind]}, {direction} [{pair['evidence']}]"] = timeline
        if not drawn:
            return Html(page.missing("There are no timelines of it.", ""))
        caption = (
            f"{pair['phase']} of {pair['model']}, {pair['workload']}, on {pair['cluster']}: the largest gain. Above "
            f"the single system, below the composition, both on rank 0. {gantt.READING}"
        )
        alt = f"Gantt chart, a row a lane and a bar a task, of: {'; '.join(drawn)}."
        return Html(figures.drawn(lambda: gantt.gantt(drawn), alt, caption))

    # ------------------------------------------------------------------ plumbing

    def _timelines(self, cell: str) -> dict[str, Timeline]:
        return Store(self.run.path).trace(cell)

    @staticmethod
    def _ratios(pairs: pd.DataFrame) -> pd.Series:
        ends = zip(pairs["point"], pairs["low"], pairs["high"], strict=True)
        return pd.Series([page.ratio(*each) for each in ends], index=pairs.index, dtype=object)


class Lacking:
    """In the place of a run that is not there."""

    def _missing(self) -> Html:
        command = f"moebench run --suite {SUITE} && moebench report combined"
        return Html(page.missing("These systems have not been run on this machine, so this part is empty.", command))

    headline = _missing

    def _nothing(self) -> Html:
        return Html()

    lanes = timelines = bounds = unpaid = races = _nothing


def of_run(run_dir: str, out_dir: str) -> Combined | Lacking:
    """The page's sections; tables go to ``out_dir``/tables/combined."""
    folder = Path(run_dir)
    if not run_dir or not any(folder.glob("rows-*.parquet")):
        return Lacking()
    return Combined(load(folder, usual=("flat", "flat")), partial(keep, Path(out_dir) / "tables" / "combined"))


def is_composition(label: str) -> bool:
    """Whether a label's system joins parts; options behind it may hold anything."""
    return len({*label.split()[0].split("+")} - {"serial"}) > 1


def busy(timelines: dict[str, Timeline]) -> dict[tuple[str, str], float]:
    """Seconds that each (lane, kind of task) takes in all directions, mean over ranks."""
    found: dict[tuple[str, str], float] = {}
    for timeline in timelines.values():
        spans = np.asarray(timeline.end_s) - np.asarray(timeline.start_s)
        for task, each in zip(timeline.plan.tasks, spans.reshape(len(timeline.plan.tasks), -1), strict=True):
            key = task.lane, task.kind
            found[key] = found.get(key, 0.0) + float(each.mean())
    return found


def hidden(timelines: dict[str, Timeline]) -> float:
    """Seconds of tasks beyond the time that they take together."""
    total = sum(float(np.mean(each.total_s)) for each in timelines.values())
    return sum(busy(timelines).values()) - total


__all__ = ["Combined", "busy", "is_composition", "of_run"]
