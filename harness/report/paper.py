"""Sections of a paper's notebook: verdicts on its claims, tables of its studies, and what an own run adds.

Every number says on what evidence it rests, and no row holds two kinds of it, except where a column's heading says
which kind that column is.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from harness.report import claims, context, figures, gantt, page, study_figures
from harness.report.claims import Sources, Value, Verdict
from harness.report.columns import as_printed, columns_of, kept, words
from harness.report.keep import keep
from harness.report.own_run import OwnRun
from harness.report.page import Column, Html
from harness.report.predicted import Simulator
from harness.report.run import load
from harness.studies import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from harness.plan.graph import Timeline

OUTCOMES = ("reproduced", "partly", "not", "not attempted")


class Paper:
    """What a notebook shows of one paper. ``run``: None where its own run is not there."""

    def __init__(self, name: str, out_dir: str | Path = "", run_dir: str | Path = "", sources: Sources | None = None):
        """``out_dir``: tables go to its folder ``tables``; nowhere if it is empty."""
        self.name = name
        self.tables = Path(out_dir) / "tables" / name if out_dir else None
        self.run_dir = Path(run_dir) if run_dir else None
        self.sources = sources or (Sources(runs=self.run_dir.parent) if self.run_dir else Sources())

    @functools.cached_property
    def verdicts(self) -> list[Verdict]:
        return claims.judge(claims.read(claims.RESULTS / "claims" / f"{self.name}.yaml"), self.sources)

    def findings(self, study: str) -> Findings | None:
        return self.sources.study(study)

    def table(self, study: str, table: str) -> pd.DataFrame:
        """A table of a study, for reading or raw."""
        found = self.findings(study)
        return {**found.tables, **found.raw}[table] if found else pd.DataFrame()

    # ------------------------------------------------------------------ sections

    def headline(self) -> Html:
        """How many verdicts of each kind, and the claims. Before them, if a sweep fills the run, how far it is."""
        part = context.sweep(self.run_dir) if self.run_dir else ""
        return Html(part, _counts(self.verdicts), self.claims().html)

    def claims(self, title: str = "Claims and verdicts") -> Html:
        """Every claim beside what was found, with its verdict."""
        rows = pd.DataFrame([_row(verdict) for verdict in self.verdicts], dtype=object)
        self.keep("verdicts", rows.drop(columns=["shown", "said"]))
        columns = [
            Column("statement", "claim", kind="prose", merge=True),
            Column("source", "where", merge=True),
            Column("said", "reported", kept, "num"),
            Column("shown", "found here", kept, "num"),
            Column("evidence", "evidence", lambda level: page.badge(level) if level else "–"),
            Column("verdict", "verdict", verdict_badge),
            Column("basis", "how it was judged", kind="prose"),
        ]
        return Html(page.table(rows, columns, title))

    def study(self, name: str, *only: str, folded: Iterable[str] = (), notes: bool = True) -> Html:
        """The tables of a study for reading (those named in ``only``, or all; ``folded`` ones behind a line to click)
        and its notes."""
        found = self.findings(name)
        if found is None:
            return Html(page.missing(f"There is no study {name}.", ""))
        parts = []
        for key, frame in found.tables.items():
            if only and key not in (*only, *folded):
                continue
            self.keep(f"{name}_{key}", frame)
            what = words(key.replace("-", " "))
            shown = page.table(as_printed(frame), columns_of(frame), f"{name}: {what}" if key != name else name)
            parts.append(page.folded(f"table: {what}", shown) if key in folded else shown)
        if notes and found.notes:
            parts.append(
                page.fill('<ul class="note">{% for n in notes %}<li>{{ n }}</li>{% endfor %}</ul>', notes=found.notes)
            )
        return Html(*parts)

    def spread(
        self,
        study: str,
        raw: str,
        averages: str,
        *,
        reference: str,
        pair: Sequence[str],
        order: Sequence[str],
        caption: str,
        panel: str = "testbed",
        label: str = "schedule",
        column: str = "time_s",
        mean: str = "mean",
    ) -> Html:
        """How the speedup over ``reference`` (a label) spreads over the rows of the study's ``raw`` table, paired by
        ``pair``; the printed means are the reported rows of its table ``averages``."""
        rows, keys = self.table(study, raw), [panel, *pair]
        base = rows[rows[label] == reference][[*keys, column]]
        pairs = rows.merge(base, on=keys, suffixes=("", "_base"), validate="many_to_one")
        pairs["speedup"] = pairs[f"{column}_base"] / pairs[column]
        said = self.table(study, averages).query("evidence == 'reported'")
        printed = {(str(p), str(each)): v for p, each, v in zip(said[panel], said[label], said[mean], strict=True)}
        alt = f"Range, middle half and mean of the simulated speedup over {reference}, beside the reported mean."

        def make() -> Figure:
            return study_figures.spread(
                pairs,
                value="speedup",
                label=label,
                panel=panel,
                printed=printed,
                order=order,
                xlabel=f"speedup over {reference}'s schedule (right of 1 is faster)",
            )

        return Html(figures.drawn(make, alt, caption))

    def moves(self, study: str, table: str, *, value: str, caption: str) -> Html:
        """Where each changed assumption moves the ``value`` of the study's ``table`` (columns testbed, change,
        evidence), with the reported value as a line."""
        rows = self.table(study, table)
        said = rows[rows["evidence"] == "reported"]
        printed = {str(t): float(v) for t, v in zip(said["testbed"], said[value], strict=True)}
        alt = f"Mean speedup of {value} under each changed assumption, per testbed, with the reported mean as a line."

        def make() -> Figure:
            return study_figures.moves(
                rows[rows["evidence"] != "reported"],
                value=value,
                change="change",
                panel="testbed",
                printed=printed,
                xlabel=f"mean speedup of {value}",
            )

        return Html(figures.drawn(make, alt, caption))

    def lines(
        self,
        study: str,
        table: str,
        *,
        x: str,
        y: str,
        ylabel: str,
        panels: tuple[str, str],
        without: Sequence[str],
        caption: str,
        label: str = "schedule",
    ) -> Html:
        """``y`` over ``x`` of the study's ``table``, a line a ``label`` (not those ``without``); a row of panels for
        each value of the first column of ``panels``, in it one for each of the second, whose name ``x`` goes by."""
        rows = self.table(study, table)
        rows = rows[~rows[label].isin(without)]
        alt = f"{ylabel} of every {label}, one panel for each {' and '.join(panels)}."

        def make() -> Figure:
            return study_figures.lines(rows, x=x, y=y, label=label, panels=panels, ylabel=ylabel)

        return Html(figures.drawn(make, alt, caption))

    def against(
        self, study: str, table: str, *, x: str, y: str, label: str, panel: str, axes: tuple[str, str], caption: str
    ) -> Html:
        """``y`` against ``x`` of the study's ``table``, a mark a ``label``, with a band of a fifth about equality."""
        rows = self.table(study, table)
        alt = f"{axes[1]} against {axes[0]}, one mark a row, with the line of equal values and a band of 20 percent."

        def make() -> Figure:
            return study_figures.against(rows, x=x, y=y, label=label, panel=panel, band=0.2, axes=axes)

        return Html(figures.drawn(make, alt, caption))

    def gantt(self, timelines: Mapping[str, Timeline], caption: str) -> Html:
        """Timelines below each other on one time axis."""
        alt = f"Gantt chart, a row a lane and a bar a task, of: {'; '.join(timelines)}."
        return Html(figures.drawn(lambda: gantt.gantt(timelines), alt, caption))

    def own_run(self, suite: str, label: str, reference: str, simulator: Simulator) -> Html:
        """The paper's races as run here (``harness.report.own_run``), or how to make them."""
        if self.run_dir is None or not any(self.run_dir.glob("rows-*.parquet")):
            command = f"moebench run --suite {suite} && moebench report {self.name}"
            return Html(page.missing("These layers have not been run on this machine, so this part is empty.", command))
        run = load(self.run_dir, usual=(reference, label))
        return Html(context.instead(run, reference), OwnRun(run, label, simulator, self.keep).html().html)

    # ------------------------------------------------------------------ plumbing

    def keep(self, name: str, frame: pd.DataFrame) -> None:
        """As CSV and LaTeX beside the page."""
        if self.tables is not None:
            keep(self.tables, name, frame)


