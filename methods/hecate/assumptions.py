"""Studies of what Hecate's page rests on: intervals of rearrangement, assumptions of the model, time of planners."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from baselines import eplb, fastermoe, flexmoe
from harness.studies import Findings, Progress, reported
from harness.topology import Topology
from methods.hecate import cells
from methods.hecate.cells import CLUSTERS, MODELS, NOTE, ROUTINGS, Cell, everyone, geometric_mean, planned, run
from methods.hecate.loads import max_over_mean
from methods.hecate.materialise import materialise
from methods.hecate.played import OFTEN, RIVALS
from methods.hecate.shard import shard

INTERVALS = (10, 25, 50, 100, 0)  # 0: never
HALF_LIVES = (25.0, 100.0, 400.0)
CHANGES: dict[str, dict[str, float | bool]] = {
    "default": {},
    "computation at 20 %": {"efficiency": 0.2},
    "computation at 60 %": {"efficiency": 0.6},
    "20 us to start a message": {"start_s": 20e-6},
    "bw is one GPU's part of the port": {"bw_ranks": 8},
    "each GPU has an eighth of the port to itself": {"ports": 8},
    "experts are passed on from node to node, as broadcasts do": {"passes_on": True},
    "loads drift four times as fast": {"half_life": 25.0},
    "loads drift four times as slowly": {"half_life": 400.0},
    "other loads (seed)": {"seed": 1},
}


def reshard(progress: Progress) -> Findings:
    """Hecate's re-sharding interval, 10 to 100 steps and never: time of a layer, moves with it. A prediction."""
    rows = []
    for cluster, model, half_life in itertools.product(CLUSTERS, ("gpt-moe-s", "bert-moe"), HALF_LIVES):
        progress(f"{model} on {cluster}, half-life {half_life:g}")
        cell = dataclasses.replace(Cell(model, cluster).with_samples(), half_life=half_life, at=OFTEN)
        base = run(cell, "hecate", reshard_every=0).layer_s
        for every in INTERVALS:
            found = run(cell, "hecate", reshard_every=every)
            layer_s, move_s = found.layer_s, found.move_s
            times = {"layer_s": layer_s, "move_s": move_s, "over_never": base / layer_s}
            quiet = {"without_moves": base / (layer_s - move_s)}
            where = {"half_life": half_life, "every": str(every or "never")}
            rows.append({**cell.where(), **where, **times, **quiet, "evidence": "simulated"})
    note = (
        "Of these ten steps are priced. half-life: steps in which the popularity of experts forgets half of itself; "
        "over_never: over no re-sharding."
    )
    return Findings({"reshard": pd.DataFrame(rows)}, (NOTE, note))


def rearrangement(progress: Progress) -> Findings:
    """What rearranging systems pay: their interval, and the slots that copies have. GPT-MoE-S, 32 GPUs."""
    rows = []
    for cluster, half_life in itertools.product(CLUSTERS, HALF_LIVES):
        progress(f"{cluster}, half-life {half_life:g}")
        cell = dataclasses.replace(Cell("gpt-moe-s", cluster).with_samples(), half_life=half_life, at=OFTEN)
        base = run(cell, "ep")
        choices = [(name, every, 2) for name in ("smartmoe", "flexmoe", "eplb") for every in (5, 10, 25, 50, 100)]
        choices += [(name, 25, slots) for name in ("flexmoe", "eplb") for slots in (3, 4)]
        for name, every, slots in choices:
            found = run(cell, name, every=every, slots=slots)
            layer_s = found.layer_s
            ratios = {
                "over_ep": base.layer_s / layer_s,
                "moves_share": found.move_s / layer_s,
                "state_over_ep": planned(cell, found).state / planned(cell, base).state,
            }
            where = {"half_life": half_life, "system": name, "every": every, "slots": slots}
            rows.append({**cell.where(), **where, **ratios, "evidence": "simulated"})
    found_all = pd.DataFrame(rows)
    keys = ["testbed", "half_life", "system"]
    alike = found_all[found_all["slots"] == 2]
    best = alike.loc[alike.groupby(keys, sort=False)["over_ep"].idxmax(), [*keys, "every", "over_ep"]]
    best = best.rename(columns={"every": "best_interval"}).assign(evidence="simulated")
    text = reported("hecate", "motivation")[["system", "quantity", "value", "evidence"]]
    note = (
        "Of these ten steps are priced. slots: of a rank, over the experts per rank; moves: share of a layer's time. "
        "best: of the five intervals."
    )
    return Findings({"best": best, "rearrangement": found_all, "text": text}, (NOTE, note))


