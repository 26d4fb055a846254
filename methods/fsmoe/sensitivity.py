"""Which assumption moves the simulated averages of the grid (Table 5 of arXiv 2501.10714), one change at a time.

Nothing here is fitted to the reported averages: each change is another reading of what the paper leaves open, or an
effect that its model leaves out, and all of them are shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pandas as pd

from harness.plan.graph import COMPUTE, INTER, INTRA
from harness.plan.machine import Contention
from harness.specs import Cluster
from methods.fsmoe.grid import HEADS, TESTBEDS, Assumptions, simulate_grid, speedups

CONTENTION = (0.1, 0.3, 1.0)
MOST_OF_ALL = 0.3  # with all lanes at c = 1, three busy lanes would stand still
GEMM_FACTORS = (0.5, 2.0)
BOTH = tuple(TESTBEDS)


@dataclasses.dataclass(frozen=True)
class Change:
    """One assumption changed. ``about``: which one, to group by. ``testbeds``: those on which it means anything."""

    name: str
    about: str
    assumed: Assumptions
    testbeds: tuple[str, ...] = BOTH


def between(pairs: tuple[tuple[str, str], ...], c: float) -> Contention:
    """Lanes of each pair slow each other down to 1 / (1 + c) of their rate while both are busy."""
    found: Contention = {}
    for a, b in pairs:
        found.setdefault(a, {})[b] = c
        found.setdefault(b, {})[a] = c
    return found


def rescaled(**factors: float) -> Callable[[Cluster], Cluster]:
    """A reading of the constants in which the betas of operations (a2a, ag, rs, ar, gemm) are so many times larger."""

    def revise(cluster: Cluster) -> Cluster:
        collectives = {
            key: cost.model_copy(update={"beta_s_per_byte": cost.beta_s_per_byte * factors.get(key.split(".")[0], 1.0)})
            for key, cost in cluster.collectives.items()
        }
        changed: dict[str, Any] = {"collectives": collectives}
        if cluster.gemm is not None:
            beta = cluster.gemm.beta_s_per_mac * factors.get("gemm", 1.0)
            changed["gemm"] = cluster.gemm.model_copy(update={"beta_s_per_mac": beta})
        return cluster.model_copy(update=changed)

    return revise


def as_printed(cluster: Cluster) -> Cluster:
    """Testbed A's betas under the names that the caption of Fig. 5 gives them, in milliseconds per float32 element."""
    printed = {"a2a.inter": 2.21e-7, "ag.intra": 2.32e-6, "rs.intra": 2.34e-7}
    collectives = {
        key: cost.model_copy(update={"beta_s_per_byte": printed[key] / 1e3 / 4}) if key in printed else cost
        for key, cost in cluster.collectives.items()
        if "@" not in key  # those of other sizes are the driver's, which are not permuted
    }
    return cluster.model_copy(update={"collectives": collectives})


def changes() -> list[Change]:
    """The default first, then every assumption changed alone."""
    pairs = {
        "inter and intra": ((INTER, INTRA),),
        "links and compute": ((INTER, COMPUTE), (INTRA, COMPUTE)),
        "all lanes": ((INTER, INTRA), (INTER, COMPUTE), (INTRA, COMPUTE)),
    }
    found = [
        Change("default", "", Assumptions()),
        Change("k = 1", "top-k", Assumptions(top_k=1)),
        Change("f = * is one copy a token", "no drop", Assumptions(no_drop=1.0)),
        Change("no dense part", "dense part", Assumptions(dense=False)),
        Change("attention by the driver's time model", "dense part", Assumptions(attention="driver"), ("B",)),
        Change("no gradient to reduce", "gradient", Assumptions(gradient=False)),
        Change("not cut if the all-to-all takes under 1 ms", "degrees", Assumptions(least_a2a_s=1e-3)),
        Change("betas as printed in Fig. 5", "constants", Assumptions(revise=as_printed), ("A",)),
        Change(
            "communication betas per byte",
            "constants",
            Assumptions(revise=rescaled(a2a=4, ag=4, rs=4, ar=4)),
            ("A",),
        ),
        Change(
            "communication betas per float32 element",
            "constants",
            Assumptions(revise=rescaled(a2a=1 / 4, ag=1 / 4, rs=1 / 4, ar=1 / 4)),
            ("B",),
        ),
    ]
    found += [
        Change(f"GEMM beta times {factor:g}", "constants", Assumptions(revise=rescaled(gemm=factor)))
        for factor in GEMM_FACTORS
    ]
    return found + [
        Change(f"contention of {which}, c = {c:g}", "contention", Assumptions(contention=between(lanes, c)))
        for which, lanes in pairs.items()
        for c in CONTENTION
        if len(lanes) < 3 or c <= MOST_OF_ALL
    ]


def sensitivity(progress: Callable[[str], None] = lambda text: None) -> pd.DataFrame:
    """Mean speedup over Tutel's schedule by change, testbed and schedule, and how far it lies from the default's."""
    found = []
    for change in changes():
        progress(change.name)
        grid = simulate_grid(change.assumed, change.testbeds, heads=HEADS[:1])  # the same mean as over all
        means = speedups(grid)[["testbed", "schedule", "mean"]].rename(columns={"mean": "mean_speedup"})
        found.append(means.assign(change=change.name, about=change.about))
    table = pd.concat(found, ignore_index=True)
    default = table[table["change"] == "default"].set_index(["testbed", "schedule"])["mean_speedup"]
    here = pd.MultiIndex.from_frame(table[["testbed", "schedule"]])
    table["from_default"] = table["mean_speedup"].to_numpy() - default.reindex(here).to_numpy()
    return table.assign(evidence="simulated")[
        ["testbed", "change", "about", "schedule", "mean_speedup", "from_default", "evidence"]
    ]
