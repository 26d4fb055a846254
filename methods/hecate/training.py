"""At the boundary of training steps: the overlap degree from what the attention took, and re-sharding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.memory import expert_bytes
from harness.placement import Placement
from harness.plan.graph import Timeline
from harness.plan.moving import Move, move
from harness.plan.replicated import ReplicatedLayer
from harness.system import AfterStep, Case
from methods.hecate.policy import Hecate, Options
from methods.hecate.shard import shard

PROFILED_STEP = 1  # of this process; the first one has everything cold


class Sharder(AfterStep):
    """Called after every optimizer step; ``layers`` first layer first. Collective.

    ``moved``: bytes of parameters and optimizer state that this rank sent, of each re-sharding that changed
    anything."""

    def __init__(self, job: Job, layers: Sequence[ReplicatedLayer], case: Case, options: Options):
        self.job, self.layers, self.options = job, layers, options
        self.expert_bytes = expert_bytes(case.model, case.dtype)
        outermost = case.cluster.levels[0] if case.cluster is not None else None
        self.bandwidth = outermost.unit_bytes_per_s if outermost is not None else None
        self.moved: list[int] = []
        self.calls = 0
        self.profiled = False
        for layer in layers:
            _policy(layer).forget()

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if self.calls == PROFILED_STEP + 1 and self.options.t is None and self.bandwidth and not self.profiled:
            self.profile()
        self.calls += 1
        if self.options.reshard_every and (step + 1) % self.options.reshard_every == 0:
            self.reshard(optimizer)

    def state(self) -> dict[str, Any]:
        policies = [_policy(layer) for layer in self.layers]
        windows = [[load.tolist() for load in policy.window] for policy in policies]
        return {"windows": windows, "t": policies[0].t, "profiled": self.profiled}

    def restore(self, state: dict[str, Any]) -> None:
        self.profiled = state["profiled"]
        for layer, window in zip(self.layers, state["windows"], strict=True):
            _policy(layer).know(window, state["t"])

    def profile(self) -> None:
        """t = T_non-MoE bw / expert_size, of the step before: the shortest attention of a layer, on the rank that is
        done first, so that every gather fits."""
        timeline = self.layers[0].timeline
        assert timeline is not None
        assert self.bandwidth is not None
        found = torch.tensor([attention_s(timeline)], dtype=torch.float64, device=self.job.device)
        if self.job.num_ranks > 1:
            dist.all_reduce(found, dist.ReduceOp.MIN)
        for layer in self.layers:
            _policy(layer).t = min(layer.model.num_experts, int(float(found) * self.bandwidth / self.expert_bytes))
        self.profiled = True

    def reshard(self, optimizer: torch.optim.Optimizer) -> None:
        """Algorithm 2 on the loads of the window; parameters and optimizer state move if it changes anything."""
        owner = np.stack([layer.placement.owner for layer in self.layers])
        loads = np.stack([_policy(layer).load(owner.shape[1]) for layer in self.layers])
        wanted = shard(loads, _policy(self.layers[0]).t, self.job.topology, owner)
        changed = np.flatnonzero((wanted != owner).any(1))
        if not len(changed):
            return
        after = {i: Placement.reshaped(wanted[i], self.layers[i].placement) for i in changed.tolist()}
        moves = [
            Move(list(self.layers[i].experts.parameters()), self.layers[i].placement, to) for i, to in after.items()
        ]
        self.moved.append(move(self.job, moves, optimizer))
        for i, placement in after.items():
            self.layers[i].place(placement)


def attention_s(timeline: Timeline) -> float:
    """Shortest forward of a layer's dense part."""
    spans = [
        end - start
        for task, start, end in zip(timeline.plan.tasks, timeline.start_s, timeline.end_s, strict=True)
        if task.name.endswith(".forward.attention")
    ]
    return float(min(spans))


def _policy(layer: ReplicatedLayer) -> Hecate:
    assert isinstance(layer.policy, Hecate)
    return layer.policy
