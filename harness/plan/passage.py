"""A batch's way through one layer, forward and backward, as tasks of a step's plan.

A (generalized) layer is a dense part, the attention, and an MoE part. Forward goes through one and then the other,
backward the other way round, with slices of the gradient all-reduce where a schedule puts them. The same functions lay
out what is executed and what is only priced.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from harness.comm.handover import Handover
from harness.comm.journey import Direction
from harness.plan.graph import INTER, Plan, Work
from harness.system import MoELayer


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """One task of the dense part (attention, the collectives of model parallelism)."""

    name: str
    lane: str
    work: Work


class MoEPart(Protocol):
    """Adds the tasks of an MoE part in one direction; returns the last ones. ``gradients``: a slice of the gradient
    all-reduce that goes among them."""

    def __call__(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]: ...


#: adds tasks that the dense part does not wait for, on lanes that it leaves free: plan, prefix, what they wait for
Beside = Callable[[Plan, str, Iterable[str]], list[str]]


def forward_layer(
    plan: Plan,
    moe: MoEPart,
    dense: Sequence[Dense],
    *,
    ahead: Beside | None = None,
    prefix: str = "",
    after: Iterable[str] = (),
) -> list[str]:
    """Add a layer's forward, with ``ahead`` beside its dense part; returns its last tasks."""
    prefix = f"{prefix}forward."
    if ahead is not None:
        ahead(plan, prefix, ())
    return moe(plan, prefix=prefix, after=_dense(plan, dense, prefix, after))


def backward_layer(
    plan: Plan,
    moe: MoEPart,
    dense: Sequence[Dense],
    *,
    in_moe: Work | None = None,
    beside_dense: Work | None = None,
    after_layer: Work | None = None,
    beside: Callable[[], object] | None = None,
    prefix: str = "",
    after: Iterable[str] = (),
) -> list[str]:
    """Add a layer's backward, with the slices of the gradient all-reduce that run in its two parts and after it;
    ``beside``: called to add what else runs beside its dense part. Returns the tasks that the next layer waits for."""
    prefix = f"{prefix}backward."
    home = moe(plan, prefix=prefix, after=after, gradients=in_moe)
    if beside is not None:
        beside()
    if beside_dense is not None:
        plan.add(f"{prefix}gradients-dense", INTER, home, beside_dense.cost, beside_dense.run, "gradients")
    last = _dense(plan, dense, prefix, home)
    if after_layer is not None:
        last = [plan.add(f"{prefix}gradients-after", INTER, last, after_layer.cost, after_layer.run, "gradients")]
    return last


def _dense(plan: Plan, dense: Sequence[Dense], prefix: str, after: Iterable[str]) -> list[str]:
    last = list(after)
    for part in dense:
        last = [plan.add(f"{prefix}{part.name}", part.lane, last, part.work.cost, part.work.run)]
    return last


class Passage(abc.ABC):
    """How the tasks of one MoE layer stand in the plan of one step. ``forward`` and ``backward`` are ``MoEPart``s.

    A subclass of ``harness.plan.layouts`` says which tasks there are, on which lanes, and what they wait for; ``work``,
    of what they do: that of a ``Way`` runs, that of ``harness.plan.priced`` costs."""

    turns: bool = False  # the last layer of a step: its backward follows its forward at once

    @property
    def of_groups(self) -> Sequence[Passage]:
        """Of each expert-parallel group; of a priced layer."""
        return [self]

    @abc.abstractmethod
    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        """Of the task called so, or of its ``part``: a hop and a chunk, for instance."""

    @abc.abstractmethod
    def forward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]: ...

    @abc.abstractmethod
    def backward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]: ...

    def ahead(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        """Add what forward needs and may run beside the dense part before it: fetching parameters, for instance.
        Called before ``forward``; the tasks of ``forward`` wait for these themselves."""
        return []

    def ahead_back(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        """The same for backward: beside the dense part of the layer above. Called before ``backward``."""
        return []

    def behind(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        """Add what backward leaves to be done, beside the dense part behind it: summing gradients, for instance.
        Called after ``backward``; returns what must have ended before the optimizer."""
        return []

    def dense(self, direction: Direction) -> Sequence[Dense]:
        """What stands for the dense part where the layer runs alone."""
        return ()

    def slices(self) -> tuple[Work | None, Work | None, Work | None]:
        """Where the layer runs alone, slices of a gradient all-reduce in its MoE part, beside its dense part, and
        after it."""
        return None, None, None


class Way(Handover, Passage):
    """One batch's way through one MoE layer: a passage that runs; for one step. A task ``t`` of forward is the method
    ``forward_t``, its part (i, j) ``forward_t(i, j)``.

    ``x`` [T, M] is there when the first task of ``forward`` runs, ``y`` [T, M] after its last; ``dy`` and ``dx``
    likewise for ``backward``. ``y`` still has its graph, and what it is handed to cuts it off (``segment.cut``).
    """

    x: torch.Tensor
    y: torch.Tensor
    dy: torch.Tensor
    dx: torch.Tensor | None

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        run = getattr(self, f"{direction}_{task}")
        return Work(run=functools.partial(run, *part) if part else run)


def plan_alone(way: Passage, direction: Direction) -> Plan:
    """One direction of a layer that runs alone."""
    plan = Plan()
    if direction == "forward":
        forward_layer(plan, way.forward, way.dense(direction), ahead=way.ahead)
        return plan
    way.ahead_back(plan, "backward.")
    in_moe, beside_dense, after_layer = way.slices()
    backward_layer(
        plan,
        way.backward,
        way.dense(direction),
        in_moe=in_moe,
        beside_dense=beside_dense,
        after_layer=after_layer,
        beside=lambda: way.behind(plan, "backward."),
    )
    return plan


def passage(layer: MoELayer) -> Way:
    """The next batch's way through ``layer``: in tasks if it has any (``PlannedLayer``), else in one."""
    from harness.plan.planned import Opaque

    made = getattr(layer, "passage", None)
    return Opaque(layer) if made is None else made()
