"""Hecate's experiments as named studies (``moebench study``): simulated from the clusters' data sheets, with the
value that the paper reports as a row of its own wherever it prints one.

The paper states neither its routing nor its batches. So skew (max over mean tokens of an expert, the same at every
step and layer) is swept, is 4 where it is not, and stands beside the recorded trace; batches are the largest that fit.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from harness.studies import Findings, Progress, Study, reported
from methods.hecate import assumptions, cells
from methods.hecate.cells import (
    CLUSTERS,
    GPUS,
    MODELS,
    NOTE,
    ROUTINGS,
    SKEW,
    Cell,
    everyone,
    geometric_mean,
    planned,
    run,
)
from methods.hecate.played import RIVALS, SYSTEMS

SKEWS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
ABLATION: dict[str, tuple[str, dict[str, object]]] = {
    "neither (EP)": ("ep", {}),
    "sharding only": ("hecate", {"materialises": False}),
    "materialisation only": ("hecate", {"reshard_every": 0}),
    "both": ("hecate", {}),
    "both, calibrated": ("hecate", {"calibrates": True}),
}


def _cells(routings: tuple[float | None, ...] = ROUTINGS) -> list[Cell]:
    """All models on both clusters, of both sizes; the recorded trace has the experts of the larger one only."""
    return [
        Cell(model, cluster, gpus, skew)
        for cluster, gpus, skew, model in itertools.product(CLUSTERS, GPUS, routings, MODELS)
        if skew is not None or gpus == 32
    ]


# ------------------------------------------------------------------------------------------------------ Figs. 9, 10


def steps(progress: Progress) -> Findings:
    """Whole steps of four models on both clusters, 16 and 32 GPUs, under eight systems, beside Figs. 9 and 10."""
    rows = []
    for cell in _cells():
        progress(f"{cell.model} on {cell.gpus} GPUs of {cell.cluster}, {cell.routing}")
        here = cells.setup(cell)
        times = {name: found.step_s for name, found in everyone(cell).items()}
        rivals = [times[name] for name in ("ep", *RIVALS)]
        for name, seconds in times.items():
            ratios = {"over_ep": times["ep"] / seconds, "over_best_baseline": min(rivals) / seconds}
            ratios["over_worst_baseline"] = max(rivals) / seconds
            found = {"samples": int(here.samples), "t": here.overlap_degree, "system": name, "step_s": seconds}
            rows.append({**cell.where(), **found, **ratios, "evidence": "simulated"})
    every = pd.DataFrame(rows)
    means = (
        every.groupby(["testbed", "routing", "system"], sort=False)[["over_ep", "over_best_baseline"]]
        .agg(["min", "max", geometric_mean])
        .reset_index()
    )
    means.columns = ["_".join(filter(None, map(str, column))) for column in means.columns]
    means = means.rename(columns=lambda name: name.replace("geometric_mean", "mean"))
    means = means[["testbed", "routing", "system", *means.filter(like="over_")]]
    means = means[means["system"] != "ep"].assign(evidence="simulated")
    printed = reported("hecate", "end-to-end")
    keys = {
        "least_speedup_over_ep": "over_ep_min",
        "largest_speedup_over_ep": "over_ep_max",
        "mean_speedup_over_best_baseline": "over_best_baseline_mean",
    }
    text = printed[printed["quantity"].isin(keys)].assign(quantity=lambda t: t["quantity"].map(keys))
    text = text.pivot_table(index=["testbed", "system"], columns="quantity", values="value").reset_index()
    shown = pd.concat([means, text.assign(routing="", evidence="reported")]).sort_values(
        ["testbed", "routing"], ascending=[True, False], kind="stable"
    )
    order = [*means.columns]
    return Findings({"speedups": shown[order], "steps": every}, (NOTE,))


# ------------------------------------------------------------------------------------------- a layer, and its parts


def layers(progress: Progress) -> Findings:
    """GPT-MoE-S on 32 GPUs layer by layer: each MoE layer without its attention, over EP's. A prediction."""
    rows = []
    for cluster, skew in itertools.product(CLUSTERS, ROUTINGS):
        cell = Cell("gpt-moe-s", cluster, skew=skew, layers=12)
        progress(f"{cluster}, {cell.routing}")
        found = everyone(cell)
        for name, result in found.items():
            for layer, seconds in enumerate(result.moe_s):
                over = float(found["ep"].moe_s[layer] / seconds)
                rows.append({**cell.where(), "system": name, "layer": layer, "moe_s": seconds, "over_ep": over})
    raw = pd.DataFrame(rows).assign(evidence="simulated")
    shown = raw.groupby(["testbed", "routing", "system"], sort=False)["over_ep"].agg(["mean", "min", "max"])
    return Findings({"layers": shown.reset_index().assign(evidence="simulated")}, (NOTE,), {"by-layer": raw})


