"""HierMoE's experiments as named studies (``moebench study``): simulated from its published constants, with the
value that the paper reports as a row of its own wherever it prints one.

The paper does not say which routing it used. So the studies take uniform routing and Zipf-like ones of rising skew
(max over mean tokens of an expert) and show at which its numbers come out.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from harness import presets
from harness.placement import Placement
from harness.plan.machine import Machine
from harness.specs import Cluster, Model, Workload
from harness.studies import Findings, Progress, Study, left_out, reported
from harness.topology import Topology
from methods.hiermoe.counts import counted_duplication, duplication
from methods.hiermoe.planner import PlannerModel
from methods.hiermoe.replay import ELEMENT_BYTES, NINE, RIVALS, Played, Rival, Swapping, computing, replay, routings
from methods.hiermoe.swap import Objective, best_swap, collect, groups

CLUSTER = "hiermoe"
MODELS = {"deepseek-v3-half": "deepseek-v3-half", "qwen3-30b-a3b": "qwen3-30b-a3b-hiermoe"}
TOKENS = 1024  # of a rank: micro-batch 1, sequence 1024
SKEWS = (1.0, 2.0, 4.0, 8.0)  # max over mean tokens of an expert; 1: uniform random routing
STEPS, WARM = 16, 8  # of training, of which the first lead to a placement and do not count
#: of what a device can do, that the computation beside the exchange reaches; no paper states it
EFFICIENCIES = (0.2, 0.4, 0.6)
AXIS = "max over mean tokens of an expert"
NOTE = (
    "Routing is not described in the paper: skew is the max over mean tokens of an expert, drawn Zipf-like and anew "
    "at every step with the same popular experts; skew 1 is uniform random. Placements follow earlier steps' routing. "
    "megatron: exact sizes; others: messages of a stage as long as its longest (the paper's formulas); tutel-2dh: "
    "experts padded to the fullest, as without drops."
)


def workload(skew: float, tokens: int = TOKENS, seed: int = 0, **params: float) -> Workload:
    if params:
        return Workload(name="drift", tokens_per_rank=tokens, generator="rotating", params=params, seed=seed)
    if skew == 1:
        return Workload(name="uniform", tokens_per_rank=tokens, generator="uniform", seed=seed)
    return Workload(name=f"zipf-{skew:g}", tokens_per_rank=tokens, generator="zipf", params={"target": skew}, seed=seed)


def resized(cluster: Cluster, num_nodes: int) -> Cluster:
    """With another number of nodes and the same constants. On one node all ranks at once are Intra-1, so that HD2 is
    plain deduplication there: stages below the node are those of HD3 and up, as on any number of nodes."""
    found = cluster.resized(num_nodes)
    if num_nodes > 1:
        return found
    return found.model_copy(update={"collectives": {**found.collectives, "a2a.flat": found.collectives["a2a.intra1"]}})


def times(
    cluster: Cluster,
    model: Model,
    load: Workload,
    rivals: Mapping[str, Rival] | None = None,
    steps: int = STEPS,
    warm: int = WARM,
) -> pd.DataFrame:
    """``mean_times`` of ``replay``."""
    return mean_times(one_ways(cluster, replay(cluster, model, routings(load, model, cluster, steps), rivals)), warm)


def one_ways(cluster: Cluster, played: Iterable[Played]) -> Iterator[dict[str, object]]:
    """Each step with what a dispatch takes by the costs of ``cluster``."""
    machine = Machine.published(cluster)
    return (each.row(machine) for each in played)


def mean_times(steps: Iterable[dict[str, object]], warm: int = WARM) -> pd.DataFrame:
    """Mean one_way_s of each variant after ``warm`` steps, and the dimensions that it took."""
    rows = pd.DataFrame(steps)
    counted = rows[rows["step"] >= warm].groupby("variant", sort=False)
    found = counted.agg(one_way_s=("one_way_s", "mean"), deviation_s=("one_way_s", "std")).reset_index()
    found["dimensions"] = [" ".join(map(str, sorted(set(part["dimension"])))) for _, part in counted]
    return found


@functools.cache
def _by_skew(name: str, skew: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    return of_layers(presets.cluster(CLUSTER), presets.model(MODELS[name]), workload(skew))


def of_layers(
    cluster: Cluster,
    model: Model,
    load: Workload,
    rivals: Mapping[str, Rival] | None = None,
    steps: int = STEPS,
    warm: int = WARM,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``times``, and of each variant and efficiency the mean of ``Played.layer_s``."""
    links, rows, layers = Machine.published(cluster), [], []
    machines = {efficiency: computing(cluster, efficiency) for efficiency in EFFICIENCIES}
    for played in replay(cluster, model, routings(load, model, cluster, steps), rivals):
        rows.append(played.row(links))
        for efficiency, machine in machines.items() if played.step >= warm else ():
            layers.append({"variant": played.rival, "efficiency": efficiency, "layer_s": played.layer_s(machine)})
    mean = pd.DataFrame(layers).groupby(["efficiency", "variant"], sort=False)["layer_s"].mean().reset_index()
    return mean_times(rows, warm), mean.sort_values("efficiency", kind="stable")


