"""Placings: bases of native systems that say where experts go, beside whatever state the experts are in.

    class Mine(Placing):  # moves experts between steps of training
        def mover(cls, layers, case, job): ...  # what runs behind every step
        def moves(cls, cases): ...  # its priced twin

    served("greedy", "...")  # puts them somewhere when a model is served, by a planner of ``moebench place``

A state that would move experts itself leaves that (``NativeSystem.still``); what else it does between steps goes on,
before the placing acts.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from harness.comm.job import Job
from harness.placement import Placement
from harness.plan.cost import Cost, InTurn
from harness.plan.course import Course, PlacedCourse
from harness.plan.graph import Timeline
from harness.plan.native import NativeLayer
from harness.plan.passage import Passage
from harness.plan.slots import Options
from harness.routing.types import Routing
from harness.system import AfterStep, Case, MoELayer, System


class Placing(System):
    """A base that stands before that of the state. ``slot_options``: its own; ``variant``: those with which experts
    move within a few steps. ``title`` and ``source``: in recipes."""

    moves_alike = True
    slot_options: ClassVar[Options] = {}
    variant: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    @abc.abstractmethod
    def mover(cls, layers: Sequence[NativeLayer], case: Case, job: Job) -> AfterStep:
        """``layers``: first layer first."""

    @classmethod
    @abc.abstractmethod
    def moves(cls, cases: Sequence[Case]) -> PlacedCourse: ...

    @classmethod
    def after_step(cls, layers: Sequence[MoELayer], case: Case, job: Job) -> AfterStep:
        own = super().after_step(layers, _still(cls, case), job)
        moving = cls.mover(layers, case, job)  # type: ignore[arg-type]
        return moving if own is None else InOrder(own, moving)

    @classmethod
    def course(cls, cases: Sequence[Case]) -> Course:
        own, moving = super().course([_still(cls, case) for case in cases]), cls.moves(cases)
        return JoinedCourse(own, moving) if isinstance(own, PlacedCourse) else moving


def _still(system: Any, case: Case) -> Case:
    """For a state that is to leave experts where they are."""
    still = getattr(system, "still", {})
    return dataclasses.replace(case, options={**case.options, **still}) if still else case


class InOrder(AfterStep):
    """What several do behind a step, one after another."""

    def __init__(self, *parts: AfterStep):
        self.parts = parts

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for part in self.parts:
            part(optimizer, step)

    def state(self) -> dict[str, Any]:
        return {"parts": [part.state() for part in self.parts]}

    def restore(self, state: dict[str, Any]) -> None:
        for part, known in zip(self.parts, state["parts"], strict=True):
            part.restore(known)


class JoinedCourse(Course):
    """``own``: of the state, which lays out the steps; ``moving``: says where experts go. They share placements."""

    moves = learns = True

    def __init__(self, own: PlacedCourse, moving: PlacedCourse):
        super().__init__(own.system, own.first)
        self.own, self.moving = own, moving
        moving.placements = own.placements
        self.notes = (*own.notes, *moving.notes)

    @property
    def placements(self) -> list[Placement]:
        return self.own.placements

    def train(self) -> None:
        self.own.train()
        self.moving.train()

    def cases(self, cases: Sequence[Case]) -> list[Case]:
        return self.own.cases(cases)

    def passages(self, cases: Sequence[Case]) -> list[Passage | None]:
        return self.own.passages(cases)

    def watches(self, step: int) -> bool:
        return self.own.watches(step) or self.moving.watches(step)

    def saw(self, step: int, routing: Sequence[Routing], timeline: Timeline | None = None) -> Cost | None:
        parts: list[Cost] = []
        for course in (self.own, self.moving):
            cost = course.saw(step, routing, timeline)
            parts += cost.parts if isinstance(cost, InTurn) else [cost] if cost is not None else []
        return InTurn(tuple(parts)) if parts else None


# ------------------------------------------------------------------------------------------------------------- served


class Served(System):
    """Experts in index order, but when a model is served where a planner puts them: as many on a rank as it likes."""

    places = True
    method: ClassVar[str]
    slot_options: ClassVar[Options] = {}

    @classmethod
    def place(cls, case: Case, profile: Sequence[Routing]) -> list[Placement]:
        from harness.placing import planned

        return planned(case, profile, cls.method)


def served(method: str, title: str) -> type[Served]:
    """By the planner of ``moebench place`` called ``method``."""
    members = {"method": method, "title": f"in serving: {title}", "source": "a planner of moebench place"}
    return type(method, (Served,), {**members, "__module__": __name__})


__all__ = ["InOrder", "JoinedCourse", "Placing", "Served", "served"]