def critical_path(progress: Progress) -> Findings:
    """What one layer's step consists of, on the critical path; means over four models. A prediction."""
    rows = []
    for cell in (each for each in _cells() if each.gpus == 32):
        progress(f"{cell.model} on {cell.cluster}, {cell.routing}")
        for name, result in everyone(cell).items():
            ms = {f"{part}_ms": 1e3 * seconds for part, seconds in result.seconds().items()}
            whole = {"layer_ms": sum(ms.values()), "collectives_ms": 1e3 * result.collectives_s}
            rows.append({**cell.where(), "system": name, **ms, **whole})
    raw = pd.DataFrame(rows).assign(evidence="simulated")
    numbers = list(raw.filter(like="_ms"))
    shown = raw.groupby(["testbed", "routing", "system"], sort=False)[numbers].mean().reset_index()
    notes = (
        NOTE,
        "Along the chain of tasks that ends last and never waits: what runs beside a longer task is not on it, so "
        "gathers may stand there in the attention's place, and all-to-alls in that of experts. collectives: "
        "all gathers and reductions, on it or not; move: of rearrangement and re-sharding; other: gate and mix.",
    )
    return Findings({"critical-path": shown.assign(evidence="simulated")}, notes, {"models": raw})


# -------------------------------------------------------------------------------------------------------- crossover


def crossover(progress: Progress) -> Findings:
    """Over the skew: Hecate over EP, over the best of the paper's rivals, and over all; from which skew it pays."""
    rows = []
    for cluster, model in itertools.product(CLUSTERS, MODELS):
        progress(f"{model} on {cluster}")
        samples = Cell(model, cluster, skew=SKEWS[-1]).with_samples().samples  # fits, and is the same, at every skew
        for skew in SKEWS:
            cell = Cell(model, cluster, skew=skew, samples=samples, layers=6, at=(37,))  # layers differ more than steps
            times = {name: found.step_s for name, found in everyone(cell).items()}
            best = {
                "ep": times["ep"],
                "rivals": min(times[name] for name in RIVALS),
                "all": min(times[name] for name in SYSTEMS if not name.startswith("hecate")),
            }
            ratios = {f"over_{name}": seconds / times["hecate"] for name, seconds in best.items()}
            slow = {"ep_slowdown": times["ep"], "rm_over_ep": times["ep"] / times["hecate-rm"]}
            fastest = min(times, key=times.__getitem__)
            found = {"testbed": f"{cluster}-32", "model": model, "skew": skew, "fastest": fastest}
            rows.append({**found, **ratios, **slow})
    raw = pd.DataFrame(rows)
    raw["ep_slowdown"] /= raw.groupby(["testbed", "model"])["ep_slowdown"].transform("first")
    raw = raw.assign(evidence="simulated")
    pays = [
        {
            "testbed": testbed,
            "model": model,
            "against": name,
            "margin": margin,
            "skew": _crossing(part, f"over_{name}", margin),
        }
        for (testbed, model), part in raw.groupby(["testbed", "model"], sort=False)
        for name in ("ep", "rivals", "all")
        for margin in (0.0, 0.1)
    ]
    notes = (
        NOTE,
        "Here six layers of one step are priced. "
        f"skew: the least max over mean from which on Hecate is faster by the margin at every swept skew (up to "
        f"{SKEWS[-1]:g}), interpolated; empty: it is not at the largest. rivals: {', '.join(RIVALS)}; all: and EP, "
        "FSDP, an EPLB-like planner. ep_slowdown: EP's step over its step at skew 1.",
    )
    tables = {"crossover": pd.DataFrame(pays).assign(evidence="simulated"), "by-skew": raw}
    names = {"over_ep": "over EP", "over_rivals": "over the best rival", "over_all": "over the best of all"}
    curves = raw.rename(columns=names).melt(
        ["testbed", "model", "skew", "evidence"], list(names.values()), "schedule", "speedup"
    )
    curves["axis"] = "max/mean, " + curves["model"]
    return Findings(tables, notes, {"curves": curves})


