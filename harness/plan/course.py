"""What a system does from step to step of a training, in numpy: where experts are, which copies there are.

A simulated training goes through steps as an executed one does. Before a step a system knows what earlier ones have
shown; behind it, it may move experts, which costs time of its own. The decisions are those of the executed code.

    Course            nothing changes
    PlacedCourse      every layer has a placement, which may change between steps
    FollowedCourse    by the load of some steps (``harness.plan.following``)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.memory import OPTIMIZER_STATES, expert_bytes
from harness.placement import Placement
from harness.plan.cost import Cost, Even, InTurn, Transfer
from harness.plan.following import Following
from harness.plan.graph import Timeline
from harness.plan.passage import Passage
from harness.routing.types import Routing
from harness.system import Case, System


class Course:
    """Of one training. By default nothing changes from step to step.

    ``moves``: whether a step ends with the task ``after-step``; ``learns``: whether ``saw`` has to be told of steps. A
    subclass overrides ``passages`` for what a step's layers look like, and ``saw`` for what is learned from it."""

    moves: bool = False
    learns: bool = False
    notes: tuple[str, ...] = ()  # what its times rest on beside the machine, in words for a row

    def __init__(self, system: type[System], cases: Sequence[Case]):
        """``cases``: of the first step, first layer first."""
        self.system, self.first = system, list(cases)

    def train(self) -> None:
        """A training begins: what is known of a layer that runs alone is forgotten."""

    def cases(self, cases: Sequence[Case]) -> list[Case]:
        """Those of the coming step, with experts where they are by now."""
        return list(cases)

    def passages(self, cases: Sequence[Case]) -> list[Passage | None]:
        """Layers of the coming step, which has the routing of ``cases``."""
        return [self.system.layout(case) for case in self.cases(cases)]

    def watches(self, step: int) -> bool:
        """Whether it has to know how long the tasks of ``step`` take."""
        return False

    def saw(self, step: int, routing: Sequence[Routing], timeline: Timeline | None = None) -> Cost | None:
        """Behind ``step``: the ``routing`` that its layers had; ``timeline`` [num_tasks, W] of the step up to here, if
        it is known. What is done then; None: nothing."""
        return None


class PlacedCourse(Course):
    """``placements``: of every layer by now."""

    moves = learns = True

    def __init__(self, system: type[System], cases: Sequence[Case], placements: Sequence[Placement] | None = None):
        super().__init__(system, cases)
        self.placements = [case.placement for case in cases] if placements is None else list(placements)

    def cases(self, cases: Sequence[Case]) -> list[Case]:
        return [case.placed(at) for case, at in zip(cases, self.placements, strict=True)]

    def move(self, after: Mapping[int, Placement], with_state: bool = True) -> Transfer | None:
        """Experts of some layers go where ``after`` says, ``with_state`` of the optimizer or without, all at once."""
        from harness.plan.moving import Move  # torch only where experts move

        if not after:
            return None
        case = self.first[0]
        states = OPTIMIZER_STATES[case.dtype] if with_state else 0
        each = float(expert_bytes(case.model, case.dtype) * (1 + states))
        matrix = sum(Move((), self.placements[layer], to).matrix(each) for layer, to in after.items())
        for layer, to in after.items():
            self.placements[layer] = to
        return Transfer("a2a", "flat", np.asarray(matrix))


class FollowedCourse(PlacedCourse):
    def __init__(
        self,
        system: type[System],
        cases: Sequence[Case],
        following: Following,
        placements: Sequence[Placement] | None = None,
    ):
        super().__init__(system, cases, placements)
        self.following = following
        self.load = np.zeros((len(cases), cases[0].model.num_experts), dtype=np.int64)

    def saw(self, step: int, routing: Sequence[Routing], timeline: Timeline | None = None) -> Cost | None:
        if self.following.counts(step):
            self.load += np.stack([each.counts.sum(0) for each in routing])
        if not self.following.due(step):
            return None
        after = self.following.decide(self.load, self.placements)
        told = Even("ar", "flat", self.load.nbytes)
        self.load = np.zeros_like(self.load)
        moved = self.move(after, self.following.optimizer_state)
        return InTurn((told,) if moved is None else (told, moved))


__all__ = ["Course", "FollowedCourse", "PlacedCourse"]
