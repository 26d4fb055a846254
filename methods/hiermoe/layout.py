"""HierD-AlltoAll as a simulation has it: each part of the exchange with the stages that it goes through.

Rows go through a pipeline of chunks. The first stage's metadata goes before them; that of the others while the first
stage's rows are on the wire, so that a row cannot enter the second stage before it. On the way home gradients of gate
weights follow the metadata's hops; the first of these is done while the experts compute.

Interpretation: the one number a chunk that ranks agree on before they pad counts as one more message of its stage.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from harness.plan.cost import InTurn, Staged, Transfer
from harness.plan.graph import Work
from harness.plan.passage import Direction
from harness.plan.priced import PricedNative
from harness.system import Case
from methods.hiermoe.counts import Array, Stage
from methods.hiermoe.traffic import AWAY, HierTravel


class PricedHier(PricedNative):
    """``travel``: of the case's tokens; ``rows`` [W, E]: that each rank computes of each expert."""

    def __init__(self, case: Case, travel: HierTravel, rows: Array):
        super().__init__(case, {}, rows)
        self.travel = travel

    def work(self, direction: Direction, task: str, part: int | None = None) -> Work:
        first, *others = self.travel.stages
        match (direction, task):
            case ("forward", "metadata"):
                told = [Transfer("a2a", "flat", self.travel.choice_bytes())] if self.travel.chosen else []
                return Work(InTurn((*told, self._metadata(first))))
            case ("forward", "dispatch"):
                known = tuple(map(self._metadata, others))
                return Work(dataclasses.replace(self.sent("dispatch"), ahead=known))
            case ("backward", "metadata") if not self.travel.wire.weights_learn:
                return Work()
            case ("backward", "metadata"):
                return Work(InTurn(tuple(self._transfer("metadata_grad", stage) for stage in [first, *others][-2::-1])))
        return super().work(direction, task, part)

    def sent(self, part: str) -> Staged:
        """Of rows: ``dispatch``, ``combine`` and their gradients."""
        found = [self._transfer(part, stage) for stage in self.travel.stages]
        return Staged(tuple(found if part in AWAY else found[::-1]), self.travel.wire.num_chunks)

    def _metadata(self, stage: Stage) -> Transfer:
        """A table of sizes, then the columns."""
        return self._transfer("metadata", stage, 3 if self.travel.wire.padded else 2)

    def _transfer(self, part: str, stage: Stage, messages: int = 1) -> Transfer:
        scope = stage.key(self.case.topology.num_levels).partition(".")[2]
        matrix = self.travel.stage_bytes(part, stage)
        np.fill_diagonal(matrix, 0)
        return Transfer("a2a", scope, matrix, messages)


__all__ = ["PricedHier"]
