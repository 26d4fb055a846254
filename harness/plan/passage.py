"""A batch's way through one layer, forward and backward, as tasks of a step's plan.

A (generalized) layer is a dense part, the attention, and an MoE part. Forward goes through one and then the other,
backward the other way round, with slices of the gradient all-reduce where a schedule puts them. The same functions lay
out what is executed and what is only priced.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from harness.comm.handover import Handover, pop
from harness.plan.graph import COMPUTE, INTER, Plan, Work
from harness.plan.segment import Segment
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


class Passage(Handover, abc.ABC):
    """One batch's way through one MoE layer; for one step. ``forward`` and ``backward`` are ``MoEPart``s.

    ``x`` [T, M] is there when the first task of ``forward`` runs, ``y`` [T, M] after its last; ``dy`` and ``dx``
    likewise for ``backward``. ``y`` still has its graph, and what it is handed to cuts it off (``segment.cut``).
    """

    x: torch.Tensor
    y: torch.Tensor
    dy: torch.Tensor
    dx: torch.Tensor | None
    turns: bool = False  # the last layer of a step: its backward follows its forward at once

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


class Opaque(Passage):
    """A layer that is one task a direction: a real package, whose communication is its own affair."""

    def __init__(self, layer: MoELayer):
        self.layer, self.segment = layer, Segment()

    def forward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        def run() -> None:
            self.y = self.segment.forward(self.layer, pop(self, "x"))

        return [plan.add(f"{prefix}moe", COMPUTE, after, run=run)]

    def backward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        def run() -> None:
            (self.dx,) = self.segment.backward(pop(self, "dy"))

        last = [plan.add(f"{prefix}moe", COMPUTE, after, run=run)]
        if gradients is not None:  # never beside collectives that nobody here knows of
            last = [plan.add(f"{prefix}gradients", INTER, last, gradients.cost, gradients.run)]
        return last


def passage(layer: MoELayer) -> Passage:
    """The next batch's way through ``layer``: in tasks if it has any (``PlannedLayer``), else in one."""
    made = getattr(layer, "passage", None)
    return Opaque(layer) if made is None else made()
