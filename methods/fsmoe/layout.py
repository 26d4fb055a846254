"""Which tasks make up FSMoE's layer: once for what runs (``methods.fsmoe.layer``) and for what is priced here."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.plan.cost import Compute, Cost, Even, Hold, InTurn, Timed
from harness.plan.graph import COMPUTE, Plan, Work
from harness.plan.layouts import PlannedTasks
from harness.plan.passage import Dense, Direction
from harness.plan.priced import gate_work, mix_work
from harness.specs import DTYPE_BYTES
from harness.system import Case
from methods.fsmoe.cut import Cut, LayerSizes
from methods.fsmoe.schedule import Priced, Walk, moe
from methods.fsmoe.step import Policy, reduction

Slices = tuple[Work | None, Work | None, Work | None]


class FSMoETasks(PlannedTasks):
    """``overlap``: the links between and inside nodes work side by side."""

    walk: Walk
    walk_back: Walk
    overlap: bool

    def there_and_back(self, plan: Plan, **where: Any) -> list[str]:
        return moe(plan, self.walk, overlap=self.overlap, **where)

    def back_and_there(self, plan: Plan, **where: Any) -> list[str]:
        return moe(plan, self.walk_back, overlap=self.overlap, **where)


class PricedFSMoE(FSMoETasks):
    def __init__(self, case: Case, policy: Policy, sizes: LayerSizes, cut: Cut):
        self.case, self.cut, self.sizes, self.overlap = case, cut, sizes, policy.overlap
        self.walk = Priced(self.sizes.forward, cut.degree_forward)
        self.walk_back = Priced(self.sizes.backward, cut.degree_backward)

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        if task == "restore":
            return Work(mix_work(self.case))
        gate = gate_work(self.case, direction)
        if direction == "backward":
            return Work(gate)
        row_bytes = self.case.model.hidden * DTYPE_BYTES[self.case.dtype]
        tokens = np.asarray(self.case.routing.tokens, dtype=np.float64)
        order = Compute(np.zeros(len(tokens)), 1, row_bytes * tokens + self.sizes.forward.slot_bytes)
        return Work(InTurn(tuple(cost for cost in (gate, self._agreement(), order) if cost is not None)))

    def dense(self, direction: Direction) -> list[Dense]:
        seconds = self.sizes.dense_s[direction == "backward"]
        return [Dense("attention", COMPUTE, Work(Hold(seconds)))] if seconds else []

    def slices(self) -> Slices:
        found = [
            reduction(num_bytes, messages) if num_bytes else None
            for num_bytes, messages in zip(self.cut.reduced_bytes, self.cut.messages, strict=True)
        ]
        return found[0], found[1], found[2]

    def _agreement(self) -> Cost:
        """All ranks meet to agree on a capacity, 8 bytes. What that takes is left out where a cluster states costs, but
        none of this."""
        known = {} if self.case.cluster is None else self.case.cluster.collectives
        return Timed("ar", "flat", 0.0) if known and "ar.flat" not in known else Even("ar", "flat", 8.0)
