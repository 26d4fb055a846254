"""At the boundary of training steps: the overlap degree from what the attention took, and re-sharding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.plan.moving import Move, move
from harness.plan.replicated import ReplicatedLayer
from harness.system import AfterStep, Case
from methods.hecate.between import Between, attention_s
from methods.hecate.policy import Hecate, Options


class Sharder(AfterStep):
    """Called after every optimizer step; ``layers`` first layer first. Collective.

    ``moved``: bytes of parameters and optimizer state that this rank sent, of each re-sharding that changed
    anything."""

    def __init__(self, job: Job, layers: Sequence[ReplicatedLayer], case: Case, options: Options):
        self.job, self.layers = job, layers
        self.between = Between([_policy(layer) for layer in layers], case, options)
        self.moved: list[int] = []

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if self.between.passes():
            self.profile()
        before = [layer.placement for layer in self.layers]
        after = self.between.reshard(step, before)
        if not after:
            return
        moves = [Move(list(self.layers[i].experts.parameters()), before[i], to) for i, to in after.items()]
        self.moved.append(move(self.job, moves, optimizer))
        for i, placement in after.items():
            self.layers[i].place(placement)

    def state(self) -> dict[str, Any]:
        policies = self.between.policies
        windows = [[load.tolist() for load in policy.window] for policy in policies]
        return {"windows": windows, "t": policies[0].t, "profiled": self.between.profiled}

    def restore(self, state: dict[str, Any]) -> None:
        self.between.profiled = state["profiled"]
        for policy, window in zip(self.between.policies, state["windows"], strict=True):
            policy.know(window, state["t"])

    def profile(self) -> None:
        """By the shortest attention of a layer, on the rank that is done first, so that every gather fits."""
        timeline = self.layers[0].timeline  # of the step before
        assert timeline is not None
        found = torch.tensor([attention_s(timeline)], dtype=torch.float64, device=self.job.device)
        if self.job.num_ranks > 1:
            dist.all_reduce(found, dist.ReduceOp.MIN)
        self.between.overlap(float(found))


def _policy(layer: ReplicatedLayer) -> Hecate:
    assert isinstance(layer.policy, Hecate)
    return layer.policy
