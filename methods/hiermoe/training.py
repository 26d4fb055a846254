"""Expert swap in training: at the boundary of steps, weights and optimizer state of two experts change places."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.plan.moving import Move, move
from harness.plan.native import NativeLayer
from harness.system import AfterStep
from methods.hiermoe.between import SwapOptions, Updates
from methods.hiermoe.hierd import HierExchange
from methods.hiermoe.planner import PlannerModel
from methods.hiermoe.swap import Swap, best_swap


class Swapper(AfterStep, Updates):
    """Called after every optimizer step; ``layers`` first layer first. Collective."""

    def __init__(
        self,
        job: Job,
        layers: Sequence[NativeLayer],
        options: SwapOptions,
        model: PlannerModel | None,
        row_bytes: float,
    ):
        super().__init__(job.topology, options, model, row_bytes)
        self.job, self.layers = job, layers
        self.optimizer: torch.optim.Optimizer

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        self.optimizer = optimizer
        self.after(step)

    def now_s(self) -> float:
        return time.perf_counter()

    def decide(self) -> list[Swap]:
        """One all-reduce for all layers' statistics; every rank searches some of the layers, and tells."""
        of_layer = []
        used = torch.tensor([_exchange(layer).used for layer in self.layers], device=self.job.device)
        if self.job.replicas is not None:  # groups choose dimensions apart, and swap by one of them
            dist.all_reduce(used, dist.ReduceOp.MAX)
        for layer, dimension in zip(self.layers, used.tolist(), strict=True):
            exchange = _exchange(layer)
            assert layer.routed is not None
            ids, kept = layer.routed
            taken = ids if kept is None else torch.where(kept, ids, -1)
            of_layer.append(self.statistics(taken.cpu().numpy(), exchange.placement.owner, dimension))
        parts = [found.flat() for found, _, _ in of_layer]
        flat = torch.as_tensor(np.concatenate(parts), device=self.job.device)
        if self.job.num_ranks > 1:  # over all expert-parallel groups, so that replicas are swapped alike
            dist.all_reduce(flat)
        sums = np.split(flat.cpu().numpy(), np.cumsum([len(part) for part in parts])[:-1])
        every = torch.zeros(len(self.layers), 4, dtype=torch.float64, device=self.job.device)
        for i in range(self.job.rank, len(self.layers), self.job.num_ranks):
            own, group, objective = of_layer[i]
            swap = best_swap(own.unflat(sums[i]), group, objective, self.job.num_ranks)
            every[i] = torch.tensor(swap, dtype=torch.float64)
        if self.job.num_ranks > 1:
            dist.all_reduce(every, group=self.job.world)
        return [Swap(int(r), int(c), before, after) for r, c, before, after in every.tolist()]

    def swap(self, pairs: Mapping[int, tuple[int, int]]) -> None:
        """Move weights and optimizer state of all layers' pairs in one batch, and tell the exchanges."""
        moves, after = [], {}
        for i, pair in pairs.items():
            before = _exchange(self.layers[i]).placement
            after[i] = before.swapped([pair])
            moves.append(Move(list(self.layers[i].experts.parameters()), before, after[i]))
        move(self.job, moves, self.optimizer)
        for i, placement in after.items():
            self.layers[i].place(placement)

    def moving_bytes(self) -> float:
        parameters = list(self.layers[0].experts.parameters())
        of_expert = sum(p[0].numel() * p.element_size() for p in parameters)
        states = self.optimizer.state
        kept = [[v for v in states[p].values() if getattr(v, "ndim", 0) > 0] for p in parameters]
        times = max(sum(v.element_size() for v in of) / parameters[0].element_size() for of in kept)
        return float(of_expert * (1 + times))

    def slowest(self, share: float) -> float:
        every = torch.tensor([share], dtype=torch.float64, device=self.job.device)
        if self.job.num_ranks > 1:
            dist.all_reduce(every, dist.ReduceOp.MAX)
        return float(every)


def _exchange(layer: NativeLayer) -> HierExchange:
    assert isinstance(layer.exchange_, HierExchange)
    return layer.exchange_
