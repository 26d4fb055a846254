"""How much two lanes slow each other down when both are busy.

While lane b is busy, work on lane a proceeds at rate 1 / (1 + c[a][b]); c >= 0. It is measured with the executor that
also runs the plans, one thread (on CUDA one stream) a lane: the same work on lane a is timed alone (t_a) and beside
a lane b that is busy all the while (t_ab), in turns, and c[a][b] = t_ab / t_a - 1, the median over the turns.

``inter`` does all-to-alls among the ranks with equal place in their nodes, ``intra`` all-gathers inside the nodes,
``compute`` matrix products. ``stand-in`` is the lane ``compute`` when its tasks are timed waits; it needs no core, so
it should slow nobody down.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.comm.profile import OPERATIONS, SIDE, Work, gemm
from harness.plan.graph import COMPUTE, INTER, INTRA, Plan
from harness.plan.lanes import Executor, executor

STAND_IN = "stand-in"
LENGTH_S = 0.06  # of the work that is timed
SLACK = 2.5  # how much longer the other lane is kept busy, to begin with
REPEATS = 5
UNIT_BYTES, UNIT_ROWS = 1 << 18, 256
WAIT_S = 0.01
_CUDA_LARGER = 16


def measure(job: Job, payload: dict[str, Any] | None = None) -> dict[str, list[tuple[float, float]]]:
    """Collective. For every ordered pair of lanes, ``a/b``: (alone, beside b) of every repetition, in seconds of this
    rank. Lanes that this job has no ranks or use for are left out. ``payload``, for a quick look: ``lanes``, those
    wanted, and ``repeats``."""
    wanted = payload or {}
    units = {lane: unit for lane, unit in _units(job).items() if lane in wanted.get("lanes", (lane,))}
    repeats = wanted.get("repeats", REPEATS)
    found: dict[str, list[tuple[float, float]]] = {}
    with executor(job.device) as lanes:
        alone = {name: _length(job, lanes, name, unit) for name, unit in units.items()}
        for a, b in itertools.permutations(units, 2):
            if {a, b} == {COMPUTE, STAND_IN}:
                continue
            job.phase(f"contention: {a} beside {b}")
            busy = math.ceil(SLACK * alone[b])
            while len(found.get(f"{a}/{b}", [])) < repeats:
                single, _ = _run(job, lanes, {a: (units[a], alone[a])})
                both, left = _run(job, lanes, {a: (units[a], alone[a]), b: (units[b], busy)})
                if left:
                    found.setdefault(f"{a}/{b}", []).append((single, both))
                else:  # b ended first
                    busy *= 2
    return found


def matrix(of_ranks: list[dict[str, list[tuple[float, float]]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """c[a][b] of what ``measure`` returned on all ranks, and the (lowest, highest) of its repetitions, which may be
    negative. A repetition takes as long as on its slowest rank."""
    slowdown: dict[str, dict[str, float]] = {}
    spread: dict[str, dict[str, tuple[float, float]]] = {}
    for key in of_ranks[0]:
        a, b = key.split("/")
        alone, both = np.moveaxis(np.array([rank[key] for rank in of_ranks]).max(0), -1, 0)  # [repeats] each
        seen = both / alone - 1
        slowdown.setdefault(a, {})[b] = max(0.0, float(np.median(seen)))
        spread.setdefault(a, {})[b] = (float(seen.min()), float(seen.max()))
    return slowdown, spread


def _units(job: Job) -> dict[str, Work]:
    """A little work for every lane."""
    cuda = job.device.type == "cuda"
    larger = _CUDA_LARGER if cuda else 1
    units: dict[str, Work] = {COMPUTE: gemm(UNIT_ROWS * larger, SIDE[job.device.type], job.device)}
    if not cuda:
        units[STAND_IN] = lambda: time.sleep(WAIT_S)
    for lane, group, operation in ((INTER, job.rail(0), "a2a"), (INTRA, job.inner(0), "ag")):
        if group is not None:
            buffers = torch.zeros(2, UNIT_BYTES * larger, dtype=torch.uint8, device=job.device)
            units[lane] = OPERATIONS[operation](group, *buffers)
    return units


def _length(job: Job, lanes: Executor, name: str, unit: Work) -> int:
    """How many of ``unit`` take about ``LENGTH_S``; the same on all ranks."""
    _run(job, lanes, {name: (unit, 2)})
    several = 4
    took, _ = _run(job, lanes, {name: (unit, several)})
    return math.ceil(several * LENGTH_S / _agreed(job, took, dist.ReduceOp.MAX))


def _run(job: Job, lanes: Executor, work: dict[str, tuple[Work, int]]) -> tuple[float, bool]:
    """Seconds of the first lane's work on this rank, and whether on every rank the other lane was busy until its end.
    ``work``: unit and how often, by lane."""
    plan = Plan(lanes.lanes)
    for name, (unit, count) in work.items():
        plan.add(name, COMPUTE if name == STAND_IN else name, run=lambda unit=unit, count=count: _repeat(unit, count))  # type: ignore[misc]
    if job.num_ranks > 1:
        dist.barrier()
    timeline = lanes.run(plan)
    start, end = timeline.start_s, timeline.end_s
    lasted = _agreed(job, float(end[-1] >= end[0]), dist.ReduceOp.MIN)
    return float(end[0] - start[0]), bool(lasted)


def _repeat(unit: Work, count: int) -> None:
    for _ in range(count):
        unit()


def _agreed(job: Job, value: float, how: dist.ReduceOp.RedOpType) -> float:
    agreed = torch.tensor([value], dtype=torch.float64, device=job.device)
    if job.num_ranks > 1:
        dist.all_reduce(agreed, how)
    return float(agreed)