def _crossing(part: pd.DataFrame, column: str, margin: float) -> float:
    """Skew from which on ``column`` is above 1 + margin, linear between the swept ones; NaN: it is not in the end."""
    skew, over = part["skew"].to_numpy(), part[column].to_numpy() - 1 - margin
    below = np.flatnonzero(over <= 0)
    if not len(below):
        return float(skew[0])
    last = below[-1]
    if last + 1 == len(skew):
        return float("nan")
    return float(skew[last] + (skew[last + 1] - skew[last]) * -over[last] / (over[last + 1] - over[last]))


# ----------------------------------------------------------------------------------------------------------- memory


def memory(progress: Progress) -> Findings:
    """Planned memory of the busiest rank under eight systems, beside what the text says of Fig. 13."""
    rows = []
    for cell in (each for each in _cells((SKEW,)) if each.gpus == 32):
        progress(f"{cell.model} on {cell.cluster}")
        found = {name: planned(cell, result) for name, result in everyone(cell).items()}
        for name, each in found.items():
            gigabytes = {
                "parameters_GB": each.experts_parameters / 1e9,
                "gradients_GB": each.experts_gradients / 1e9,
                "optimizer_GB": each.experts_optimizer / 1e9,
                "state_GB": each.state / 1e9,
                "dense_GB": each.dense / 1e9,
                "activations_GB": each.activations / 1e9,
                "peak_GB": each.peak / 1e9,
            }
            ratios = {
                "parameters_over_ep": each.experts_parameters / found["ep"].experts_parameters,
                "state_over_ep": each.state / found["ep"].state,
                "state_over_hecate": each.state / found["hecate"].state,
                "state_over_lowest": each.state / min(other.state for other in found.values()),
            }
            copied = each.experts_parameters - found["ep"].experts_parameters
            of_hecate = found["hecate"].experts_parameters - found["ep"].experts_parameters
            less = 1 - copied / of_hecate if name == "hecate-rm" and of_hecate else float("nan")
            where = {**cell.where(), "samples": cells.setup(cell).samples, "system": name}
            rows.append({**where, **gigabytes, **ratios, "copies_less_than_hecate": less})
    raw = pd.DataFrame(rows).assign(evidence="simulated")
    numbers = list(raw.filter(regex="_GB$|over|less"))
    means = raw.groupby(["testbed", "system"], sort=False)[numbers].mean().reset_index().assign(evidence="simulated")
    text = reported("hecate", "memory")[["system", "quantity", "value", "evidence"]]
    notes = (
        NOTE,
        "Opt + Grad + Param of the MoE layers is state; peak has replicated parameters and activations too. FlexMoE "
        "and the EPLB-like planner have twice the slots that experts need, each a whole copy (16 bytes a parameter). "
        "Planned, not measured.",
    )
    return Findings({"memory": means, "text": text.reset_index(drop=True)}, notes, {"models": raw})


