"""Expert swap in training: at the boundary of steps, from the routing of the step just done, for the next one."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.errors import bad
from harness.plan.moving import Move, move
from harness.plan.native import NativeLayer
from harness.system import AfterStep
from methods.hiermoe.counts import Stage
from methods.hiermoe.hierd import HierExchange
from methods.hiermoe.model import TimeModel
from methods.hiermoe.swap import GAMMA, MaxFunction, Objective, Statistics, Swap, best_swap, collect, groups

MAX_SHARE = 0.01
MARGIN = 1.25  # in steps waited, as a search that ends in no swap is lost


@dataclasses.dataclass(frozen=True)
class SwapOptions:
    """``every``: steps between updates; ``pairs``: swaps of each layer in one update; ``max`` and ``gamma``: of the
    objective (``Objective``)."""

    every: int = 1
    pairs: int = 1
    max: MaxFunction = "smooth"
    gamma: float = GAMMA

    def __post_init__(self) -> None:
        if self.every < 1:
            raise bad("options.swap_every", self.every, "must be at least 1 step")
        if self.pairs < 1:
            raise bad("options.swap_pairs", self.pairs, "must be at least 1 pair")


class Swapper(AfterStep):
    """Called after every optimizer step; ``layers`` first layer first. Collective.

    ``model``: None where no costs are known; else no update is made that would take more than ``MAX_SHARE`` of the
    steps since the last one: neither the search, as measured, nor the transfer, as predicted. ``made``: all swaps so
    far, [(step, layer, swap)]."""

    def __init__(
        self,
        job: Job,
        layers: Sequence[NativeLayer],
        options: SwapOptions,
        model: TimeModel | None,
        row_bytes: float,
    ):
        self.job, self.layers, self.options, self.model, self.row_bytes = job, layers, options, model, row_bytes
        self.made: list[tuple[int, int, Swap]] = []
        self.skipped = 0  # updates that would have cost too much
        self._from, self._since = 0, 0.0  # steps done at the last update, and when that was
        self._due = 0  # steps until which an update would cost too much

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        done, began = step + 1, time.perf_counter()
        if self.model is not None and not self._since:  # nothing is known of a step's length yet
            self._from, self._since = done, began
            return
        if done % self.options.every or done < self._due:
            return
        step_s = (began - self._since) / max(1, done - self._from)
        for _ in range(self.options.pairs):
            swaps = self.decide()
            wanted = [i for i, swap in enumerate(swaps) if swap.r >= 0]
            if not wanted:
                break
            cost_s = time.perf_counter() - began + self._move_s(len(wanted), optimizer)
            if (due := self._from + self._serves(cost_s, step_s)) > done:
                self._due, self.skipped = due, self.skipped + 1
                return
            self.swap({i: (swaps[i].r, swaps[i].c) for i in wanted}, optimizer)
            self.made += [(step, i, swaps[i]) for i in wanted]
        now = time.perf_counter()
        self._due = done + self._serves(now - began, step_s)
        self._from, self._since = done, now

    def decide(self) -> list[Swap]:
        """The best swap of every layer by the tokens of its last forward on all ranks; one all-reduce for all their
        statistics."""
        topology, parts = self.job.topology, []
        of_layer: list[tuple[Statistics, np.ndarray, Objective]] = []
        for layer in self.layers:
            exchange = _exchange(layer)
            objective = self._objective(exchange.used)
            group = groups(exchange.placement.owner, topology, objective.levels)
            assert layer.routed is not None
            ids, kept = layer.routed
            taken = ids if kept is None else torch.where(kept, ids, -1)
            found = collect(taken.cpu().numpy(), group, topology.num_ranks)
            of_layer.append((found, group, objective))
            parts.append(found.flat())
        flat = torch.as_tensor(np.concatenate(parts), device=self.job.device)
        if self.job.num_ranks > 1:
            dist.all_reduce(flat)
        sums = np.split(flat.cpu().numpy(), np.cumsum([len(part) for part in parts])[:-1])
        # Every rank searches some of the layers, and tells.
        every = torch.zeros(len(self.layers), 4, dtype=torch.float64, device=self.job.device)
        for i in range(self.job.rank, len(self.layers), self.job.num_ranks):
            own, group, objective = of_layer[i]
            swap = best_swap(own.unflat(sums[i]), group, objective, self.job.num_ranks)
            every[i] = torch.tensor(swap, dtype=torch.float64)
        if self.job.num_ranks > 1:
            dist.all_reduce(every)
        return [Swap(int(r), int(c), before, after) for r, c, before, after in every.tolist()]

    def swap(self, pairs: dict[int, tuple[int, int]], optimizer: torch.optim.Optimizer) -> None:
        """Move weights and optimizer state of all layers' pairs in one batch, and tell the exchanges."""
        moves, after = [], {}
        for i, pair in pairs.items():
            before = _exchange(self.layers[i]).placement
            after[i] = before.swapped([pair])
            moves.append(Move(list(self.layers[i].experts.parameters()), before, after[i]))
        move(self.job, moves, optimizer)
        for i, placement in after.items():
            self.layers[i].place(placement)

    def _objective(self, dimension: int) -> Objective:
        options = self.options
        if self.model is None:
            return Objective.unpriced(dimension, self.job.topology, options.max, options.gamma)
        return Objective.of(self.model, dimension, self.row_bytes, options.max, options.gamma)

    def _move_s(self, num_swaps: int, optimizer: torch.optim.Optimizer) -> float:
        """Predicted; every swap may cross the outermost link."""
        if self.model is None:
            return 0.0
        parameters = list(self.layers[0].experts.parameters())
        of_expert = sum(p[0].numel() * p.element_size() for p in parameters)
        num_states = max(sum(getattr(v, "ndim", 0) > 0 for v in optimizer.state[p].values()) for p in parameters)
        shape = self.model.cluster.shape
        outermost = next((level for level, size in enumerate(shape) if size > 1), len(shape) - 1)
        cost = self.model.cost(Stage(outermost, outermost + 1))
        return cost.alpha_s + 2 * num_swaps * of_expert * (1 + num_states) * cost.beta_s_per_byte

    def _serves(self, cost_s: float, step_s: float) -> int:
        """Steps that an update must serve; the slowest rank decides."""
        if self.model is None:
            return 0
        share = torch.tensor([cost_s / step_s], dtype=torch.float64, device=self.job.device)
        if self.job.num_ranks > 1:
            dist.all_reduce(share, dist.ReduceOp.MAX)
        return math.ceil(MARGIN * float(share) / MAX_SHARE)


def _exchange(layer: NativeLayer) -> HierExchange:
    assert isinstance(layer.exchange_, HierExchange)
    return layer.exchange_
