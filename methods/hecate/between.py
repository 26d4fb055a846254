"""What is decided between training steps, in numpy: the overlap degree from what the attention took, and re-sharding.

The same for what runs (``methods.hecate.training``) and for what is priced (``Reshards``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.memory import expert_bytes
from harness.placement import Placement
from harness.plan.cost import Cost, Even, InTurn
from harness.plan.graph import Timeline
from harness.plan.replicated import ReplicatedCourse, ReplicatedSystem
from harness.routing.types import Routing
from harness.system import Case
from methods.hecate.policy import Hecate, Options
from methods.hecate.shard import shard

PROFILED_STEP = 1  # of this process; the first one has everything cold


class Between:
    """``policies``: of the layers, first layer first; they know nothing yet."""

    def __init__(self, policies: Sequence[Hecate], case: Case, options: Options):
        self.policies, self.options, self.topology = policies, options, case.topology
        self.expert_bytes = expert_bytes(case.model, case.dtype)
        outermost = case.cluster.levels[0] if case.cluster is not None else None
        self.bandwidth = outermost.unit_bytes_per_s if outermost is not None else None
        self.calls = 0
        self.profiled = False
        for policy in policies:
            policy.forget()

    @property
    def profiles(self) -> bool:
        """Whether the overlap degree is still to be found."""
        return self.options.t is None and bool(self.bandwidth) and not self.profiled

    def passes(self) -> bool:
        """Behind every step: whether the overlap degree is found now, by the step before."""
        self.calls += 1
        return self.calls == PROFILED_STEP + 2 and self.profiles

    def overlap(self, attention_s: float) -> None:
        """t = T_non-MoE bw / expert_size."""
        assert self.bandwidth is not None
        for policy in self.policies:
            policy.t = min(len(policy.owner), int(attention_s * self.bandwidth / self.expert_bytes))
        self.profiled = True

    def reshards(self, step: int) -> bool:
        """Whether behind this step, every so many."""
        return bool(self.options.reshard_every) and (step + 1) % self.options.reshard_every == 0

    def reshard(self, step: int, placements: Sequence[Placement]) -> dict[int, Placement]:
        """Algorithm 2 on the loads of the window: new placements of the layers that change."""
        if not self.reshards(step):
            return {}
        owner = np.stack([placement.owner for placement in placements])
        loads = np.stack([policy.load(owner.shape[1]) for policy in self.policies])
        wanted = shard(loads, self.policies[0].t, self.topology, owner)
        changed = np.flatnonzero((wanted != owner).any(1)).tolist()
        return {layer: Placement.reshaped(wanted[layer], placements[layer]) for layer in changed}


def attention_s(timeline: Timeline) -> float:
    """Shortest forward of a layer's dense part, on any rank that the timeline has."""
    spans = [
        np.min(end - start)
        for task, start, end in zip(timeline.plan.tasks, timeline.start_s, timeline.end_s, strict=True)
        if task.name.endswith(".forward.attention")
    ]
    return float(min(spans))


class Reshards(ReplicatedCourse):
    """A priced training."""

    moves = True
    policies: list[Hecate]  # type: ignore[assignment]

    def __init__(self, system: type[ReplicatedSystem], cases: Sequence[Case], options: Options):
        super().__init__(system, cases, memory=options.window)
        self.options = options
        self.between: Between | None = None  # of a training
        self.attention_s = 0.0  # of the step before

    def train(self) -> None:
        self.between = Between(self.policies, self.first[0], self.options)

    def watches(self, step: int) -> bool:
        return self.between is not None and self.between.calls == PROFILED_STEP and self.between.profiles

    def saw(self, step: int, routing: Sequence[Routing], timeline: Timeline | None = None) -> Cost | None:
        super().saw(step, routing, timeline)
        if self.between is None:
            return None
        parts: list[Cost] = []
        if self.between.passes():
            self.between.overlap(self.attention_s)
            parts.append(Even("ar", "flat", 8))
        if timeline is not None:
            self.attention_s = attention_s(timeline)
        if self.between.reshards(step):
            self.tell()
        moved = self.move(self.between.reshard(step, self.placements))
        if moved is not None:
            parts.append(moved)
        return InTurn(tuple(parts)) if parts else None
