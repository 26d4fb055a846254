"""How even devices are loaded under a free top-k gate and under MoGE's, by counting the tokens of routings."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness import presets
from harness.placement import Placement
from harness.routing import certify, make_routing
from harness.specs import Model, Workload
from harness.studies import Findings, Progress, Study
from harness.topology import Topology

HOLDS = {4: "two groups", 8: "one group", 16: "half a group"}  # a rank, by how many ranks there are
ROUTINGS = ("uniform", "zipf 4", "hot rank", "recorded", "grouped")
NOTES = (
    "What is prescribed to the gate is what it would have chosen freely; MoGE's gate takes the nearest that it can.",
    "A rank that holds whole groups has the mean load, in every step. One that holds half of a group has not: the gate "
    "says nothing about experts of one group.",
    "Loads of devices, not times: what the exchange of rows costs is no part of this.",
)


def balance(progress: Progress) -> Findings:
    """One row for each gate, routing and number of ranks, each of which gives 512 tokens."""
    model, rows = presets.model("pangu-pro-moe"), []
    for num_ranks, holds in HOLDS.items():
        progress(f"{num_ranks} ranks")
        for routing in ROUTINGS:
            for gate, of_gate in {"top-k": model.model_copy(update={"gate": "gshard"}), "moge": model}.items():
                found = _loads(of_gate, _workload(routing), num_ranks)
                where = {"gate": gate, "routing": routing, "ranks": num_ranks, "a rank holds": holds}
                rows.append({**where, **found, "evidence": "simulated"})
    return Findings({"balance": pd.DataFrame(rows)}, NOTES)


def _workload(name: str) -> Workload:
    if name == "hot rank":
        return Workload(name="hot-rank", tokens_per_rank=512, generator="hot_rank", params={"rank": 0, "share": 0.5})
    named = {"uniform": "uniform-512", "zipf 4": "zipf-4-512", "recorded": "recorded-512", "grouped": "grouped"}
    return presets.workload(named[name]).model_copy(update={"tokens_per_rank": 512})


def _loads(model: Model, workload: Workload, num_ranks: int) -> dict[str, float]:
    """``imbalance_score``: the paper's, (largest - smallest load of a device) / tokens."""
    topology = Topology((num_ranks,))
    routing = make_routing(workload, model, topology)
    assert routing is not None
    stated = certify(routing, Placement.contiguous(model.num_experts, num_ranks), topology, num_groups=model.num_groups)
    loads = routing.counts.sum(0).reshape(num_ranks, -1).sum(1)
    return {
        "max_over_mean": stated.max_over_mean["rank"],
        "group_max_over_mean": stated.max_over_mean["group"],
        "expert_max_over_mean": stated.max_over_mean["expert"],
        "imbalance_score": float(np.ptp(loads) / len(routing.ids)),
    }


STUDIES = {"moge-balance": Study("MoGE: load of devices under its gate and under a free one", balance)}
