"""The event model: when every task of a plan starts and ends, for many configurations or many ranks at once.

Lanes are queues, so the order on every lane is known beforehand and the simulation is a longest path: a task starts
when the task before it on its lane and all that it waits for have ended; a collective, when that holds on every rank
of its group. Numpy carries the other axes, so a grid of configurations or a thousand ranks cost one walk over the
tasks.

Busy lanes may slow each other down (``Contention``, measured by ``moebench profile``): while lane b is busy, work
on lane a proceeds at 1 / (1 + c[a][b]) of its rate; several busy lanes add up in what they take away. How long lanes
are busy together depends on the times and the times on that, so it is iterated to a fixed point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from harness.plan.cost import Cost, Hold, InTurn, OnLinks, Staged, Timed, Transfer, span
from harness.plan.graph import Plan, Timeline
from harness.plan.links import LinkModel
from harness.plan.machine import Contention, Machine
from harness.topology import Topology

MAX_ITERATIONS, TOLERANCE = 200, 1e-9
MAX_LOST = 0.95  # of a lane's rate to all the others together


def simulate(plan: Plan, machine: Machine, topology: Topology | None = None) -> Timeline:
    """Price and simulate ``plan``. With ``topology`` the last axis of the costs is that of its ranks."""
    priced = plan.priced(machine.priced)
    durations = machine.durations(priced)
    if topology is not None and durations.shape[1:][-1:] != (topology.num_ranks,):
        if durations.shape[1:][-1:] != (1,):
            durations = durations[..., None]
        durations = np.broadcast_to(durations, (*durations.shape[:-1], topology.num_ranks)).copy()
    found = schedule(priced, durations, machine.contention, topology, machine.links)
    return Timeline(plan, found.start_s, found.end_s)


def schedule(
    plan: Plan,
    durations: np.ndarray,
    contention: Contention | None = None,
    topology: Topology | None = None,
    links: LinkModel | None = None,
) -> Timeline:
    """Simulate ``plan`` with ``durations`` in seconds [num_tasks, ...], each as if alone on the machine. ``links``: say
    when a transfer ends whose ranks do not meet. With ``topology`` compound costs are priced already."""
    lost = {
        (a, b): c / (1 + c)
        for a, row in (contention or {}).items()
        for b, c in row.items()
        if c > 0 and a != b and {a, b} <= set(plan.lanes)
    }
    ways = {} if topology is None else _ways(plan, topology, links)
    start, end = _longest_path(plan, durations, ways)
    if not lost or not plan.tasks:
        return Timeline(plan, start, end)
    of_lane = {
        lane: np.array([i for i, t in enumerate(plan.tasks) if t.lane == lane], dtype=int) for lane in plan.lanes
    }
    stretched = durations
    for iteration in range(MAX_ITERATIONS):
        wanted = durations.copy()
        for (a, b), share in lost.items():
            wanted[of_lane[a]] += share * _overlap(
                start[of_lane[a]], end[of_lane[a]], start[of_lane[b]], end[of_lane[b]]
            )
        wanted = np.minimum(wanted, durations / (1 - MAX_LOST))
        stretched = wanted if iteration < 10 else (wanted + stretched) / 2  # damped, should it swing
        before, (start, end) = end, _longest_path(plan, stretched, ways)
        if np.abs(end - before).max() <= TOLERANCE * max(end.max(), 1e-300):
            break
    return Timeline(plan, start, end)


#: of a task that is ready at [..], and takes [..] alone: when it begins and ends
Way = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _longest_path(plan: Plan, durations: np.ndarray, ways: Mapping[int, Way]) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of every task, [num_tasks, ...]."""
    start, end = np.zeros_like(durations), np.zeros_like(durations)
    free: dict[str, np.ndarray] = {}
    for here in plan.order:
        task = plan.tasks[here]
        ready = [end[plan.index[name]] for name in task.after]
        if task.lane in free:
            ready.append(free[task.lane])
        begins = np.zeros_like(durations[here])
        for each in ready:
            begins = np.maximum(begins, each)
        if here in ways:
            start[here], end[here] = ways[here](begins, durations[here])
        else:
            start[here], end[here] = begins, begins + durations[here]
        free[task.lane] = end[here]
    return start, end


def _ways(plan: Plan, topology: Topology, links: LinkModel | None) -> dict[int, Way]:
    """Of every task in which ranks wait for each other. Ranks are the last axis."""
    found = ((here, _way(task.cost, topology, links)) for here, task in enumerate(plan.tasks))
    return {here: way for here, way in found if way is not None}


