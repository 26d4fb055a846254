"""Runs of the serving phases: latency of a pass, throughput, and its parts as tail and mean over ranks."""

from __future__ import annotations

import math

import pandas as pd

from harness.report import compare, context, page, summary
from harness.report.columns import EVIDENCE, columns_of, kept
from harness.report.page import Column, Html
from harness.report.paper import Paper
from harness.report.run import Run, load
from harness.specs import SERVING

_WHERE = ["phase", "cluster", "workload", "label"]
PARTS = {"attention_s": "attention", "experts_s": "experts", "all_to_all_s": "all-to-all", "moe_s": "MoE part"}


def latencies(run: Run) -> pd.DataFrame:
    """One row a cell: seconds of a pass as mean, p50 and p99 over all repetitions; ``token_s``: of one token (prefill:
    the mean pass over a rank's tokens; decode: the mean pass, which makes one token of every sequence); and tokens per
    second of the job."""
    rows = run.rows[run.rows["phase"].isin(SERVING)]
    timed = rows[rows["metric"] == "time_s"].groupby([*_WHERE, "evidence", "cell"], sort=False)["value"]
    found = timed.agg(mean_s="mean", p50_s="median", p99_s=lambda v: v.quantile(0.99), passes="size").reset_index()
    speed = rows[rows["metric"] == "tokens_per_s"].groupby("cell")["value"].mean().rename("tokens_per_s")
    found = found.join(speed, on="cell")
    num_ranks = found["cell"].map(rows[rows["metric"].isin(PARTS)].groupby("cell")["rank"].max() + 1)
    found["token_s"] = (num_ranks / found["tokens_per_s"]).where(found["phase"] == "prefill", found["mean_s"])
    return found


def parts(run: Run, by_layer: bool = False) -> pd.DataFrame:
    """One row a cell and part of a layer (``by_layer``: and ``layer``): tail, the slowest rank's seconds, and mean over
    ranks, each the mean over layers and repetitions; and the load of the busiest rank over the mean under the cell's
    placement."""
    rows = run.rows[run.rows["phase"].isin(SERVING) & run.rows["metric"].isin(PARTS)]
    keys = [*_WHERE, "evidence", "cell", "metric"]
    over_ranks = rows.groupby([*keys, "level", "launch", "rep"], sort=False)["value"].agg(["max", "mean"]).reset_index()
    over_ranks = over_ranks.rename(columns={"level": "layer"})
    keys = [*keys, "layer"] if by_layer else keys
    found = over_ranks.groupby(keys, sort=False)[["max", "mean"]].mean().reset_index()
    found = found.rename(columns={"max": "tail_s", "mean": "mean_s"})
    found["part"] = found["metric"].map(PARTS)
    load = run.rows[run.rows["metric"] == "placed_max_over_mean"].groupby("cell")["value"].mean()
    found["max_over_mean_load"] = found["cell"].map(load)
    layer = ["layer"] if by_layer else []
    return found[[*_WHERE, "part", *layer, "tail_s", "mean_s", "max_over_mean_load", "evidence", "cell"]]


def shown(paper: Paper, suite: str, label: str, reference: str) -> Html:
    """The paper's own run, or how to make it. Ratios are over ``reference``."""
    if paper.run_dir is None or not any(paper.run_dir.glob("rows-*.parquet")):
        command = f"moebench run --suite {suite} && moebench report {paper.name}"
        return Html(page.missing("These models have not been served on this machine, so this part is empty.", command))
    run = load(paper.run_dir, usual=(reference, label))
    wished, reference = reference, run.baseline
    found, ratios = latencies(run), compare.speedups(run, reference)
    if found.empty:
        return Html(page.missing("This run has no times.", f"moebench run --suite {suite}"), context.beside(run))
    found = found.merge(ratios[["cell", "point", "low", "high"]], on="cell", how="left")
    paper.keep("serving_latency", found)
    cells = zip(found["point"], found["low"], found["high"], strict=True)
    found["ratio"] = pd.Series([page.ratio(*ends) if math.isfinite(ends[0]) else "–" for ends in cells], dtype=object)
    columns = [
        Column("phase", "phase", merge=True),
        Column("cluster", "cluster", merge=True),
        Column("workload", "workload", merge=True),
        Column("label", "system"),
        Column("mean_s", "pass, mean, ms", page.milliseconds, "num"),
        Column("p50_s", "p50, ms", page.milliseconds, "num"),
        Column("p99_s", "p99, ms", page.milliseconds, "num"),
        Column("token_s", "a token, ms", page.milliseconds, "num"),
        Column("tokens_per_s", "tokens/s", lambda value: f"{value:,.0f}", "num"),
        Column("ratio", f"over {reference} [95 % interval]", kept, "num"),
        EVIDENCE,
    ]
    of_parts = parts(run).drop(columns="cell")
    paper.keep("serving_parts", of_parts)
    of_layers = parts(run, by_layer=True).drop(columns=["cell", "max_over_mean_load"])
    paper.keep("serving_layers", of_layers)
    return Html(
        context.instead(run, wished),
        page.table(found, columns, "Latency and throughput"),
        context.beside(run),
        page.table(of_parts, columns_of(of_parts, 3), "Parts of a layer", "tail: slowest rank; mean: over ranks"),
        page.folded("layer by layer", page.table(of_layers, columns_of(of_layers, 3), "Parts of each layer")),
        page.folded("what was refused, failed, not run or marked", summary.setbacks(run).html),
    )
