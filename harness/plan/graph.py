"""A plan: the tasks of one step, each on a lane, with what they wait for, what they cost and how to run them.

Lanes are resources that work side by side (``compute``; ``inter``: links between nodes, ``intra``: links inside one,
``intra2``: those of the third link level and deeper); a lane does its tasks one after another, in the order in which
they were added, as a CUDA stream does. The same plan is executed (``harness.plan.lanes``) and priced
(``harness.plan.simulate``), so a system says once what happens and when.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from harness.errors import bad
from harness.plan.cost import Cost

COMPUTE, INTER, INTRA, INTRA2 = "compute", "inter", "intra", "intra2"
LANES = (COMPUTE, INTER, INTRA, INTRA2)


Price = Callable[[Cost | None], Cost | None]


class Work(NamedTuple):
    """What a task costs and how it runs; either may be missing (a plan only simulated, or only executed)."""

    cost: Cost | None = None
    run: Callable[[], None] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """``after``: names of tasks that must have ended. ``kind``: what a breakdown sums it under."""

    name: str
    lane: str
    after: tuple[str, ...] = ()
    cost: Cost | None = None
    run: Callable[[], None] | None = None
    kind: str = ""


class Plan:
    """Tasks in the order of their adding. ``add`` refuses what can be seen at once; ``order`` the rest. ``price``: what
    each cost becomes as soon as it is laid out (``Machine.priced``), so that plans of many layers do not hold on to
    byte matrices."""

    def __init__(self, lanes: Iterable[str] = LANES, price: Price = lambda cost: cost):
        self.lanes, self.price = tuple(lanes), price
        self.tasks: list[Task] = []
        self.index: dict[str, int] = {}

    def add(
        self,
        name: str,
        lane: str,
        after: Iterable[str] = (),
        cost: Cost | None = None,
        run: Callable[[], None] | None = None,
        kind: str = "",
    ) -> str:
        """Put a task at the end of its lane; returns its name. ``after`` may name tasks that are added later."""
        if lane not in self.lanes:
            raise bad(f"task {name}.lane", lane, f"unknown lane; this plan has {', '.join(self.lanes)}")
        if name in self.index:
            raise bad("task", name, "is already in the plan; give every task a name of its own")
        self.index[name] = len(self.tasks)
        self.tasks.append(
            Task(name, lane, tuple(after), self.price(cost), run, kind or name.split("[")[0].split(".")[-1])
        )
        for known in ("order", "walk"):
            self.__dict__.pop(known, None)
        return name

    def put(self, name: str, lane: str, after: Iterable[str], work: Work, kind: str = "") -> str:
        """``add`` with what it does."""
        return self.add(name, lane, after, work.cost, work.run, kind)

    @functools.cached_property
    def order(self) -> list[int]:
        """Tasks in an order that respects lanes and waits, of all such the first by the order of adding; an error that
        names the tasks of a cycle or a stranger."""
        turns = self.turns()
        ready = list(turns.first)  # a heap
        found: list[int] = []
        while ready:
            found.append(here := heapq.heappop(ready))
            for each in turns.ended(here):
                heapq.heappush(ready, each)
        if turns.left:
            cycle = self._cycle(set(range(len(self.tasks))) - set(found))
            raise bad("plan", " -> ".join(cycle), "tasks wait for each other in a circle")
        return found

    @functools.cached_property
    def walk(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``order``, and as ``waits[bounds[i] : bounds[i + 1]]`` what comes before task i; int64."""
        bounds = np.cumsum([0, *map(len, self._before)])
        waits = np.array(list(itertools.chain.from_iterable(self._before)), dtype=np.int64)
        return np.array(self.order, dtype=np.int64), waits, bounds

    @property
    def _before(self) -> list[list[int]]:
        """Of every task those that it waits for, and the one before it on its lane."""
        found: list[list[int]] = []
        last: dict[str, int] = {}
        for here, task in enumerate(self.tasks):
            for name in task.after:
                if name not in self.index:
                    raise bad(f"task {task.name}.after", name, "is not in the plan")
            on_lane = [last[task.lane]] if task.lane in last else []
            found.append([self.index[name] for name in task.after] + on_lane)
            last[task.lane] = here
        return found

    def _cycle(self, stuck: set[int]) -> list[str]:
        """Names of tasks that wait for each other, of ``stuck``, each of which waits for another of them."""
        before, here, seen = self._before, min(stuck), []
        while here not in seen:
            seen.append(here)
            here = next(each for each in before[here] if each in stuck)
        return [self.tasks[each].name for each in [here, *reversed(seen[seen.index(here) :])]]

    def priced(self, price: Price) -> Plan:
        """The same with other costs."""
        found = Plan(self.lanes, price)
        found.tasks = [dataclasses.replace(task, cost=price(task.cost)) for task in self.tasks]
        found.index = dict(self.index)
        found.__dict__["order"] = self.order
        return found

    def done(self) -> Plan:
        """The same without what ran, and so without what that holds."""
        found = Plan(self.lanes)
        found.tasks = [dataclasses.replace(task, run=None) for task in self.tasks]
        found.index = dict(self.index)
        return found

    def turns(self) -> Turns:
        return Turns(self._before)