def assumptions(progress: Progress) -> Findings:
    """Hecate on 32 GPUs with one assumption changed at a time: geometric means over the four models."""
    rows = []
    for cluster, (change, fields) in itertools.product(CLUSTERS, CHANGES.items()):
        progress(f"{cluster}: {change}")
        ratios = []
        for model in MODELS:
            cell = dataclasses.replace(Cell(model, cluster).with_samples(), layers=2)
            cell = dataclasses.replace(cell, **fields)  # type: ignore[arg-type]
            times = {name: found.step_s for name, found in everyone(cell, ("ep", *RIVALS, "fsdp", "hecate")).items()}
            best = min(times[name] for name in RIVALS)
            ratios.append([seconds / times["hecate"] for seconds in (times["ep"], best, times["fsdp"])])
        means = [geometric_mean(each) for each in zip(*ratios, strict=True)]
        found = dict(zip(("over_ep", "over_best_rival", "over_fsdp"), means, strict=True))
        rows.append({"testbed": f"{cluster}-32", "change": change, **found, "evidence": "simulated"})
    return Findings({"assumptions": pd.DataFrame(rows)}, (NOTE,))


def planners(progress: Progress) -> Findings:
    """How long planners take on this machine, for one layer."""
    rows = []
    for num_experts, num_ranks in ((64, 32), (256, 1024)):
        progress(f"{num_experts} experts on {num_ranks} ranks")
        where = {"experts": num_experts, "ranks": num_ranks}
        rows += [
            {**where, "planner": name, "layer_ms": ms, "evidence": "measured"}
            for name, ms in _timed(num_experts, num_ranks).items()
        ]
    note = "Processor time of one core of this machine; Algorithm 2 plans all layers at once, divided by their number."
    return Findings({"planners": pd.DataFrame(rows)}, (note,))


def _timed(num_experts: int, num_ranks: int) -> dict[str, float]:
    """Milliseconds of a layer, by planner."""
    rng = np.random.default_rng(0)
    loads = [rng.permutation(1e6 / np.arange(1, num_experts + 1)) for _ in range(8)]
    topology, owner = Topology((num_ranks // 8, 8)), np.arange(num_experts) * num_ranks // num_experts
    slots, costs = flexmoe.start(num_experts, num_ranks, 4), flexmoe.Costs(1.0, 1e3, 1e3)
    model = fastermoe.LatencyModel(768, 1536, 5e13, 1.5e9)
    counts = [np.broadcast_to(load / num_ranks, (num_ranks, num_experts)) for load in loads]
    num_layers = 8
    every, owners = np.stack(loads), np.tile(owner, (num_layers, 1))
    plans: dict[str, tuple[Callable[[int], object], int]] = {
        "Algorithm 1, m >= t": (lambda i: materialise(owner, loads[i], 8, 8, topology), 1),
        "Algorithm 1, m < t": (lambda i: materialise(owner, loads[i], 16, 4, topology), 1),
        "Algorithm 2": (lambda i: shard(every, 8, topology, owners), num_layers),
        "FlexMoE": (lambda i: flexmoe.adjust(loads[i], slots, costs), 1),
        "EPLB-like": (lambda i: eplb.balance(loads[i], num_ranks // 8, 8, 2), 1),
        "FasterMoE": (lambda i: fastermoe.shadowed(counts[i], owner, model), 1),
    }
    found = {}
    for name, (plan, of_layers) in plans.items():
        plan(0)  # compiled
        began = time.process_time()
        for i in range(len(loads)):
            plan(i)
        found[name] = 1e3 * (time.process_time() - began) / len(loads) / of_layers
    return found


def routings(progress: Progress) -> Findings:
    """The loads that all this rests on: skew of experts, and of EP's ranks."""
    rows = []
    for skew in ROUTINGS:
        cell = Cell("gpt-moe-s", "A", skew=skew).with_samples()
        progress(cell.routing)
        loads = cells.loads(cell)
        ranks = loads.sum(2).reshape(*loads.shape[:2], 32, -1).sum(-1)
        skews = {
            "expert_max_over_mean": max_over_mean(loads),
            "rank_max_over_mean": float((ranks.max(-1) / ranks.mean(-1)).mean()),
        }
        rows.append({"routing": cell.routing, **skews, "evidence": "simulated"})
    return Findings({"routings": pd.DataFrame(rows)}, ("Means over steps and layers; 64 experts, 32 ranks.",))
