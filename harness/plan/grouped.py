"""A system in several expert-parallel groups (``harness.groups``): each is asked as if it were alone, and what all of
them say is put together to what a system says of a whole job.

    in_groups(system)   builds a rank's layer in its own group; plans bytes and rows of all
    Together            a layer that is priced: every task costs what those of its name cost in all groups at once
    GroupedCourse       a training: groups decide apart which copies there are, and alike where experts go
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from harness.comm.job import Job
from harness.errors import Unplanned
from harness.groups import Groups
from harness.layer.weights import Weights
from harness.placement import Placement
from harness.plan.cost import Compute, Cost, Even, Experts, Hold, InTurn, OnLinks, Transfer, meeting, scope_of
from harness.plan.course import Course
from harness.plan.graph import Plan, Timeline, Work
from harness.plan.passage import Dense, Direction, Passage
from harness.routing.types import Routing
from harness.specs import Cluster, Collective
from harness.system import AfterStep, Case, GradientSlices, MoELayer, System

Array = np.ndarray
Matrices = dict[str, Array]


def part_of(case: Case, groups: Groups, at: int) -> Case:
    """``case`` of one group."""
    return dataclasses.replace(
        case,
        topology=groups.topology,
        placement=groups.placement(case.placement, at),
        routing=case.routing.gathered(groups.members[at][:, None]),
        cluster=None if case.cluster is None else cluster_of(case.cluster, groups),
        groups=None,
        whole=case.routing,
    )


@functools.lru_cache(maxsize=64)
def cluster_of(cluster: Cluster, groups: Groups) -> Cluster:
    """As one group finds it while all are at work: with its share of every port, and those costs of collectives that
    hold for groups of as many ranks so far apart."""
    levels, shape = [], groups.shape
    for at, (level, size) in enumerate(zip(cluster.levels, shape, strict=True)):
        sharing = math.prod(cluster.shape[at + 1 :]) // math.prod(shape[at + 1 :])  # groups at one unit's ports
        rate = level.unit_bytes_per_s
        rate = None if rate is None else rate / sharing
        levels.append(level.model_copy(update={"size": size, "ports": 1, "bandwidth_bytes_per_s": rate}))
    scopes = ["flat", *(f"{kind}{at}" for kind in ("inter", "intra") for at in range(1, len(shape)))]
    found: dict[str, Collective] = {}
    for operation in {key.partition(".")[0] for key in cluster.collectives}:
        for scope in scopes:
            members, _ = meeting(scope, shape)
            key = f"{operation}.{whole_scope(groups, scope)}" if members > 1 else ""
            known = cluster.collectives.get(key) if members > 1 else Collective(alpha_s=0, beta_s_per_byte=0)
            if known is not None:
                found[f"{operation}.{scope}"] = known
    return cluster.model_copy(update={"levels": tuple(levels), "collectives": found})


def whole_scope(groups: Groups, scope: str) -> str:
    """What the groups of ``scope`` in each expert-parallel group are called in the whole job."""
    members, apart = meeting(scope, groups.shape)
    return scope_of(members, apart * groups.apart, groups.whole.shape)


# ----------------------------------------------------------------------------------------------------------- a system


@functools.cache
def in_groups(system: type[System]) -> type[System]:
    """``system`` in each of a case's groups."""
    made: Any = ABCMeta(system.__name__, (InGroups, system), {"of_group": system})
    found: type[System] = made
    return found