def batches(progress: Progress) -> Findings:
    """GPT-MoE-S on 32 GPUs of A over the batch: time of a sample, memory, and who runs out of it, as in Fig. 14."""
    rows = []
    most = Cell("gpt-moe-s", "A").with_samples().samples
    assert most is not None
    device = cells.setup(Cell("gpt-moe-s", "A")).cluster.device_memory_bytes
    assert device is not None
    for samples in range(1, most + 4):
        cell = Cell("gpt-moe-s", "A", samples=samples)
        progress(f"{samples} samples")
        here = cells.setup(cell)
        for name in SYSTEMS:
            wanted = {"m": here.overlap_degree} if name.startswith("hecate") else {}
            result = run(cell, name, **wanted)
            peak = planned(cell, result).peak
            fits = peak <= device
            seconds = result.step_s if fits else float("nan")
            rows.append({"samples": samples, "system": name, "peak_GB": peak / 1e9, "fits": fits, "step_s": seconds})
    raw = pd.DataFrame(rows)
    keys = raw[["samples"]].merge(raw[raw["system"] == "ep"][["samples", "step_s"]], on="samples", how="left")
    raw["over_ep"] = keys["step_s"].to_numpy() / raw["step_s"]
    hecate = raw[["samples"]].merge(raw[raw["system"] == "hecate"][["samples", "step_s"]], on="samples", how="left")
    raw["slower_than_hecate"] = raw["step_s"] / hecate["step_s"].to_numpy() - 1
    raw = raw.assign(evidence="simulated")
    fitting = raw[raw["fits"]].groupby("system", sort=False)["samples"].max().rename("largest_batch").reset_index()
    of_others = [fitting["largest_batch"].drop(i).max() for i in fitting.index]
    fitting["beyond_others"] = fitting["largest_batch"] - of_others
    text = reported("hecate", "remat")[["system", "quantity", "value", "evidence"]]
    notes = (
        NOTE,
        "Here Hecate materialises t experts whatever the memory; a system whose peak is beyond the device's has no "
        "time. beyond_others: largest batch less the largest that another system reaches.",
    )
    tables = {"batches": raw, "largest": fitting.assign(evidence="simulated"), "text": text.reset_index(drop=True)}
    return Findings(tables, notes, {"both": raw[raw["slower_than_hecate"].notna()]})


# ------------------------------------------------------------------------------------------- intervals and ablation


def ablation(progress: Progress) -> Findings:
    """Sharding only, materialisation only, both, and calibration: layers' speedup over EP, all-to-all time."""
    rows = []
    for cell in (each for each in _cells() if each.gpus == 32):
        progress(f"{cell.model} on {cell.cluster}, {cell.routing}")
        base = run(cell, "ep")
        for name, (system, changes) in ABLATION.items():
            found = run(cell, system, **changes)
            ratios = {
                "layer_over_ep": base.layer_s / found.layer_s,
                "moe_over_ep": float(base.moe_s.mean() / found.moe_s.mean()),
                "all_to_all_ms": 1e3 * found.all_to_all_s,
            }
            rows.append({**cell.where(), "variant": name, **ratios})
    raw = pd.DataFrame(rows).assign(evidence="simulated")
    means = raw.groupby(["testbed", "routing", "variant"], sort=False)[["layer_over_ep", "moe_over_ep"]]
    shown = means.agg(geometric_mean).reset_index()
    times = raw.groupby(["testbed", "routing", "variant"], sort=False)["all_to_all_ms"].mean()
    shown["all_to_all_ms"] = times.to_numpy()
    return Findings({"ablation": shown.assign(evidence="simulated")}, (NOTE,), {"models": raw})


STUDIES = {
    "hecate-steps": Study("Hecate, Figs. 9 and 10: whole steps of eight systems on both clusters", steps),
    "hecate-layers": Study("Hecate: layer by layer", layers),
    "hecate-critical-path": Study("Hecate: what a layer's step consists of", critical_path),
    "hecate-crossover": Study("Hecate: from which skew it pays", crossover),
    "hecate-memory": Study("Hecate, Fig. 13: planned memory of every system", memory),
    "hecate-batches": Study("Hecate, Fig. 14: over the batch, with re-materialisation", batches),
    "hecate-reshard": Study("Hecate: the re-sharding interval", assumptions.reshard),
    "hecate-ablation": Study("Hecate: sharding and materialisation apart", ablation),
    "hecate-rearrangement": Study("Hecate: what rearrangement costs its rivals", assumptions.rearrangement),
    "hecate-assumptions": Study("Hecate: what each assumption does", assumptions.assumptions),
    "hecate-planners": Study("Hecate: time of planners", assumptions.planners),
    "hecate-routings": Study("Hecate: the loads", assumptions.routings),
}
