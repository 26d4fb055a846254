"""What a system does from step to step of a training, in numpy: where experts are, which copies there are.

A simulated training goes through steps as an executed one does. Before a step a system knows what earlier ones have
shown; behind it, it may move experts, which costs time of its own. The decisions are those of the executed code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.plan.cost import Cost
from harness.plan.passage import Passage
from harness.routing.types import Routing
from harness.system import Case, System

Array = np.ndarray


class Course:
    """Of one training. By default nothing changes from step to step.

    ``moves``: whether a step ends with the task ``after-step``. A subclass overrides ``passages`` for what a step's
    layers look like, and ``saw`` for what is learned from it."""

    moves: bool = False

    def __init__(self, system: type[System], cases: Sequence[Case]):
        """``cases``: of the first step, first layer first."""
        self.system, self.first = system, list(cases)

    def cases(self, cases: Sequence[Case]) -> list[Case]:
        """Those of the coming step, with experts where they are by now."""
        return list(cases)

    def passages(self, cases: Sequence[Case]) -> list[Passage | None]:
        """Layers of the coming step, which has the routing of ``cases``."""
        return [self.system.layout(case) for case in self.cases(cases)]

    def saw(self, step: int, counts: Sequence[Array], routing: Sequence[Routing] | None = None) -> Cost | None:
        """Behind ``step``: of every layer rows of each rank for each expert, int [W, E]; ``routing`` where it is at
        hand, of all tokens or of a sample. What is moved then; None: nothing."""
        return None


__all__ = ["Course"]