class InGroups(System):
    """Stands before the class of what runs in a group, ``of_group``. Cases are those of a whole job."""

    of_group: ClassVar[type[System]]

    @classmethod
    def alone(cls) -> type[System]:
        return cls.of_group

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        return next(filter(None, map(cls.of_group.refuse, case.parts)), None)

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        return cls.of_group.build(case.of_rank(job.rank), job.part(case.groups), weights)

    @classmethod
    def place(cls, case: Case, profile: Sequence[Routing]) -> list[Placement] | None:
        """Alike in all groups."""
        groups = _groups(case)
        found = cls.of_group.place(case.parts[0], [routing.gathered(groups.members.T) for routing in profile])
        return None if found is None else [groups.placed([each] * len(groups)) for each in found]

    @classmethod
    def place_gradients(
        cls, layers: Sequence[MoELayer], case: Case, gradient_bytes: Sequence[int], scope: str
    ) -> list[GradientSlices]:
        return cls.of_group.place_gradients(layers, case.parts[0], gradient_bytes, scope)

    @classmethod
    def settle(
        cls, cases: Sequence[Case], gradient_bytes: Sequence[int], scope: str
    ) -> tuple[list[Case], list[GradientSlices]]:
        settled, slices = cls.of_group.settle([case.parts[0] for case in cases], gradient_bytes, scope)
        pairs = zip(cases, settled, strict=True)
        return [dataclasses.replace(case, options=each.options) for case, each in pairs], slices

    @classmethod
    def after_step(cls, layers: Sequence[MoELayer], case: Case, job: Job) -> AfterStep | None:
        return cls.of_group.after_step(layers, case.of_rank(job.rank), job.part(case.groups))

    @classmethod
    def copied_parameters(cls, case: Case) -> int:
        return max(map(cls.of_group.copied_parameters, case.parts))

    @classmethod
    def planned_bytes(cls, case: Case) -> Matrices | None:
        groups, found = _groups(case), list(map(cls.of_group.planned_bytes, case.parts))
        parts = [each for each in found if each is not None]
        if len(parts) < len(found):
            return None
        nothing = np.zeros((groups.size, groups.size))
        names = dict.fromkeys(name for each in parts for name in each)
        return {name: groups.blocks([each.get(name, nothing) for each in parts]) for name in names}

    @classmethod
    def planned_shares(cls, case: Case) -> Array:
        """As if each group had as many rows of an expert."""
        groups = _groups(case)
        return groups.joined(list(map(cls.of_group.planned_shares, case.parts))) / len(groups)

    @classmethod
    def planned_rows(cls, case: Case) -> Array:
        return _groups(case).joined(list(map(cls.of_group.planned_rows, case.parts)), axis=0)

    @classmethod
    def kept(cls, case: Case, probabilities: list[torch.Tensor]) -> list[torch.Tensor] | None:
        found: dict[int, torch.Tensor] = {}
        for ranks, part in zip(_groups(case).members.tolist(), case.parts, strict=True):
            kept = cls.of_group.kept(part, [probabilities[rank] for rank in ranks])
            if kept is None:
                return None
            found |= zip(ranks, kept, strict=True)
        return [found[rank] for rank in range(len(found))]

    @classmethod
    def layout(cls, case: Case) -> Passage | None:
        return together(_groups(case), list(map(cls.of_group.layout, case.parts)))

    @classmethod
    def course(cls, cases: Sequence[Case]) -> Course:
        return GroupedCourse(cls, cases)


def _groups(case: Case) -> Groups:
    assert case.groups is not None
    return case.groups


# ------------------------------------------------------------------------------------------------------ what is priced


def together(groups: Groups, parts: Sequence[Passage | None]) -> Passage | None:
    known = [part for part in parts if part is not None]
    return Together(groups, known) if len(known) == len(parts) else None


