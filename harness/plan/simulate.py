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

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from harness.plan.cost import Cost, Hold, InTurn, OnLinks, Timed, Transfer, meeting
from harness.plan.graph import Plan, Timeline
from harness.plan.links import Busy, LinkModel
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
        spans = {lane: (start[here], end[here]) for lane, here in of_lane.items()}
        for (a, b), share in lost.items():
            wanted[of_lane[a]] += share * _overlap(*spans[a], *spans[b])
        wanted = np.minimum(wanted, durations / (1 - MAX_LOST))
        stretched = wanted if iteration < 10 else (wanted + stretched) / 2  # damped, should it swing
        before, (start, end) = end, _longest_path(plan, stretched, ways)
        if np.abs(end - before).max() <= TOLERANCE * max(end.max(), 1e-300):
            break
    return Timeline(plan, start, end)


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A collective begins with the last of its group and ends for all with the slowest. ``members`` of a group are
    ranks ``apart`` from each other."""

    members: int
    apart: int

    @classmethod
    def of(cls, scope: str, topology: Topology) -> Meeting:
        return cls(*meeting(scope, topology.shape))

    def __call__(self, ready: np.ndarray, lasts: np.ndarray, busy: Busy) -> tuple[np.ndarray, np.ndarray]:
        begins = self._largest(ready)
        return begins, begins + self._largest(lasts)

    def _largest(self, values: np.ndarray) -> np.ndarray:
        grid = values.reshape(-1, self.members, self.apart)
        return np.broadcast_to(grid.max(axis=1, keepdims=True), grid.shape).reshape(values.shape)


#: of a task that is ready at [..], and takes [..] alone, on a lane: when it begins and ends
Way = Callable[[np.ndarray, np.ndarray, Busy], tuple[np.ndarray, np.ndarray]]


def _longest_path(plan: Plan, durations: np.ndarray, ways: Mapping[int, Way]) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of every task, [num_tasks, ...]. ``ways``: of those that are more than their duration."""
    from harness.plan.walk import walk  # numba takes its time to import

    start, end = np.zeros(durations.shape), np.zeros(durations.shape)
    order, waits, bounds = plan.walk
    groups = np.ones((len(plan.tasks), 2), dtype=np.int64)
    for here, way in ways.items():
        if isinstance(way, Meeting):
            groups[here] = way.members, way.apart
    flat = [np.ascontiguousarray(each, dtype=np.float64).reshape(len(order), -1) for each in (durations, start, end)]
    done, busy = 0, Busy()  # all lanes go through the same ports
    for place in [i for i, here in enumerate(order) if not isinstance(ways.get(int(here), Meeting(1, 1)), Meeting)]:
        walk(order[done:place], waits, bounds, groups, *flat)
        here, done = int(order[place]), place + 1
        before = waits[bounds[here] : bounds[here + 1]]
        start[here], end[here] = ways[here](end[before].max(0, initial=0.0), durations[here], busy)
    walk(order[done:], waits, bounds, groups, *flat)
    return start, end


def _ways(plan: Plan, topology: Topology, links: LinkModel | None) -> dict[int, Way]:
    """Of every task in which ranks wait for each other. Ranks are the last axis."""
    found = ((here, _way(task.cost, topology, links)) for here, task in enumerate(plan.tasks))
    return {here: way for here, way in found if way is not None}


def _way(cost: Cost | None, topology: Topology, links: LinkModel | None) -> Way | None:
    match cost:
        case InTurn():
            return _in_turn(cost, topology, links)
        case Transfer() if links is not None and not links.meets:
            return _apart(cost, links)
        case OnLinks():
            return Meeting.of(cost.scope, topology)
    return None


def _alone(ready: np.ndarray, lasts: np.ndarray, busy: Busy) -> tuple[np.ndarray, np.ndarray]:
    return ready, ready + lasts


def _apart(cost: Transfer, links: LinkModel) -> Way:
    """Ranks do not wait for each other; what the task lasts longer than alone, each of them does."""
    alone = links.seconds(cost)
    return lambda ready, lasts, busy: (ready, links.finish(cost, ready, busy) + (lasts - alone))


def _in_turn(cost: InTurn, topology: Topology, links: LinkModel | None) -> Way:
    """Part after part, each as if it were a task; what the task lasts longer than alone, its last part does."""
    ways = [_way(part, topology, links) or _alone for part in cost.parts] or [_alone]
    each = [_priced_s(part, links) for part in cost.parts] or [np.zeros(1)]
    alone = sum(each)

    def way(ready: np.ndarray, lasts: np.ndarray, busy: Busy) -> tuple[np.ndarray, np.ndarray]:
        longer, begins, now = lasts - alone, None, ready
        for i, (go, seconds) in enumerate(zip(ways, each, strict=True)):
            takes = np.broadcast_to(seconds + longer if i == len(each) - 1 else seconds, ready.shape)
            start, now = go(now, takes, busy)
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
    raise AssertionError(f"{type(cost).__name__} is not priced")


def _overlap(start: np.ndarray, end: np.ndarray, other_start: np.ndarray, other_end: np.ndarray) -> np.ndarray:
    """How long each task [n, ...] overlaps the tasks of another lane [m, ...]."""
    from harness.plan.walk import overlap

    found = np.zeros(start.shape)
    if len(start) and len(other_start):
        overlap(*(each.reshape(len(each), -1) for each in (start, end, other_start, other_end, found)))
    return found


__all__ = ["schedule", "simulate"]