def over(frame: pd.DataFrame, rival: str, key: Sequence[str] = ()) -> pd.Series:
    """Ratio of the rival's time to each row's, within rows of equal ``key``."""
    if not key:
        return frame.loc[frame["variant"] == rival, "one_way_s"].iloc[0] / frame["one_way_s"]
    base = frame[frame["variant"] == rival][[*key, "one_way_s"]]
    both = frame[list(key)].merge(base, on=list(key), how="left")
    return pd.Series(both["one_way_s"].to_numpy() / frame["one_way_s"].to_numpy(), index=frame.index)


# ------------------------------------------------------------------------------------------------------- Table II


def duplicates(progress: Progress) -> Findings:
    """Share of duplicate (token, expert) pairs under uniform routing: by formula, counted, as Table II prints it."""
    rng = np.random.default_rng(0)
    rows = []
    for top_k in (2, 4, 6, 8):
        progress(f"k = {top_k}")
        ids = rng.random((8192, 256)).argpartition(top_k, axis=1)[:, :top_k]
        for num_groups in (32, 16, 8, 4):
            where = {"top_k": top_k, "groups": num_groups}
            shares = {
                "formula": duplication(top_k, 256, num_groups),
                "counted": counted_duplication(ids, 256, num_groups),
            }
            rows += [{**where, "how": how, "share": share, "evidence": "simulated"} for how, share in shares.items()]
    printed = reported("hiermoe", "duplication")
    keys = printed["quantity"].str.extract(r"k=(?P<top_k>\d+) groups=(?P<groups>\d+)").astype(int)
    table2 = keys.assign(how="Table II", share=printed["value"].to_numpy(dtype=float), evidence="reported")
    found = pd.DataFrame(rows)
    formula = found[found["how"] == "formula"].merge(table2, on=["top_k", "groups"], suffixes=("", "_printed"))
    formula["gap"] = (formula["share"] - formula["share_printed"]).abs()
    gaps = formula[["top_k", "groups", "gap"]].assign(evidence="simulated")
    shown = pd.concat([found, table2]).sort_values(["top_k", "groups", "how"]).reset_index(drop=True)
    return Findings({"duplication": shown}, ("E = 256, which Table II does not state.",), {"gaps": gaps})


# --------------------------------------------------------------------------------------------------- Figs. 10, 11


def exchanges(progress: Progress) -> Findings:
    """All-to-all time of both models on 32 GPUs under six systems and rising skew, beside the text of Fig. 11."""
    found = []
    for name in MODELS:
        for skew in SKEWS:
            progress(f"{name}, skew {skew:g}")
            found.append(_by_skew(name, skew)[0].assign(model=name, skew=skew))
    every = pd.concat(found, ignore_index=True)
    every["over_megatron"] = over(every, "megatron", ["model", "skew"])
    every["over_hd2"] = over(every, "hd2", ["model", "skew"])
    printed = reported("hiermoe", "all-to-all")
    printed = printed[printed["quantity"] == "speedup_over_megatron"]
    text = pd.DataFrame(
        {"model": printed["model"], "variant": printed["system"], "over_megatron": printed["value"].astype(float)}
    ).assign(evidence="reported")
    shown = pd.concat([every.assign(evidence="simulated"), text], ignore_index=True)
    columns = ["model", "variant", "skew", "one_way_s", "over_megatron", "over_hd2", "dimensions", "evidence"]
    shown["variant"] = pd.Categorical(shown["variant"], list(RIVALS))
    shown = shown[columns].sort_values(["model", "variant", "evidence", "skew"], ascending=[True, True, False, True])
    raw = {"exchanges": every.assign(evidence="simulated", axis=f"skew, {AXIS}")}
    kept = left_out(map(presets.model, MODELS.values()), "they are on every rank and take no part in an all-to-all")
    return Findings({"all-to-all": shown.astype({"variant": str})}, (NOTE, *kept), raw)


