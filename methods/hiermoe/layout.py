"""HierD-AlltoAll as a simulation has it: each part of the exchange with the stages that it goes through.

Rows go through a pipeline of chunks. The first stage's metadata goes before them; that of the others while the first
stage's rows are on the wire, so that a row cannot enter the second stage before it. On the way home gradients of gate
weights follow the metadata's hops; the first of these is done while the experts compute.

Interpretation: the one number a chunk that ranks agree on before they pad counts as one more message of its stage.
"""

from __future__ import annotations

import numpy as np

from harness.plan.cost import Cost, InTurn, Staged, Transfer
from harness.plan.priced import PricedNative
from harness.system import Case
from methods.hiermoe.counts import Array, Stage
from methods.hiermoe.traffic import AWAY, HierTravel


class PricedHier(PricedNative):
    """``travel``: of the case's tokens; ``rows`` [W, E]: that each rank computes of each expert."""

    def __init__(self, case: Case, travel: HierTravel, rows: Array):
        super().__init__(case, {}, rows)
        self.travel = travel

    def sent(self, part: str) -> Cost | None:
        travel, (first, *others) = self.travel, self.travel.stages
        match part:
            case "metadata":
                told = [Transfer("a2a", "flat", travel.choice_bytes())] if travel.chosen else []
                return InTurn((*told, self._metadata(first)))
            case "metadata_grad":
                if not travel.wire.weights_learn:
                    return None
                return InTurn(tuple(self._transfer(part, stage) for stage in reversed(travel.stages[:-1])))
            case "dispatch":
                known = tuple(self._metadata(stage) for stage in others)
                return Staged(tuple(self._way(part)), travel.wire.num_chunks, known)
        return Staged(tuple(self._way(part)), travel.wire.num_chunks)

    def _way(self, part: str) -> list[Transfer]:
        found = [self._transfer(part, stage) for stage in self.travel.stages]
        return found if part in AWAY else found[::-1]

    def _metadata(self, stage: Stage) -> Transfer:
        """A table of sizes, then the columns."""
        return self._transfer("metadata", stage, 3 if self.travel.wire.padded else 2)

    def _transfer(self, part: str, stage: Stage, messages: int = 1) -> Transfer:
        scope = stage.key(self.case.topology.num_levels).partition(".")[2]
        matrix = self.travel.stage_bytes(part, stage)
        np.fill_diagonal(matrix, 0)
        return Transfer("a2a", scope, matrix, messages)


__all__ = ["PricedHier"]
