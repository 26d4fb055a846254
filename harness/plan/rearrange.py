"""Placements that follow the load: now and then, between training steps, a planner says where experts should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.plan.following import Following
from harness.plan.moving import Move, move
from harness.plan.native import NativeLayer
from harness.system import AfterStep


class Rearranger(AfterStep):
    """Called after every optimizer step; collective. ``following`` decides. ``placed``: how often a layer's placement
    changed."""

    def __init__(self, job: Job, layers: Sequence[NativeLayer], following: Following):
        self.job, self.layers, self.following = job, layers, following
        self.load = torch.zeros(len(layers), layers[0].model.num_experts, dtype=torch.int64, device=job.device)
        self.placed = 0

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if self.following.counts(step):
            for load, layer in zip(self.load, self.layers, strict=True):
                assert layer.routed is not None
                ids, kept = layer.routed
                taken = ids.flatten() if kept is None else ids[kept]
                load += torch.bincount(taken, minlength=len(load))
        if not self.following.due(step):
            return
        if self.job.num_ranks > 1:  # over all expert-parallel groups, so that replicas move alike
            dist.all_reduce(self.load)
        before = [layer.exchange_.placement for layer in self.layers]
        found = self.following.decide(self.load.cpu().numpy(), before)
        moves = [Move(list(self.layers[i].experts.parameters()), before[i], after) for i, after in found.items()]
        move(self.job, moves, optimizer if self.following.optimizer_state else None)
        for i, after in found.items():
            self.layers[i].place(after)
        self.placed += len(moves)
        self.load.zero_()

    def state(self) -> dict[str, Any]:
        return {"load": self.load}

    def restore(self, state: dict[str, Any]) -> None:
        self.load.copy_(state["load"])