def steps(progress: Progress) -> Findings:
    """Whole steps: all layers' attention, experts and exchanges, computation at a stated share of the device's rate."""
    found = []
    for name, preset in MODELS.items():
        model = presets.model(preset)
        for skew in SKEWS:
            progress(f"{name}, skew {skew:g}")
            _, layers = _by_skew(name, skew)
            whole = layers.assign(model=name, skew=skew, step_s=model.num_layers * layers["layer_s"])
            base = whole[whole["variant"] == "megatron"].set_index("efficiency")["step_s"]
            found.append(whole.assign(over_megatron=whole["efficiency"].map(base) / whole["step_s"]))
    every = pd.concat(found, ignore_index=True)[["model", "skew", "efficiency", "variant", "step_s", "over_megatron"]]
    printed = reported("hiermoe", "end-to-end")
    note = (
        f"Computation is counted in FLOPs and takes its time at {', '.join(f'{e:.0%}' for e in EFFICIENCIES)} of the "
        "device's rate: the paper states neither its length nor its precision. The rank with most rows computes "
        "longest; metadata travels before the rows; embedding, head, gradients and optimizer are left out."
    )
    text = printed[["system", "quantity", "value", "evidence"]].rename(columns={"system": "variant"})
    every["evidence"] = "simulated"
    axis = [f"skew; computation at {efficiency:.0%}" for efficiency in every["efficiency"]]
    tables = {"steps": every, "text": text.reset_index(drop=True)}
    kept = left_out(map(presets.model, MODELS.values()), "their computation is left out of a step's time")
    return Findings(tables, (NOTE, note, *kept), {"lines": every.assign(axis=axis)})


# -------------------------------------------------------------------------------------------- sweeps and ablations