def verdict_badge(outcome: str) -> Markup:
    """A verdict as a pill that says its word."""
    return Markup('<span class="badge verdict {}">{}</span>').format(outcome.replace(" ", "-"), outcome)


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def _row(verdict: Verdict) -> dict[str, Any]:
    claim, bound = verdict.claim, verdict.experiments
    how = f"{bound.method}; {bound.basis} ({verdict.num_rows:,} rows)" if bound and not verdict.why else verdict.why
    return {
        "id": claim.id,
        "statement": claim.statement,
        "source": claim.source,
        "said": _values([Value(value) for value in verdict.reported], claim.unit),
        "shown": _values(verdict.found, claim.unit),
        "reported": " to ".join(f"{value:g}" for value in verdict.reported),
        "found": " to ".join(f"{value.point:.6g}" for value in verdict.found),
        "low": verdict.found[0].low if verdict.found else math.nan,
        "high": verdict.found[-1].high if verdict.found else math.nan,
        "unit": claim.unit,
        "evidence": verdict.evidence,
        "verdict": verdict.outcome,
        "basis": ". ".join(filter(None, [how, *verdict.tested, verdict.lacking, claim.note])),
    }


def _values(values: Iterable[Value], unit: str) -> Markup:
    """``1.08 to 1.22 ×``, each with its interval where it has one."""
    parts = [
        page.fill(
            "{{ v }}{% if i %} <small>{{ i }}</small>{% endif %}",
            v=f"{value.point:,.0f}" if unit == "layers" else page.significant(value.point),
            i=page.interval(value.low, value.high) if math.isfinite(value.low) else "",
        )
        for value in values
    ]
    if not parts:
        return Markup("–")
    joint = "" if unit == "×" else " "
    return Markup(" to ".join(parts)) + joint + unit


def _counts(verdicts: list[Verdict]) -> str:
    """How many of each, by evidence."""
    by: Mapping[tuple[str, str], int] = Counter((v.evidence, v.outcome) for v in verdicts)
    levels = [level for level in (*claims.LEVELS, "") if any(level == found for found, _ in by)]
    return page.fill(
        """<ul class="headline"><li><h3>Verdicts, by the evidence that they rest on</h3>
{% for level in levels %}<p>{{ badge(level) if level else "nothing to judge by" }}:
{% for o in outcomes if (level, o) in by %}{{ by[level, o] }} {{ pill(o) }}{{ ", " if not loop.last }}{% endfor %}</p>
{% endfor %}</li></ul>""",
        levels=levels,
        outcomes=OUTCOMES,
        by=by,
        badge=page.badge,
        pill=verdict_badge,
    )


__all__ = ["Paper", "verdict_badge"]
