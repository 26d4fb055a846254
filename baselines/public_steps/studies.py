"""Tokens per second and GPU that others publish for MoE training steps, beside what the judge makes of them.

At most one number is fitted for each machine and format: the share of the products' rate that is reached. What it is
fitted on and what is predicted by it are apart: ``FITTED`` tells ``TESTED``; each model is told by all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.stats import kendalltau

from baselines.public_steps.price import Row, parts, tokens_per_s
from harness.errors import UserError
from harness.studies import Findings, Progress, Study, reported

FITTED = ("qwen3-30b-a3b", "gpt-oss-120b")
TESTED = ("qwen3-235b-a22b", "deepseek-v3")
NEWEST = ["model", "cluster", "precision"]  # the latest release of each of these counts
Efficiencies = Mapping[tuple[str, str], float]  # by cluster and precision
NOTES = (
    "Reported: NVIDIA's performance summary of Megatron-Bridge, routing forced to balance. Tokens per second alone are "
    "compared: how FLOPs of gated units are counted changed between releases.",
    "Dispatcher, overlap, graphs and recomputation of a row are those of its recipe at the tag of its release.",
    f"efficiency: of the rate that tiles of rows reach, one for each machine and format, fitted on {', '.join(FITTED)} "
    f"for {', '.join(TESTED)}, and on all other models for each model left out. Where no other model ran on a machine "
    "in a format, that of the machine in its other formats serves, else the mean of all.",
    "Explanation: passes over memory and the host's time (baselines/public_steps/price.py) are round numbers, chosen "
    f"while looking at rows of {', '.join(FITTED)}, so that left-out rows of these are not quite unseen.",
    "Left out: gradients' reduction and the optimizer, beside which many micro-batches are computed; stages are taken "
    "as even, though the last one has the head.",
)


def steps(progress: Progress) -> Findings:
    """Every row that can be priced; the newest of each model, machine and format as a test."""
    table = reported("public-steps")
    rows, unpriced = [], []
    for fields in table.to_dict("records"):
        progress(f"{fields['release']}: {fields['model']} on {fields['cluster']}")
        try:
            row = Row.of({str(name): value for name, value in fields.items()})
            parts(row)
        except UserError as error:
            unpriced.append(f"{fields['model']} on {fields['cluster']}, {fields['release']}: {error}")
        else:
            rows.append(row)
    newest = _newest(rows)
    tests = pd.concat([_tested(newest), _left_out(newest)], ignore_index=True).assign(evidence="simulated")
    summary = pd.DataFrame([_summary(name, part) for name, part in [*tests.groupby("test"), ("both", tests)]])
    found = {
        "summary": summary.assign(evidence="simulated"),
        "newest": tests,
        "efficiency": _fits(newest),
        "releases": releases(rows, newest),
    }
    return Findings(found, (*NOTES, *(f"Not priced: {each}" for each in unpriced)))


def _newest(rows: Iterable[Row]) -> list[Row]:
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(str(getattr(row, name)) for name in NEWEST)
        if key not in found or row.release > found[key].release:
            found[key] = row
    return list(found.values())


def fitted(rows: Iterable[Row]) -> Efficiencies:
    """The efficiency of each machine and format that is least off on its ``rows``, by squared logarithms."""
    by: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by.setdefault((row.cluster, row.precision), []).append(row)

    def off(log_efficiency: float, of: list[Row]) -> float:
        ratios = [tokens_per_s(row, float(np.exp(log_efficiency))) / row.tokens_per_s_per_gpu for row in of]
        return float(np.square(np.log(ratios)).sum())

    bounds = np.log(0.05), 0.0  # a share
    return {
        key: float(np.exp(minimize_scalar(off, bounds=bounds, args=(of,), method="bounded").x))
        for key, of in by.items()
    }


def efficiency_of(row: Row, known: Efficiencies) -> tuple[float, str]:
    """And what it rests on."""
    if (own := known.get((row.cluster, row.precision))) is not None:
        return own, "same machine and format"
    same = [value for (cluster, _), value in known.items() if cluster == row.cluster]
    rests_on = "same machine, other format" if same else "mean of all machines"
    return float(np.exp(np.mean(np.log(same or list(known.values()))))), rests_on


def _predicted(rows: Iterable[Row], known: Efficiencies, test: str) -> pd.DataFrame:
    found = []
    for row in rows:
        efficiency, rests_on = efficiency_of(row, known)
        simulated, of = tokens_per_s(row, efficiency), parts(row)
        whole = of.step_s(efficiency) / of.rounds
        found.append(
            {
                "test": test,
                **{
                    name: getattr(row, name) for name in ("release", *NEWEST, "gpus", "pp", "ep", "dispatcher", "graph")
                },
                "tokens_per_s_reported": row.tokens_per_s_per_gpu,
                "tokens_per_s_simulated": simulated,
                "error_percent": 100 * (simulated / row.tokens_per_s_per_gpu - 1),
                "efficiency": efficiency,
                "rests_on": rests_on,
                "products_percent": 100 * of.products_s / efficiency / whole,
                "memory_percent": 100 * of.memory_s / whole,
                "exchange_percent": 100 * of.exchange_s / whole,
                "host_percent": 100 * of.host_s / whole,
            }
        )
    return pd.DataFrame(found)


def _tested(rows: list[Row]) -> pd.DataFrame:
    known = fitted(row for row in rows if row.model in FITTED)
    return _predicted((row for row in rows if row.model in TESTED), known, "tested")


def _left_out(rows: list[Row]) -> pd.DataFrame:
    parts_of = []
    for model in dict.fromkeys(row.model for row in rows):
        known = fitted(row for row in rows if row.model != model)
        parts_of.append(_predicted((row for row in rows if row.model == model), known, "left out"))
    return pd.concat(parts_of, ignore_index=True)


def _summary(name: str, part: pd.DataFrame) -> dict[str, object]:
    errors = part["error_percent"].abs()
    return {
        "test": name,
        "rows": len(part),
        "within_20_percent": int((errors <= 20).sum()),
        "share_within_20_percent": float((errors <= 20).mean()),
        "mean_error_percent": float(errors.mean()),
        "largest_error_percent": float(errors.max()),
        "kendall_tau": float(kendalltau(part["tokens_per_s_reported"], part["tokens_per_s_simulated"]).statistic),
    }


def _fits(rows: list[Row]) -> pd.DataFrame:
    sets = {"all but the tested models": [row for row in rows if row.model in FITTED], "all newest rows": rows}
    found = [
        {"fitted_on": name, "cluster": cluster, "precision": precision, "efficiency": efficiency}
        for name, of in sets.items()
        for (cluster, precision), efficiency in fitted(of).items()
    ]
    return pd.DataFrame(found).assign(evidence="simulated")


def releases(rows: list[Row], newest: list[Row]) -> pd.DataFrame:
    """What releases changed: of one model, machine, format and layout, reported over the newest release's, beside what
    the recipes' own changes (overlap, graphs) make the judge expect, at the newest release's efficiency."""
    known, found = fitted(newest), []
    latest = {tuple(getattr(row, name) for name in NEWEST): row for row in newest}
    for row in rows:
        last = latest[tuple(getattr(row, name) for name in NEWEST)]
        same = all(getattr(row, name) == getattr(last, name) for name in ("gpus", "gbs", "mbs", "tp", "pp", "vp", "ep"))
        efficiency, _ = efficiency_of(last, known)
        found.append(
            {
                "model": row.model,
                "cluster": row.cluster,
                "precision": row.precision,
                "release": row.release,
                "layout": "same" if same else "other",
                "recipe": f"{row.dispatcher}, overlap {row.overlap}, graph {row.graph}",
                "reported_over_newest": row.tokens_per_s_per_gpu / last.tokens_per_s_per_gpu,
                "expected_over_newest": tokens_per_s(row, efficiency) / tokens_per_s(last, efficiency),
            }
        )
    table = pd.DataFrame(found).assign(evidence="simulated")
    return table.sort_values([*NEWEST, "release"], ascending=[True, True, True, False], kind="stable")


STUDIES = {
    "public-steps": Study("Published training steps of Megatron-Bridge, priced from layouts and data sheets", steps)
}
