"""How much two lanes slow each other down when both are busy.

While lane b is busy, work on lane a proceeds at rate 1 / (1 + c[a][b]); c >= 0. It is measured with the executor that
also runs the plans, one thread (on CUDA one stream) a lane: the same work on lane a is timed alone (t_a) and beside
a lane b that is busy all the while (t_ab), in turns, and c[a][b] = t_ab / t_a - 1, the median over the turns.

On CUDA one thread issues the work of both streams. So that they start together all the same, both wait for a kernel
that does nothing until everything is issued; units of work are large there, since a stream takes some thousand launches
and then lets the issuing thread wait.

``inter`` does all-to-alls among the ranks with equal place in their nodes, ``intra`` all-gathers inside the nodes,
``compute`` matrix products. ``stand-in`` is the lane ``compute`` when its tasks are timed waits; it needs no core, so
it should slow nobody down.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.comm.profile import OPERATIONS, SIDE, Work, drawn_bytes, gemm
from harness.plan.graph import COMPUTE, INTER, INTRA, Plan
from harness.plan.lanes import Executor, executor

STAND_IN = "stand-in"
LENGTH_S = 0.06  # of the work that is timed
SLACK = 2.5  # how much longer the other lane is kept busy, to begin with
REPEATS = 5
UNIT_BYTES, UNIT_ROWS = 1 << 18, 256
WAIT_S = 0.01
MAX_LAUNCHES = 300  # on CUDA, of both lanes together
UNIT_S, MAX_UNIT_BYTES = 1e-3, 1 << 30  # on CUDA: how long a unit takes at least, unless it needs more than that
HOLD_CYCLES = 1 << 27  # of a GPU's clock, to begin with: about 70 ms


def measure(job: Job, payload: dict[str, Any] | None = None) -> dict[str, list[tuple[float, float]]]:
    """Collective. For every ordered pair of lanes, ``a/b``: (alone, beside b) of every repetition, in seconds of this
    rank. Lanes that this job has no ranks or use for are left out. ``payload``, for a quick look: ``lanes``, those
    wanted, and ``repeats``."""
    wanted = payload or {}
    makers = {lane: make for lane, make in _units(job).items() if lane in wanted.get("lanes", (lane,))}
    repeats = wanted.get("repeats", REPEATS)
    found: dict[str, list[tuple[float, float]]] = {}
    with executor(job.device) as lanes:
        sized = {name: _sized(job, lanes, name, make) for name, make in makers.items()}
        units, alone = {name: unit for name, (unit, _) in sized.items()}, {name: n for name, (_, n) in sized.items()}
        for a, b in itertools.permutations(units, 2):
            if {a, b} == {COMPUTE, STAND_IN}:
                continue
            job.phase(f"contention: {a} beside {b}")
            timed, busy = alone[a], math.ceil(SLACK * alone[b])
            while len(found.get(f"{a}/{b}", [])) < repeats:
                single, _ = _run(job, lanes, {a: (units[a], timed)})
                both, left = _run(job, lanes, {a: (units[a], timed), b: (units[b], busy)})
                if left:
                    found.setdefault(f"{a}/{b}", []).append((single, both))
                else:  # b ended first
                    timed, busy = longer(timed, busy, MAX_LAUNCHES if job.device.type == "cuda" else None)
    return found


def longer(timed: int, busy: int, most: int | None) -> tuple[int, int]:
    """Units of the timed lane, and of the other so that it outlasts them: twice as many, or where both together may not
    be more than ``most``, half as many of the timed.

    >>> longer(60, 150, None), longer(60, 150, 300), longer(1, 299, 300)
    ((60, 300), (30, 150), (1, 598))
    """
    if most is None or timed + 2 * busy <= most or timed == 1:
        return timed, 2 * busy
    return timed // 2, busy


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


def _units(job: Job) -> dict[str, Callable[[int], Work]]:
    """For every lane, how to make a little work for it; a larger one takes so many times as long."""
    makers: dict[str, Callable[[int], Work]] = {
        COMPUTE: lambda larger: gemm(UNIT_ROWS * larger, SIDE[job.device.type], job.device)
    }
    if job.device.type != "cuda":
        makers[STAND_IN] = lambda larger: lambda: time.sleep(WAIT_S)
    for lane, group, operation in ((INTER, job.rail(0), "a2a"), (INTRA, job.inner(0), "ag")):
        if group is not None:

            def make(larger: int, group: Any = group, operation: str = operation) -> Work:
                return OPERATIONS[operation](group, *drawn_bytes(2, UNIT_BYTES * larger, job.device))

            makers[lane] = make
    return makers


def _sized(job: Job, lanes: Executor, name: str, make: Callable[[int], Work]) -> tuple[Work, int]:
    """A unit of work, and how many take about ``LENGTH_S``; the same on all ranks."""
    larger, several = 1, 4
    while True:
        unit = make(larger)
        _run(job, lanes, {name: (unit, 2)})
        took, _ = _run(job, lanes, {name: (unit, several)})
        unit_s = _agreed(job, took, dist.ReduceOp.MAX) / several
        if job.device.type != "cuda" or unit_s >= UNIT_S or UNIT_BYTES * larger >= MAX_UNIT_BYTES:
            break
        larger *= 2
    count = math.ceil(LENGTH_S / unit_s)
    return unit, count if job.device.type != "cuda" else min(count, int(MAX_LAUNCHES / (1 + SLACK)))


def _run(job: Job, lanes: Executor, work: dict[str, tuple[Work, int]]) -> tuple[float, bool]:
    """Seconds of the first lane's work on this rank, and whether on every rank the other lane was busy until its end.
    ``work``: unit and how often, by lane."""
    hold = Hold() if job.device.type == "cuda" else None
    while True:
        if job.num_ranks > 1:
            dist.barrier()
        timeline = lanes.run(plan_of(lanes.lanes, work, hold))
        begin = timeline.plan.index[next(iter(work))]
        end, busy_until = timeline.end_s[begin], timeline.end_s[timeline.plan.index[list(work)[-1]]]
        took, lasted = float(end - timeline.start_s[begin]), busy_until >= end
        if _agreed(job, float(hold is None or hold.held), dist.ReduceOp.MIN):
            return took, bool(_agreed(job, float(lasted), dist.ReduceOp.MIN))
        assert hold is not None
        hold.cycles *= 2


def plan_of(lanes: tuple[str, ...], work: dict[str, tuple[Work, int]], hold: Hold | None) -> Plan:
    """A task for every lane of ``work``, behind ``hold`` if there is one, which is asked at the end whether it held."""
    plan, after = Plan(lanes), []
    if hold is not None:
        after = [plan.add("hold", COMPUTE, run=hold.begin)]
    for name, (unit, count) in work.items():
        lane = COMPUTE if name == STAND_IN else name
        plan.add(name, lane, after, run=lambda unit=unit, count=count: _repeat(unit, count))  # type: ignore[misc]
    if hold is not None:
        plan.add("issued", COMPUTE, run=hold.end)
    return plan


class Hold:
    """Keeps streams waiting while their work is issued. ``held``: it was still at it when all had been."""

    def __init__(self, cycles: int = HOLD_CYCLES):
        self.cycles, self.held = cycles, False

    def begin(self) -> None:
        torch.cuda._sleep(self.cycles)
        self.over = torch.cuda.Event()
        self.over.record()

    def end(self) -> None:
        self.held = not self.over.query()


def _repeat(unit: Work, count: int) -> None:
    for _ in range(count):
        unit()


def _agreed(job: Job, value: float, how: dist.ReduceOp.RedOpType) -> float:
    agreed = torch.tensor([value], dtype=torch.float64, device=job.device)
    if job.num_ranks > 1:
        dist.all_reduce(agreed, how)
    return float(agreed)