class Together(Passage):
    """``parts``: the priced passages of one layer, group by group."""

    def __init__(self, groups: Groups, parts: Sequence[Passage]):
        self.groups, self.parts = groups, parts

    @property
    def of_groups(self) -> Sequence[Passage]:
        return self.parts

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        return self._work([each.work(direction, task, part) for each in self.parts])

    def forward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        after = list(after)
        return self._all(plan, lambda part, own: part.forward(own, prefix=prefix, after=after, gradients=gradients))

    def backward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        after = list(after)
        return self._all(plan, lambda part, own: part.backward(own, prefix=prefix, after=after, gradients=gradients))

    def ahead(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        after = list(after)
        return self._all(plan, lambda part, own: part.ahead(own, prefix, after))

    def ahead_back(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        after = list(after)
        return self._all(plan, lambda part, own: part.ahead_back(own, prefix, after))

    def behind(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        after = list(after)
        return self._all(plan, lambda part, own: part.behind(own, prefix, after))

    def dense(self, direction: Direction) -> Sequence[Dense]:
        every = zip(*(part.dense(direction) for part in self.parts), strict=True)
        return [dataclasses.replace(each[0], work=self._work([of.work for of in each])) for each in every]

    def slices(self) -> tuple[Work | None, Work | None, Work | None]:
        in_moe, beside, after = (
            None if None in each else self._work([of for of in each if of is not None])
            for each in zip(*(part.slices() for part in self.parts), strict=True)
        )
        return in_moe, beside, after

    def _work(self, each: Sequence[Work]) -> Work:
        return Work(merged(self.groups, [work.cost for work in each]))

    def _all(self, plan: Plan, lay: Callable[[Passage, Plan], list[str]]) -> list[str]:
        """Add to ``plan`` what ``lay`` adds to one for each group."""
        plans = []
        for part in self.parts:
            part.turns = self.turns
            plans.append(Plan(plan.lanes))
            last = lay(part, plans[-1])
        if len({tuple((task.name, task.lane, task.after) for task in each.tasks) for each in plans}) > 1:
            remedy = "lays out another step in one expert-parallel group than in another, and this is not priced"
            raise Unplanned(f"layout.expert_parallel: {self.groups.size}: {remedy}; fix its options")
        for tasks in zip(*(each.tasks for each in plans), strict=True):
            first = tasks[0]
            plan.add(
                first.name, first.lane, first.after, merged(self.groups, [t.cost for t in tasks]), None, first.kind
            )
        return last


def merged(groups: Groups, costs: Sequence[Cost | None]) -> Cost | None:
    """Of one task of every group, on the ranks of all; what is the same object in all is of the whole job already."""
    known = [cost for cost in costs if cost is not None]
    if not known or all(cost is known[0] for cost in costs):
        return known[0] if known else None
    first = known[0]
    if {type(cost) for cost in known} != {type(first)}:
        kinds = ", ".join(sorted({type(cost).__name__ for cost in known}))
        raise Unplanned(
            f"layout.expert_parallel: {groups.size}: a task costs {kinds} in groups, and this is not priced"
        )

    def of(name: str, nothing: Any = 0.0) -> Any:
        return _joined(groups, [nothing if cost is None else getattr(cost, name) for cost in costs])

    match first:
        case InTurn():
            longest = max(len(cost.parts) for cost in known)  # type: ignore[attr-defined]
            each = [() if cost is None else cost.parts for cost in costs]  # type: ignore[attr-defined]
            if {len(parts) for parts in each} - {0, longest}:
                raise Unplanned(f"layout.expert_parallel: {groups.size}: a task has more parts in one group")
            parts = (merged(groups, [of[at] if of else None for of in each]) for at in range(longest))
            return InTurn(tuple(part for part in parts if part is not None))
        case OnLinks() if meeting(first.scope, groups.shape)[0] == 1:
            return None  # a rank alone sends nothing
        case Transfer():
            nothing = np.zeros((groups.size, groups.size))
            matrix = groups.blocks([nothing if cost is None else cost.matrix for cost in costs])  # type: ignore[attr-defined]
            messages = functools.reduce(np.maximum, [cost.messages for cost in known])  # type: ignore[attr-defined]
            return Transfer(first.operation, whole_scope(groups, first.scope), matrix, messages)
        case Even():
            messages = functools.reduce(np.maximum, [cost.messages for cost in known])  # type: ignore[attr-defined]
            return Even(first.operation, whole_scope(groups, first.scope), of("num_bytes"), messages)
        case Hold():
            return Hold(of("seconds"), of("host", 1.0))
        case Compute():
            experts = None
            if first.experts is not None:
                rows = [None if cost is None else cost.experts.rows for cost in costs]  # type: ignore[attr-defined]
                experts = Experts(_rows(groups, rows), first.experts.products, first.experts.element_bytes)
            return Compute(of("macs"), of("launches", 1.0), of("read_bytes"), experts)
    raise AssertionError(first)


def _joined(groups: Groups, values: Sequence[Any]) -> Any:
    """Amounts [.., size] of every group, or one for all of its ranks, -> [.., W], or one for all."""
    arrays = [np.asarray(value) for value in values]
    if all(each.ndim == 0 and each == arrays[0] for each in arrays):
        return values[0]
    whole = [each if each.ndim and each.shape[-1] == groups.size else each[..., None] for each in arrays]
    shape = np.broadcast_shapes(*(each.shape[:-1] for each in whole))
    return groups.joined([np.broadcast_to(each, (*shape, groups.size)) for each in whole])


def _rows(groups: Groups, rows: Sequence[Array | None]) -> Array:
    """Rows [.., size, experts] of every group -> [.., W, experts], as many as the largest has."""
    shapes = [each.shape for each in rows if each is not None]
    lead, most = np.broadcast_shapes(*(shape[:-2] for shape in shapes)), max(shape[-1] for shape in shapes)
    whole = []
    for each in rows:
        found = np.zeros((*lead, groups.size, most))
        if each is not None:
            found[..., : each.shape[-1]] = each
        whole.append(found)
    return groups.joined(whole, axis=-2)


# ----------------------------------------------------------------------------------------------------------- a training


class GroupedCourse(Course):
    """Where experts go in a training is decided by what all groups have seen, so that replicas go alike; which copies
    there are, by each for itself."""

    def __init__(self, system: type[InGroups], cases: Sequence[Case]):
        super().__init__(system, cases)
        self.groups, self.trains = _groups(cases[0]), False
        self.parts = [system.of_group.course(part) for part in self._apart(cases)]
        first = self.parts[0]
        self.moves, self.learns, self.notes = first.moves, any(part.learns for part in self.parts), first.notes

    def _apart(self, cases: Sequence[Case]) -> list[list[Case]]:
        """Of each group the cases of all layers."""
        return [list(of_layers) for of_layers in zip(*(case.parts for case in cases), strict=True)]

    def train(self) -> None:
        self.trains = True
        for part in self.parts:
            part.train()

    def cases(self, cases: Sequence[Case]) -> list[Case]:
        now = [part.cases(of_group) for part, of_group in zip(self.parts, self._apart(cases), strict=True)]
        placed = [self.groups.placed([case.placement for case in layer]) for layer in zip(*now, strict=True)]
        return [case.placed(at) for case, at in zip(cases, placed, strict=True)]

    def passages(self, cases: Sequence[Case]) -> list[Passage | None]:
        every = [part.passages(of_group) for part, of_group in zip(self.parts, self._apart(cases), strict=True)]
        return [together(self.groups, layer) for layer in zip(*every, strict=True)]

    def watches(self, step: int) -> bool:
        return any(part.watches(step) for part in self.parts)

    def saw(self, step: int, routing: Sequence[Routing], timeline: Timeline | None = None) -> Cost | None:
        columns, alike = self.groups.members.T, self.trains and self.moves
        costs = []
        for ranks, part in zip(self.groups, self.parts, strict=True):
            costs.append(
                part.saw(step, [each.gathered(columns if alike else ranks[:, None]) for each in routing], timeline)
            )
        return merged(self.groups, costs)


__all__ = ["GroupedCourse", "InGroups", "Together", "cluster_of", "in_groups", "merged", "part_of", "whole_scope"]
