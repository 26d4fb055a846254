"""What no time may beat. Checked after the timing, fail closed: a violation marks the time and it is not used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from harness.layer.gates import capacity
from harness.layer.work import expert_macs
from harness.plan.links import Ports, lines_of
from harness.routing.certificate import expert_counts
from harness.specs import EXPERTS_CHOOSE, SERVING, Cluster, Experiment
from harness.system import Case, System
from harness.topology import Topology
from harness.traffic import crossing, direction_bytes, port_load, unequal_load

#: counters of real interfaces count headers too, so they lie above the plan; this much below is still rounding
MIN_COUNTED = 0.98
#: below this the start of the counting window matters more than the traffic
MIN_CHECKED_BYTES = 256 * 1024
#: the clock of a token bucket against ours
CLOCK_SLACK = 0.99


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one direction of one case must move and compute, and the least time for it."""

    bytes_by_level: np.ndarray | None  # planned payload, by first differing level; None: cannot be planned
    port_bytes: np.ndarray | None  # of each level's busiest port, the larger of out and in
    flops: float  # of the busiest rank, in the experts
    speed_of_light_s: float | None  # None: neither a bandwidth nor a peak is known


def budgets(experiment: Experiment, system: type[System], cases: list[Case]) -> dict[str, Budget]:
    """By direction; ``cases``: one per MoE layer of the step. Bandwidths and peaks are the cluster's.

    A ``train_step`` has the direction ``total`` only. Its plan holds the exchanges of the MoE layers and not the sum of
    replicated gradients, so it is a lower bound. So has a phase of a server, which goes forward only."""
    plans = [system.planned_bytes(case) for case in cases]
    if experiment.phase in SERVING:
        return {"total": _budget(experiment, system, cases, plans, "forward")}
    if experiment.phase == "train_step":
        return {"total": _budget(experiment, system, cases, plans, "total")}
    directions = ["forward", "backward"] if experiment.backward else ["forward"]
    found = {direction: _budget(experiment, system, cases, plans, direction) for direction in directions}
    if experiment.backward:
        limits = [found[direction].speed_of_light_s for direction in directions]
        total = _budget(experiment, system, cases, plans, "total")
        known = [limit for limit in limits if limit is not None]
        found["total"] = dataclasses.replace(total, speed_of_light_s=sum(known) if known else None)
    return found


def _budget(
    experiment: Experiment,
    system: type[System],
    cases: list[Case],
    plans: list[dict[str, np.ndarray] | None],
    direction: str,
) -> Budget:
    cluster, topology = experiment.cluster, cases[0].topology
    levels = range(topology.num_levels)
    flops = sum(expert_flops(system, case, direction) for case in cases) if experiment.phase != "exchange" else 0.0
    limits = [flops / cluster.device_flops_per_s] if flops and cluster.device_flops_per_s else []
    by_level = ports = None
    known = [plan for plan in plans if plan is not None]
    if len(known) == len(plans):
        matrix = sum((direction_bytes(plan, direction) for plan in known), np.zeros((topology.num_ranks,) * 2))
        by_level = crossing(matrix, topology)
        ports = np.array([_busiest(cluster, matrix, level) for level in levels])
        if lines := lines_of(cluster, pooled=True):  # however a unit's ports share its traffic
            limits.append(float(Ports(topology, lines).of(matrix)))
    return Budget(by_level, ports, flops, max(limits) if limits else None)


def _busiest(cluster: Cluster, matrix: np.ndarray, level: int) -> float:
    """Bytes through the busiest unit's ports."""
    if sizes := cluster.levels[level].ranks_per_port:
        return float(unequal_load(matrix, sizes).max())
    return float(port_load(matrix, Topology(cluster.shape), level).max())


def expert_flops(system: type[System], case: Case, direction: str) -> float:
    """Operations of the busiest rank in its experts: 2 M H per token and GEMM forward, twice that backward."""
    per_expert = expert_counts(case.routing).sum(0)
    if case.model.gate in EXPERTS_CHOOSE:
        per_expert = np.full_like(per_expert, sum(capacity(case.model, count) for count in case.routing.tokens))
    counts = per_expert @ system.planned_shares(case)
    per_token = 2 * expert_macs(case.model)
    return float(counts.max() * per_token * {"forward": 1, "backward": 2, "total": 3}[direction])


def bandwidth_of(cluster: Cluster) -> np.ndarray:
    """Of a unit's ports at every level, bytes per second; infinite where not stated."""
    return np.array([level.unit_bytes_per_s or math.inf for level in cluster.levels])


def violations(
    cluster: Cluster,
    network: Mapping[str, Any],
    budget: Budget | None,
    time_s: float,
    counted: list[int] | None,
    *,
    exact: bool,
) -> list[str]:
    """Why this repetition cannot have happened; empty if it can.

    ``network``: the session's facts; link limits hold where it is shaped or physical. A token bucket may pass its
    bucket at once: two of them (out of the node, into the node) per port are allowed on top of rate x time.
    ``exact``: the plan is that of this repetition, not only of one like it.
    """
    if not math.isfinite(time_s) or time_s <= 0:
        return [f"time {time_s} s is not a positive number"]
    found = []
    names = [level.name for level in cluster.levels]
    topology = Topology(cluster.shape)
    limits = bandwidth_of(cluster) if network.get("network") != "unshaped" else np.full(len(names), math.inf)
    shaped = network.get("levels", [])
    buckets = [2 * (level.get("burst_bytes") or 0) * level.get("ports", 1) for level in shaped] or [0] * len(names)
    for i, name in enumerate(names):
        unequal = cluster.levels[i].ranks_per_port  # whose level counts what stays in a node, too
        may_pass = (limits[i] * time_s + buckets[i]) / CLOCK_SLACK
        if exact and budget is not None and budget.port_bytes is not None and budget.port_bytes[i] > may_pass:
            sent = budget.port_bytes[i]
            found.append(
                f"{sent:.3g} planned bytes through one {name} port in {time_s:.3g} s, at most {may_pass:.3g} pass"
            )
        if counted is None:
            continue
        all_ports = may_pass * topology.num_units(i)
        if counted[i] > all_ports and not unequal:
            found.append(f"{counted[i]:.3g} bytes counted over all {name} ports, at most {all_ports:.3g} pass")
        if exact and budget is not None and budget.bytes_by_level is not None:
            planned = budget.bytes_by_level[i]
            if planned >= MIN_CHECKED_BYTES and counted[i] < MIN_COUNTED * planned:
                found.append(f"{counted[i]:.4g} bytes counted at level {name}, but {planned:.4g} are planned")
    if budget is not None and cluster.device_flops_per_s:
        done = budget.flops / time_s
        if done > cluster.device_flops_per_s / CLOCK_SLACK:
            found.append(f"{done:.3g} FLOP/s on one device, whose peak is {cluster.device_flops_per_s:.3g}")
    return found