def _way(cost: Cost | None, topology: Topology, links: LinkModel | None) -> Way | None:
    match cost:
        case InTurn():
            return _in_turn(cost, topology, links)
        case Transfer() | Staged() if links is not None and not links.meets:
            return _apart(cost, links)
        case OnLinks() | Staged():
            return _meeting(cost.scope, topology)
    return None


def _alone(ready: np.ndarray, lasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ready, ready + lasts


def _meeting(scope: str, topology: Topology) -> Way:
    """A collective begins with the last of its group and ends for all with the slowest."""
    first, behind = span(scope, topology.num_levels)
    parts = tuple(math.prod(topology.shape[a:b]) for a, b in ((0, first), (first, behind), (behind, None)))

    def largest(values: np.ndarray) -> np.ndarray:
        grid = values.reshape(*values.shape[:-1], *parts)
        return np.broadcast_to(grid.max(axis=-2, keepdims=True), grid.shape).reshape(values.shape)

    def way(ready: np.ndarray, lasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begins = largest(ready)
        return begins, begins + largest(lasts)

    return way


def _apart(cost: Transfer | Staged, links: LinkModel) -> Way:
    """Ranks do not wait for each other; what the task lasts longer than alone, each of them does."""
    finish, alone = (
        (links.finish_staged, links.staged(cost)) if isinstance(cost, Staged) else (links.finish, links.seconds(cost))
    )
    return lambda ready, lasts: (ready, finish(cost, ready) + (lasts - alone))  # type: ignore[arg-type]


def _in_turn(cost: InTurn, topology: Topology, links: LinkModel | None) -> Way:
    """Part after part, each as if it were a task; what the task lasts longer than alone, its last part does."""
    ways = [_way(part, topology, links) or _alone for part in cost.parts] or [_alone]
    each = [_priced_s(part, links) for part in cost.parts] or [np.zeros(1)]
    alone = sum(each)

    def way(ready: np.ndarray, lasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        longer, begins, now = lasts - alone, None, ready
        for i, (go, seconds) in enumerate(zip(ways, each, strict=True)):
            takes = np.broadcast_to(seconds + longer if i == len(each) - 1 else seconds, ready.shape)
            start, now = go(now, takes)
            begins = start if begins is None else begins
        assert begins is not None
        return begins, now

    return way


def _priced_s(cost: Cost, links: LinkModel | None) -> np.ndarray:
    """Seconds of a part that is priced, each rank's own."""
    match cost:
        case Hold() | Timed():
            return np.asarray(cost.seconds, dtype=np.float64)
        case InTurn():
            return np.asarray(sum(_priced_s(part, links) for part in cost.parts))
        case Transfer() if links is not None:
            return np.asarray(links.seconds(cost))
        case Staged() if links is not None:
            return np.asarray(links.staged(cost))
    raise AssertionError(f"{type(cost).__name__} is not priced")


def _overlap(start: np.ndarray, end: np.ndarray, other_start: np.ndarray, other_end: np.ndarray) -> np.ndarray:
    """How long each task [n, ...] overlaps the tasks of another lane [m, ...], which follow one another."""
    if not len(other_start) or not len(start):
        return np.zeros_like(start)
    columns = start[0].size
    span = 1.0 + max(float(end.max()), float(other_end.max()))
    offset = np.arange(columns) * span  # every column gets its own stretch of one axis, so that one call serves all
    knots = np.stack([other_start, other_end], axis=1).reshape(-1, columns)  # s0, e0, s1, e1, ...
    lengths = (other_end - other_start).reshape(-1, columns)
    done = np.cumsum(lengths, axis=0)
    busy = np.stack([done - lengths, done], axis=1).reshape(-1, columns)  # of the other lane until each knot
    before = np.concatenate([[0.0], np.cumsum(done[-1])])[:-1]
    x, y = (knots + offset).T.ravel(), (busy + before).T.ravel()

    def until(times: np.ndarray) -> np.ndarray:
        flat = times.reshape(-1, columns)
        # clipped to the column's own knots: outside of them the other lane is idle
        inside = np.clip(flat, knots[0], knots[-1]) + offset
        return np.interp(inside, x, y).reshape(times.shape)

    return until(end) - until(start)


__all__ = ["schedule", "simulate"]
