"""FSMoE's layer, executed: gate, order, the planned walk through sharded experts, restore (arXiv 2501.10714).

Forward and backward are each cut into their own number of chunks, with the gradient all-reduce where the schedule puts
it. The same tasks, priced instead of run, stand in ``methods.fsmoe.layout``.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.layer.experts import IdentityExperts
from harness.layer.gates import Gated
from harness.layer.order import ORDERS, assign_slots
from harness.layer.weights import Weights
from harness.plan.graph import COMPUTE, Work
from harness.plan.passage import Dense, Direction
from harness.plan.planned import PlannedLayer, PlannedPassage
from harness.system import Case
from methods.fsmoe.cut import Cut, padded_sizes
from methods.fsmoe.hooks import Hooks
from methods.fsmoe.layout import FSMoETasks, Slices
from methods.fsmoe.mesh import Mesh
from methods.fsmoe.shards import Backward, Forward, Shards
from methods.fsmoe.step import Policy


class FSMoELayer(PlannedLayer):
    """One layer under ``policy`` and ``cut``."""

    def __init__(
        self,
        case: Case,
        job: Job,
        weights: Weights,
        *,
        policy: Policy,
        cut: Cut,
        mesh: Mesh,
        order: str = "tutel",
        hooks: Hooks | None = None,
    ):
        super().__init__(case, job, weights)
        self.case, self.policy, self.mesh, self.hooks = case, policy, mesh, hooks or Hooks()
        self.order, self.restore = ORDERS[order]
        self.recut(cut)
        whole = case.identity_experts or case.stand_in  # a stand-in needs no weights
        self.experts = IdentityExperts() if whole else Shards(weights, mesh, job.device)
        #: gradients that stand for those of a layer whose backward is done, all-reduced between the nodes
        self.reduced = [
            torch.full((num_bytes // case.torch_dtype.itemsize,), job.rank, dtype=case.torch_dtype, device=job.device)
            for num_bytes in cut.reduced_bytes
        ]

    def recut(self, cut: Cut) -> None:
        self.cut, self.sizes = cut, padded_sizes(self.case, cut)

    def passage(self, gated: Gated | None = None) -> FSMoEPassage:
        return FSMoEPassage(self, gated)

    def capacity(self, ids: torch.Tensor, kept: torch.Tensor | None) -> int:
        """Collective: what the fullest expert of any rank takes, so that nothing is dropped beside what the gate drops.
        Interpretation of f = * and of ragged ranks: buffers are of one size everywhere, for an equal all-to-all."""
        chosen = ids.flatten() if kept is None else ids.flatten()[kept.flatten()]
        most = torch.bincount(chosen, minlength=self.model.num_experts).max()
        if self.job.num_ranks > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return max(1, int(most))

    # ------------------------------------------------------------------ alone: with stand-ins for what stands beside it

    def dense(self, seconds: float) -> list[Dense]:
        """The dense part as a timed wait."""
        return [Dense("attention", COMPUTE, Work(run=lambda: time.sleep(seconds)))] if seconds else []

    def reduction(self, part: int) -> Work | None:
        """The all-reduce of ``reduced[part]`` between nodes, in the cut's number of messages."""
        buffer, group, messages = self.reduced[part], self.job.rail(0), self.cut.messages[part]
        if not len(buffer):
            return None

        def run() -> None:
            if group is not None:
                for message in buffer.tensor_split(messages):
                    dist.all_reduce(message, dist.ReduceOp.AVG, group=group)

        return Work(run=run)


class FSMoEPassage(FSMoETasks, PlannedPassage):
    """Slots [E, C, M] through the shards and back."""

    layer: FSMoELayer
    walk: Forward
    walk_back: Backward

    def __init__(self, layer: FSMoELayer, gated: Gated | None):
        super().__init__(layer, gated)
        self.overlap = layer.policy.overlap
        self.shards = tuple(layer.experts.parameters())
        self.walk = Forward(layer.mesh, layer.hooks, layer.sizes.forward, layer.cut.degree_forward, self.shards)
        self.walk_back = Backward(self.walk, layer.sizes.backward, layer.cut.degree_backward)

    def dense(self, direction: Direction) -> list[Dense]:
        return self.layer.dense(self.layer.sizes.dense_s[direction == "backward"])

    def slices(self) -> Slices:
        return self.layer.reduction(0), self.layer.reduction(1), self.layer.reduction(2)

    def order(self, x: torch.Tensor, gated: Gated) -> torch.Tensor:
        layer = self.layer
        capacity = layer.capacity(gated.ids, gated.kept)
        self.slots = assign_slots(
            gated.ids, layer.model.num_experts, capacity, kept=gated.kept, multiple=layer.cut.multiple
        )
        return layer.order(x, self.slots)

    def restore(self, home: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.layer.restore(home, weights, self.slots)

    def depart(self, rows: torch.Tensor) -> None:
        self.walk.start(rows.detach())

    def arrive(self) -> torch.Tensor:
        return self.walk.result.requires_grad_(torch.is_grad_enabled())

    def depart_back(self, dhome: torch.Tensor | None) -> None:
        self.walk_back.start(torch.zeros_like(self.walk.source) if dhome is None else dhome.contiguous())

    def arrive_back(self) -> torch.Tensor:
        for shard, gradient in zip(self.shards, self.walk_back.dweights, strict=True):
            gradient = gradient.to(shard.dtype)
            shard.grad = gradient if shard.grad is None else shard.grad + gradient
        return self.walk_back.result

    def _enter(self, x: torch.Tensor) -> Any:
        return super()._enter(x if self.gated else self.layer.hooks.before_moe_start(x))

    def _leave(self, *came: Any) -> torch.Tensor:
        y = super()._leave(*came)
        return y if self.gated else self.layer.hooks.before_moe_end(y)