class Turns:
    """Which tasks may begin, as others end. ``first``: those that wait for none; ``left``: how many have not ended."""

    def __init__(self, before: list[list[int]]):
        """``before``: of every task those that it waits for."""
        self.behind: list[list[int]] = [[] for _ in before]
        for here, several in enumerate(before):
            for each in set(several):
                self.behind[each].append(here)
        self.missing = [len(set(several)) for several in before]
        self.first = [here for here, missing in enumerate(self.missing) if not missing]
        self.left = len(before)

    def ended(self, here: int) -> list[int]:
        """What may begin now, in the order of adding."""
        self.left -= 1
        for each in self.behind[here]:
            self.missing[each] -= 1
        return [each for each in self.behind[here] if not self.missing[each]]


@dataclasses.dataclass(frozen=True, eq=False)
class Timeline:
    """When each task of a plan started and ended: seconds, float64 [num_tasks, ...]. Executed or simulated."""

    plan: Plan
    start_s: np.ndarray
    end_s: np.ndarray

    @property
    def total_s(self) -> np.ndarray:
        """From the first start to the last end, [...]; a step over ranks costs the largest of its last axis."""
        return self.end_s.max(0) - self.start_s.min(0) if len(self.end_s) else np.zeros(self.end_s.shape[1:])

    def of(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of one task."""
        here = self.plan.index[name]
        return self.start_s[here], self.end_s[here]

    def hidden(self, kind: str, behind: str = COMPUTE) -> dict[str, float]:
        """Of a timeline [num_tasks, ranks] on one clock: how much of the transfers of ``kind`` is hidden, by the prefix
        before the kind in their names. The tasks with one prefix are one transfer. It lasts from when the last rank has
        begun to when the last has ended, and is hidden while the lane ``behind`` of some rank is at work."""
        busy = [here for here, task in enumerate(self.plan.tasks) if task.lane == behind]
        spans = np.stack([self.start_s[busy].ravel(), self.end_s[busy].ravel()])  # [2, tasks x ranks]
        spans = spans[:, spans[0].argsort()]
        spans[0, 1:] = np.maximum(spans[0, 1:], np.maximum.accumulate(spans[1])[:-1])  # what is not covered before
        tasks: dict[str, list[int]] = {}
        for here, task in enumerate(self.plan.tasks):
            if task.kind == kind:
                tasks.setdefault(task.name[: task.name.rindex(kind)], []).append(here)
        found = {}
        for prefix, mine in tasks.items():
            begin, end = self.start_s[mine[0]].max(), self.end_s[mine].max()
            covered = np.clip(np.minimum(end, spans[1]) - np.maximum(begin, spans[0]), 0, None).sum()
            found[prefix] = float(covered / (end - begin)) if end > begin else 1.0
        return found

    def busy_s(self) -> dict[str, np.ndarray]:
        """Time per kind of task, [...]."""
        spans: dict[str, np.ndarray] = {}
        for task, start, end in zip(self.plan.tasks, self.start_s, self.end_s, strict=True):
            spans[task.kind] = spans.get(task.kind, 0.0) + (end - start)
        return spans