def sweeps(progress: Progress) -> Findings:
    """Qwen3-30B-A3B over k, E and G: HD2-MoE, HD-MoE and HierMoE over Megatron."""
    base, cluster, rows = presets.model(MODELS["qwen3-30b-a3b"]), presets.cluster(CLUSTER), []
    wanted = {name: RIVALS[name] for name in ("megatron", "hd2", "hd", "hiermoe")}
    points: list[tuple[str, int, Model, Cluster]] = []
    points += [("k", k, base.model_copy(update={"top_k": k}), cluster) for k in (6, 8, 10)]
    points += [("E", e, base.model_copy(update={"num_experts": e}), cluster) for e in (64, 128, 256)]
    points += [("G", g, base, resized(cluster, g // 8)) for g in (8, 16, 32)]
    for sweep, at, model, on in points:
        for skew in (1.0, 4.0):
            progress(f"{sweep} = {at}, skew {skew:g}")
            one = times(on, model, workload(skew), wanted)
            rows.append(one.assign(sweep=sweep, at=at, skew=skew, over_megatron=over(one, "megatron")))
    every = pd.concat(rows, ignore_index=True)
    columns = ["sweep", "at", "skew", "variant", "one_way_s", "over_megatron", "dimensions"]
    shown = every[columns].assign(evidence="simulated")
    lines = shown.assign(routing=[f"skew {skew:g}" for skew in shown["skew"]])
    return Findings({"sweeps": shown}, (NOTE, "Constants are those of 32 GPUs."), {"lines": lines})


def ablations(progress: Progress) -> Findings:
    """HierMoE on Qwen3-30B-A3B with other max functions, gammas, intervals and numbers of pairs, under drift."""
    model, cluster = presets.model(MODELS["qwen3-30b-a3b"]), presets.cluster(CLUSTER)
    time_model, row_bytes = PlannerModel(cluster), model.hidden * ELEMENT_BYTES
    choices: list[tuple[str, str, Swapping]] = []
    choices += [("max", f, Swapping(time_model, row_bytes, function=f)) for f in ("smooth", "plain", "log-sum-exp")]  # type: ignore[arg-type]
    choices += [("gamma", f"{g}", Swapping(time_model, row_bytes, gamma=g)) for g in range(5, 20, 2)]
    choices += [("interval", f"{n}", Swapping(time_model, row_bytes, every=n)) for n in (1, 2, 4, 8)]
    choices += [("pairs", f"{n}", Swapping(time_model, row_bytes, pairs=n)) for n in (1, 2, 4)]
    rows = []
    drift = list(routings(workload(1, hot_experts=16, share=0.5, period=8), model, cluster, STEPS))
    fixed = {name: RIVALS[name] for name in ("megatron", "hd")}
    still = mean_times(one_ways(cluster, replay(cluster, model, drift, fixed)))
    for option, value, swapping in choices:
        progress(f"{option} {value}")
        played = replay(cluster, model, drift, {"hiermoe": RIVALS["hiermoe"]}, swapping)
        one = mean_times(one_ways(cluster, played))
        own = pd.concat([still, one]).set_index("variant")["one_way_s"]
        rows.append(
            {
                "option": option,
                "value": value,
                "over_megatron": own["megatron"] / own["hiermoe"],
                "over_hd": own["hd"] / own["hiermoe"],
                "evidence": "simulated",
            }
        )
    note = "Routing drifts: 16 hot experts take half of all assignments, and are others every 8 steps."
    return Findings({"ablations": pd.DataFrame(rows)}, (NOTE, note))


def nine(progress: Progress) -> Findings:
    """The nine variants of Fig. 13, hierarchy and deduplication apart, on four nodes and on one."""
    rows, model = [], presets.model(MODELS["qwen3-30b-a3b"])
    for num_nodes in (4, 1):
        on = resized(presets.cluster(CLUSTER), num_nodes)
        wanted = {n: v for n, v in NINE.items() if int(v.options.get("dimension", 1)) <= len(on.shape)}
        for skew in (1.0, 4.0):
            progress(f"{num_nodes} nodes, skew {skew:g}")
            one = times(on, model, workload(skew), wanted, steps=4, warm=0)
            rows.append(one.assign(nodes=num_nodes, skew=skew, over_h1=over(one, "h1")))
    every = pd.concat(rows, ignore_index=True)[["nodes", "skew", "variant", "one_way_s", "over_h1", "dimensions"]]
    return Findings({"nine": every.assign(evidence="simulated")}, (NOTE,))


def stability(progress: Progress) -> Findings:
    """One layer of Qwen3-30B-A3B step by step under drift: Megatron, HD-MoE and HierMoE, as in Fig. 12."""
    model, cluster = presets.model(MODELS["qwen3-30b-a3b"]), presets.cluster(CLUSTER)
    progress("32 steps")
    drift = workload(1, hot_experts=16, share=0.5, period=8)
    wanted = {name: RIVALS[name] for name in ("megatron", "hd", "hiermoe")}
    rows = pd.DataFrame(one_ways(cluster, replay(cluster, model, routings(drift, model, cluster, 32), wanted)))
    spread = rows[rows["step"] >= 4].groupby("variant", sort=False)["one_way_s"].agg(["mean", "std", "min", "max"])
    spread = spread.rename(columns=lambda c: f"{c}_s").reset_index()
    spread["deviation"] = spread["std_s"] / spread["mean_s"]
    return Findings(
        {"stability": spread.assign(evidence="simulated")}, (NOTE,), {"iterations": rows.assign(evidence="simulated")}
    )


def search(progress: Progress) -> Findings:
    """How long all layers' swaps take to find on this machine: E = 256, 58 layers, 1,024 tokens a rank, 32 ranks."""
    num_layers, num_ranks = 58, 32
    cluster, model = presets.cluster(CLUSTER), presets.model("deepseek-v3-half")
    topology, time_model = Topology(cluster.shape), PlannerModel(cluster)
    owner = Placement.contiguous(model.num_experts, num_ranks).owner
    rows = []
    for skew in (1.0, 1.5, 2.0, 4.0):
        (routing,) = routings(workload(skew), model, cluster, 1)
        ids = np.ascontiguousarray(routing.of_rank(0))
        for dimension in range(1, 5):
            progress(f"max/mean {skew}, d = {dimension}")
            objective = Objective.of(time_model, dimension, model.hidden * ELEMENT_BYTES)
            group = groups(owner, topology, objective.levels)
            total = collect(routing.ids, group, num_ranks)
            layers = [total.unflat(total.flat()) for _ in range(num_layers)]  # each in memory of its own
            best_swap(total, group, objective, num_ranks)  # compiled
            began = time.process_time()
            for _ in layers:
                collect(ids, group, num_ranks)
            collected = time.process_time()
            for layer in layers:
                best_swap(layer, group, objective, num_ranks)
            statistics_ms, search_ms = 1e3 * (collected - began), 1e3 * (time.process_time() - collected)
            rows.append(
                {
                    "skew": skew,
                    "dimension": dimension,
                    "statistics_ms": statistics_ms,
                    "search_ms": search_ms,
                    "all_ms": statistics_ms + search_ms,
                    "rank_ms": statistics_ms + search_ms / num_layers * math.ceil(num_layers / num_ranks),
                    "evidence": "measured",
                }
            )
    note = (
        "Processor time for 58 layers: statistics of one rank's tokens, and the search. all_ms: if one core searched "
        "all layers; rank_ms: as ranks do it, which share the layers out."
    )
    return Findings({"search": pd.DataFrame(rows)}, (note, *left_out([model], "no swap moves them")))


def stale(progress: Progress) -> Findings:
    """What old statistics cost on the recorded trace: a placement found some training steps earlier, and one found in
    hindsight, on the four recorded steps of each layer."""
    cluster = presets.cluster(CLUSTER)
    time_model, machine = PlannerModel(cluster), Machine.published(cluster)
    model = presets.model(MODELS["qwen3-30b-a3b"]).model_copy(update={"num_experts": 64})
    row_bytes = model.hidden * ELEMENT_BYTES
    found = []
    at = (12, 60, 240, 600)
    trace = presets.workload("recorded")
    for layer in range(4):
        progress(f"layer {layer}")
        of_step = {}
        for step in at:
            params = {**trace.params, "layer": layer, "step": step}
            load = trace.model_copy(update={"tokens_per_rank": 512, "params": params})
            (of_step[step],) = routings(load, model, cluster, 1)
        for step in at:
            for source in (None, *(s for s in at if s <= step)):
                placement = Placement.contiguous(64, 32)
                if source is not None:
                    swapping = Swapping(time_model, row_bytes, pairs=16)
                    placement = swapping.update(0, of_step[source], placement)
                hd = RIVALS["hd"]
                passage = hd.passage(hd.case(cluster, model, of_step[step], placement))
                taken = Played(step, "hd", passage).row(machine)["one_way_s"]
                found.append({"layer": layer, "step": step, "from": source, "one_way_s": taken})
    every = pd.DataFrame(found)
    base = every[every["from"].isna()][["layer", "step", "one_way_s"]]
    both = every[["layer", "step"]].merge(base, on=["layer", "step"], how="left", suffixes=("", "_base"))
    every["over_contiguous"] = both["one_way_s"].to_numpy() / every["one_way_s"].to_numpy()
    placed = every[every["from"].notna()].groupby(["step", "from"])["over_contiguous"]
    shown = placed.agg(["mean", "min", "max"]).reset_index()
    shown["age"] = shown["step"] - shown["from"].astype(int)
    note = (
        "A placement of 16 swaps from the routing at step 'from' of the recorded training, timed on that of 'step'; "
        "age 0 is hindsight. Ratios to contiguous experts, over the recorded layers."
    )
    raw = {"layers": every.assign(evidence="simulated")}
    return Findings({"stale": shown.assign(evidence="simulated")}, (note,), raw)


STUDIES = {
    "hiermoe-duplication": Study("HierMoE, Table II: duplicate rows by k and number of groups", duplicates),
    "hiermoe-exchanges": Study("HierMoE, Fig. 11: all-to-all of six systems, by skew", exchanges),
    "hiermoe-steps": Study("HierMoE, Fig. 10: whole steps, by skew", steps),
    "hiermoe-sweeps": Study("HierMoE, Table IV: over k, E and G", sweeps),
    "hiermoe-ablations": Study("HierMoE: max function, gamma, interval, pairs", ablations),
    "hiermoe-nine": Study("HierMoE, Fig. 13: hierarchy and deduplication apart", nine),
    "hiermoe-stability": Study("HierMoE, Fig. 12: iteration by iteration", stability),
    "hiermoe-search": Study("HierMoE: time to find all layers' swaps", search),
    "hiermoe-stale": Study("HierMoE: what old statistics cost, on the recorded trace", stale),
}
