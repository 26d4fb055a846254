"""A paper's races as run here, beside what the simulator said of them: ratios, agreement, timelines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from harness.bench.store import Store
from harness.errors import UserError
from harness.plan.graph import Timeline
from harness.report import compare, context, figures, gantt, page, summary
from harness.report.columns import columns_of, kept
from harness.report.drift import drift
from harness.report.page import Column, Html
from harness.report.predicted import Simulator
from harness.report.run import Run


class OwnRun:
    """Of ``run``, whose baseline all ratios refer to. ``label``: the paper's own system. ``keep``: takes tables."""

    def __init__(self, run: Run, label: str, simulator: Simulator, keep: Callable[[str, pd.DataFrame], None]):
        self.run, self.label, self.simulator, self.keep = run, label, simulator, keep

    def html(self) -> Html:
        """Ratios to the baseline over all races and of each, how well the predictions met them, and timelines."""
        why = ""
        try:
            predicted = self.simulator.predictions(self.run)
        except UserError as error:  # the times stand all the same
            predicted, why = pd.DataFrame({"cell": [], "direction": [], "predicted_s": []}), f": {error}"
        frame = compare.beside_predictions(self.run, predicted)
        parts = [self._pooled(frame), context.beside(self.run)]
        if frame.empty:
            parts.append(page.missing(f"There are no predictions to compare with{why}", ""))
        else:
            parts.append(self._agreement(frame))
            parts.append(self._unpredicted(frame))
            parts.append(self._timelines(frame))
        if compare.drifting(self.run):
            parts.append(drift(self.run).html)
        parts.append(page.folded("every layer", summary.speedups(self.run).html))
        parts.append(page.folded("what was refused, failed, not run or marked", summary.setbacks(self.run).html))
        return Html(*parts)

    def _unpredicted(self, frame: pd.DataFrame) -> str:
        """Names what has a time and no prediction."""
        timed = compare.times(self.run)
        lone = timed[(timed["direction"] == "total") & ~timed["cell"].isin(frame["cell"])].drop_duplicates("cell")
        said = [f"{label} ({len(rows)} of its races)" for label, rows in lone.groupby("label", sort=False)]
        what = "Timed, but not predicted, as the simulator does not know them there: {{ said }}."
        return page.fill(f'<p class="note">{what}</p>', said=", ".join(said)) if said else ""

    def _timelines(self, frame: pd.DataFrame) -> str:
        """Backward of one layer under the baseline and the paper's system: executed above simulated. The layer: that of
        the middle ratio, so that it is no special one."""
        at = frame.pivot_table(index="race", columns="label", values="measured_s")
        wanted = [self.run.baseline, self.label]
        if not set(wanted) <= set(at):
            return ""
        ratio = (at[self.run.baseline] / at[self.label]).dropna().sort_values()
        rows = frame[frame["race"] == ratio.index[(len(ratio) - 1) // 2]].set_index("label")
        drawn: dict[str, Timeline] = {}
        for label in wanted:
            cell, evidence = rows.loc[label, "cell"], rows.loc[label, "evidence"]
            executed = Store(self.run.path).trace(cell).get("backward")
            if executed is not None:
                drawn[f"{label}, executed [{evidence}]"] = executed
            if (simulated := self.simulator.timelines(self.run, cell).get("backward")) is not None:
                drawn[f"{label} [simulated]"] = simulated
        if not drawn:
            return ""
        one = rows.iloc[0]
        caption = (
            f"Backward of {one['model']}, {one['workload']}, on {one['cluster']}: the last repetition on rank 0, and "
            "what the simulator says of it. The layer is the one whose speedup is in the middle of all."
        )
        alt = f"Gantt chart, a row a lane and a bar a task, of: {'; '.join(drawn)}."
        return figures.drawn(lambda: gantt.gantt(drawn), alt, caption)

    def _pooled(self, predicted: pd.DataFrame) -> str:
        run, reference, rows = self.run, self.run.baseline, []
        at = predicted.pivot_table(index="race", columns="label", values="predicted_s")
        for label in run.labels:
            if label == reference:
                continue
            pooled = compare.pooled_speedup(run, label, reference)
            if pooled is None:
                rows.append({"label": label, "num_races": 0, "scope": "–", "evidence": ""})
                continue
            said = math.nan
            if {label, reference} <= set(at):
                said = float(np.exp(np.log(at[reference] / at[label]).mean()))
            estimate = pooled.estimate
            row = {"label": label, "point": estimate.point, "low": estimate.low, "high": estimate.high}
            facts = {"num_races": pooled.num_races, "scope": estimate.scope, "evidence": " and ".join(pooled.evidence)}
            rows.append({**row, "predicted": said, **facts})
        if not any(row["num_races"] for row in rows):
            return page.missing(f"No race of this run has a time of {reference} and of another system.", "")
        columns_ = ["label", "point", "low", "high", "predicted", "num_races", "scope", "evidence"]
        frame = pd.DataFrame(rows, columns=columns_)
        self.keep("pooled_speedups", frame)
        ratios = [page.ratio(*ends) for ends in zip(frame["point"], frame["low"], frame["high"], strict=True)]
        frame["ratio"] = pd.Series(ratios, dtype=object)  # as strings they would be escaped
        columns = [
            Column("label", "system"),
            Column("ratio", f"over {reference} [95 % interval]", kept, "num"),
            Column("evidence", "evidence", lambda level: page.badge(level) if level else "–"),
            Column(
                "predicted", "predicted (simulated)", lambda value: f"{value:.2f}×" if value == value else "–", "num"
            ),
            Column("num_races", "layers", kind="num"),
            Column("scope", "interval over"),
        ]
        return page.table(frame, columns, "Geometric mean over all layers", "forward and backward together")

    def _agreement(self, frame: pd.DataFrame) -> str:
        self.keep("predictions", frame)
        figures_of = pd.DataFrame([dataclasses.asdict(self.simulator.agreement(frame))])
        shown = frame.assign(error=frame["error"].map(lambda e: f"{e:+.1%}"))
        columns = [
            Column("workload", "workload", merge=True),
            Column("model", "layer", merge=True),
            Column("label", "system"),
            Column(
                "measured_s", f"time, ms ({' and '.join(sorted(set(frame['evidence'])))})", page.milliseconds, "num"
            ),
            Column("predicted_s", "predicted, ms (simulated)", page.milliseconds, "num"),
            Column("error", "error", kind="num"),
        ]
        return Html(
            page.table(
                figures_of,
                columns_of(figures_of),
                "The simulator against what ran",
                "errors relative to the time that ran; τ: Kendall's, of the order of the systems on a layer",
            ),
            page.folded("every cell", page.table(shown, columns, "Predicted and observed")),
        ).html
