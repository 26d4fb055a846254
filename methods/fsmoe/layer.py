"""FSMoE's layer, executed: gate, order, the planned walk through sharded experts, restore (arXiv 2501.10714).

Between order and restore stands one autograd node. Its forward runs the forward plan, its backward the backward plan,
each cut into its own number of chunks, with the gradient all-reduce where the schedule puts it. The same plans, priced
instead of run, are what the simulator takes (``harness.plan``).
"""

from __future__ import annotations

import dataclasses
import math
import time

import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.layer.experts import IdentityExperts
from harness.layer.moe import UnifiedLayer
from harness.layer.order import ORDERS, assign_slots
from harness.layer.weights import Weights
from harness.plan.graph import COMPUTE, Cost, Plan, Timeline
from harness.plan.lanes import executor_of
from harness.system import Case
from methods.fsmoe.hooks import Hooks
from methods.fsmoe.mesh import Mesh
from methods.fsmoe.schedule import Work
from methods.fsmoe.shards import Backward, Forward, Shards, Way
from methods.fsmoe.step import Dense, Policy, backward_layer, forward_layer


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a layer is cut and what goes with it, on every rank alike.

    ``reduced_bytes``: of one rank's gradients (of dense parts whose backward is done), all-reduced between nodes in the
    MoE part, beside the dense part and after the layer, each in so many messages. ``wait_s``: of the experts, forward
    and backward, where they are a stand-in (``Sizes.wait_s``); ``dense_s``: of the dense part, which always is one.
    """

    degree_forward: int = 1
    degree_backward: int = 1
    reduced_bytes: tuple[int, int, int] = (0, 0, 0)
    messages: tuple[int, int, int] = (1, 1, 1)
    wait_s: tuple[tuple[float, float], tuple[float, float]] | None = None
    dense_s: tuple[float, float] = (0.0, 0.0)

    @property
    def multiple(self) -> int:
        """The capacity is padded to a multiple of this, as the authors' code does."""
        return math.lcm(self.degree_forward, self.degree_backward)


class FSMoELayer(UnifiedLayer):
    """One layer under ``policy`` and ``cut``. ``timelines``: of the last forward and backward, by direction."""

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
        super().__init__(case, weights, job.rank)
        self.job, self.policy, self.cut, self.mesh, self.hooks = job, policy, cut, mesh, hooks or Hooks()
        self.order, self.restore = ORDERS[order]
        whole = case.identity_experts or cut.wait_s is not None  # a stand-in needs no weights
        self.experts = IdentityExperts() if whole else Shards(weights, mesh, job.device)
        self.lanes = executor_of(job)
        self.timelines: dict[str, Timeline] = {}
        #: gradients that stand for those of a layer whose backward is done, all-reduced between the nodes
        self.reduced = [
            torch.full((num_bytes // case.torch_dtype.itemsize,), job.rank, dtype=case.torch_dtype, device=job.device)
            for num_bytes in cut.reduced_bytes
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hooks.before_moe_end(super().forward(self.hooks.before_moe_start(x)))

    def travel(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None
    ) -> torch.Tensor:
        slots = assign_slots(
            ids, self.model.num_experts, self._capacity(ids, kept), kept=kept, multiple=self.cut.multiple
        )
        made = _Walk.apply(self.order(x, slots), self, *self.experts.parameters())
        return self.restore(made, weights, slots)

    def _capacity(self, ids: torch.Tensor, kept: torch.Tensor | None) -> int:
        """Collective: what the fullest expert of any rank takes, so that nothing is dropped beside what the gate drops.
        Interpretation of f = * and of ragged ranks: buffers are of one size everywhere, for an equal all-to-all."""
        chosen = ids.flatten() if kept is None else ids.flatten()[kept.flatten()]
        most = torch.bincount(chosen, minlength=self.model.num_experts).max()
        if self.job.num_ranks > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return max(1, int(most))

    def run(self, direction: str, plan: Plan) -> None:
        self.timelines[direction] = self.lanes.run(plan)

    def dense(self, seconds: float) -> list[Dense]:
        """The dense part as a timed wait."""
        wait = Work(Cost("wait", amount=seconds), lambda: time.sleep(seconds))
        return [Dense("attention", COMPUTE, wait)] if seconds else []

    def reduction(self, part: int) -> Work | None:
        """The all-reduce of ``reduced[part]`` between nodes, in the cut's number of messages."""
        buffer, group, messages = self.reduced[part], self.job.rail(0), self.cut.messages[part]
        if not len(buffer):
            return None

        def run() -> None:
            if group is not None:
                for message in buffer.tensor_split(messages):
                    dist.all_reduce(message, dist.ReduceOp.AVG, group=group)

        return Work(Cost("ar", "inter", buffer.numel() * buffer.element_size(), messages), run)


class _Walk(torch.autograd.Function):
    """Slots [E, C, M] -> what the experts made of them [E, C, M]."""

    @staticmethod
    def forward(ctx, slots, layer, *shards):  # type: ignore[no-untyped-def, override]
        cut = layer.cut
        way = Way(layer.mesh, cut.degree_forward, layer.hooks, cut.wait_s and cut.wait_s[0])
        walk = Forward(way, slots, shards)
        plan = Plan()
        forward_layer(plan, layer.policy, walk, layer.dense(cut.dense_s[0]))
        layer.run("forward", plan)
        ctx.layer, ctx.walk = layer, walk
        return walk.result

    @staticmethod
    def backward(ctx, dmade):  # type: ignore[no-untyped-def, override]
        layer, cut = ctx.layer, ctx.layer.cut
        way = Way(layer.mesh, cut.degree_backward, layer.hooks, cut.wait_s and cut.wait_s[1])
        walk = Backward(way, dmade.contiguous(), ctx.walk)
        plan = Plan()
        in_moe, beside_dense, after_layer = (layer.reduction(part) for part in range(3))
        backward_layer(
            plan,
            layer.policy,
            walk,
            layer.dense(cut.dense_s[1]),
            in_moe=in_moe,
            beside_dense=beside_dense,
            after_layer=after_layer,
        )
        layer.run("backward", plan)
        dweights = [dw.to(dmade.dtype) for dw in walk.dweights]
        return walk.result, None, *dweights
