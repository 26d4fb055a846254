"""Layers whose experts have whole copies: parameters, gradient and optimizer state on every rank that holds one.

Where the copies are is the layer's placement (a row of ``Placement.hosts`` with more than one rank) and stays until
a ``Rearranger`` changes it between steps. Tokens go to the nearest copy. Before the optimizer the copies' gradients are
summed at the expert's first holder and sent back to all, beside the dense part behind the layer's backward (tasks
``reduce.*`` and ``spread.*`` on the link lanes): an all-reduce of each expert over its holders. So copies stay equal,
bit by bit. What differs between systems is where they put copies:

    class Mine(CopiedSystem):
        def planner(cls, case): return lambda load, placement: ...  # load [E] of some steps -> Placement
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from harness.comm.job import Job
from harness.comm.replicas import replica_shares
from harness.comm.sparse import Chunks, Transfer, plan_sparse
from harness.layer.experts import Experts
from harness.layer.gates import Gated
from harness.layer.weights import Weights
from harness.memory import OPTIMIZER_STATES, expert_bytes
from harness.options import whole
from harness.placement import Placement
from harness.plan.course import FollowedCourse
from harness.plan.following import Following, Planner
from harness.plan.graph import Work
from harness.plan.layouts import CopiedTasks, StageWork
from harness.plan.native import NativeLayer, NativePassage, NativeSystem
from harness.plan.passage import Passage
from harness.plan.priced import PricedCopied
from harness.plan.rearrange import Rearranger
from harness.system import AfterStep, Case, MoELayer, System


class CopiedLayer(NativeLayer):
    """``placement``: who holds what."""

    def __init__(self, system: type[CopiedSystem], case: Case, job: Job, weights: Weights):
        super().__init__(system, case.placed(system.first(case)), job, weights)

    def passage(self, gated: Gated | None = None) -> CopiedPassage:
        return CopiedPassage(self, gated)


class CopiedPassage(CopiedTasks, NativePassage):
    layer: CopiedLayer

    def __init__(self, layer: CopiedLayer, gated: Gated | None):
        super().__init__(layer, gated)
        self.topology, placement = layer.job.topology, layer.placement
        real = isinstance(layer.experts, Experts)
        self.sparse = plan_sparse(placement.owner, placement.hosts, self.topology) if real else None

    def transfer(self, what: str, num_tasks: int) -> StageWork:
        running: list[Transfer] = []

        def run(stages: tuple[int, ...]) -> None:
            if not running:
                kind: Literal["gather", "reduce"] = "reduce" if what == "reduce" else "gather"
                assert self.sparse is not None
                running.append(Transfer(self.layer.job, self.sparse, [self._gradients()], kind))
            running[0].run(*stages)

        return lambda stages, near: Work(run=partial(run, stages))

    def _gradients(self) -> Chunks:
        experts = self.layer.experts
        own = [getattr(experts, name) for name in experts.names]
        for parameter in own:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return Chunks(experts.local, [parameter.grad for parameter in own])


class CopiedSystem(NativeSystem):
    """A native system that differs by its planner alone. A layer begins with what the planner makes of the case's
    routing, as if training had been going on; ``rearrange_every`` and ``slots`` are options of all of them."""

    every: ClassVar[int]
    copies = moves_alike = True
    variants: ClassVar[dict[str, dict[str, bool | int | float | str]]] = {"rearranged": {"rearrange_every": 3}}
    options: ClassVar[dict[str, str]] = {
        "rearrange_every": "training steps between rearrangements (default 25)",
        "slots": "experts and copies that a rank has memory for (default: twice its experts)",
    }

    @classmethod
    @abc.abstractmethod
    def planner(cls, case: Case) -> Planner:
        """For every layer of a case; all ranks must decide alike."""

    @classmethod
    def clashes(cls, parts: Mapping[str, Any]) -> str | None:
        """With other parts of a recipe, by slot."""
        if issubclass(parts["placement"], System):
            return "it says itself where experts and their copies are; leave the placement out"
        return None

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        most, slots = int(case.placement.hosts.sum(0).max()), num_slots(case)
        return f"{slots} slots are fewer than the {most} experts of a rank" if slots < most else super().refuse(case)

    @classmethod
    def first(cls, case: Case) -> Placement:
        """Of a layer before any training."""
        if case.identity_experts:
            return case.placement
        return cls.planner(case)(case.load, case.placement)

    @classmethod
    def hosts(cls, case: Case) -> np.ndarray:
        return cls.first(case).hosts

    @classmethod
    def layout(cls, case: Case) -> Passage | None:
        return cls.laid(case.placed(cls.first(case)))

    @classmethod
    def laid(cls, case: Case) -> Passage | None:
        """With copies where the case's placement has them."""
        routing = cls.planned_routing(case)
        return None if routing is None else PricedCopied(cls, dataclasses.replace(case, routing=routing))

    @classmethod
    def course(cls, cases: Sequence[Case]) -> CopiedCourse:
        return CopiedCourse(cls, cases, cls.following(cases[0]), [cls.first(case) for case in cases])

    @classmethod
    def following(cls, case: Case) -> Following:
        return Following(cls.planner(case), whole(case, "rearrange_every", cls.every, 10**9))

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> CopiedLayer:
        return CopiedLayer(cls, case, job, weights)

    @classmethod
    def after_step(cls, layers: Sequence[MoELayer], case: Case, job: Job) -> AfterStep:
        return Rearranger(job, layers, cls.following(case))  # type: ignore[arg-type]

    @classmethod
    def copied_parameters(cls, case: Case) -> int:
        own = case.model.num_experts // case.topology.num_ranks
        each = 2 + OPTIMIZER_STATES[case.dtype]  # with a gradient
        return each * case.model.num_moe_layers * (num_slots(case) - own)

    @classmethod
    def planned_shares(cls, case: Case) -> np.ndarray:
        return replica_shares(case.routing, cls.first(case).hosts, case.topology)

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        routing = cls.planned_routing(case)
        if routing is None:
            return None
        placement = cls.first(case)
        parts = cls.fares(case.placed(placement), routing, placement.hosts).parts()
        if not case.identity_experts:
            sent = plan_sparse(placement.owner, placement.hosts, case.topology)
            spread = sent.bytes(expert_bytes(case.model, case.dtype))
            parts["reduce"] = spread + spread.T
        return parts


class CopiedCourse(FollowedCourse):
    system: type[CopiedSystem]

    def passages(self, cases: Sequence[Case]) -> list[Passage | None]:
        return [self.system.laid(case) for case in self.cases(cases)]


def num_slots(case: Case) -> int:
    """Of a rank."""
    most = case.model.num_experts
    return whole(case, "slots", min(most, 2 * int(case.placement.hosts.sum(0).max())), most)
