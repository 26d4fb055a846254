"""Placements that follow the load: now and then, between training steps, a planner says where experts should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.placement import Placement
from harness.plan.moving import Move, move
from harness.plan.native import NativeLayer
from harness.system import AfterStep

#: load [E] of some steps, placement so far -> placement; that one itself where nothing is to change
Planner = Callable[[np.ndarray, Placement], Placement]
WINDOW = 5  # steps whose tokens count


class Rearranger(AfterStep):
    """Called after every optimizer step; collective. Every ``every`` steps each layer's ``planner`` gets the tokens
    that its experts had in the last ``window`` steps, on all ranks; parameters move, with optimizer state unless
    ``optimizer_state`` is False. ``placed``: how often a layer's placement changed."""

    def __init__(
        self,
        job: Job,
        layers: Sequence[NativeLayer],
        planner: Planner,
        every: int,
        window: int = WINDOW,
        optimizer_state: bool = True,
    ):
        self.job, self.layers, self.planner = job, layers, planner
        self.every, self.window, self.optimizer_state = every, min(window, every), optimizer_state
        self.load = torch.zeros(len(layers), layers[0].model.num_experts, dtype=torch.int64, device=job.device)
        self.placed = 0

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step % self.every >= self.every - self.window:
            for load, layer in zip(self.load, self.layers, strict=True):
                assert layer.routed is not None
                ids, kept = layer.routed
                taken = ids.flatten() if kept is None else ids[kept]
                load += torch.bincount(taken, minlength=len(load))
        if (step + 1) % self.every:
            return
        if self.job.num_ranks > 1:
            dist.all_reduce(self.load)
        moves, loads = [], self.load.cpu().numpy()
        for layer, load in zip(self.layers, loads, strict=True):
            before = layer.exchange_.placement
            after = self.planner(load, before)
            if after is not before:
                moves.append((layer, Move(list(layer.experts.parameters()), before, after)))
        move(self.job, [each for _, each in moves], optimizer if self.optimizer_state else None)
        for layer, each in moves:
            layer.place(each.after)
        self.placed += len(moves)
        self.load.zero_()

    def state(self) -> dict[str, Any]:
        return {"load": self.load}

    def restore(self, state: dict[str, Any]) -> None:
        self.load.copy_(state["load"])
