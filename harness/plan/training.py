"""A training step of a GPT as one plan on this rank: embedding, every layer's attention and MoE part, head and loss,
backward through them all, the sum of replicated gradients where the system puts it, optimizer.

Attention is replicated (data parallelism over all ranks), or its heads are shared out over the ranks of a node (model
parallelism inside nodes, data parallelism across): then tokens are gathered in the node before it, and partial sums
scattered after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from harness.comm.handover import Handover, Held, pop
from harness.comm.job import Job
from harness.layer.gpt import GPT, Block
from harness.plan.gradients import Stream, sum_over
from harness.plan.graph import COMPUTE, INTER, INTRA, Plan, Work
from harness.plan.passage import Dense, Passage, backward_layer, forward_layer
from harness.plan.segment import Segment
from harness.system import GradientSlices


class DensePart(Handover):
    """A batch's way through the attention of one block, forward and backward, on one rank.

    ``residual`` [B, L, M] and the last MoE part's ``made`` [T, M] (None before the first) come in; a new ``residual``
    and ``x`` [T, M], which enters the MoE part, come out. Backward the other way round.
    """

    def __init__(self, block: Block, steer: Callable[[torch.Tensor], torch.Tensor], group: dist.ProcessGroup | None):
        self.block, self.steer, self.group = block, steer, group
        self.norm, self.attention, self.join, self.whole = (Segment() for _ in range(4))
        self.residual: torch.Tensor
        self.made: torch.Tensor | None
        self.x: torch.Tensor
        self.dresidual: torch.Tensor | None
        self.dx: torch.Tensor | None
        self.dmade: torch.Tensor | None

    def forward(self) -> list[Dense]:
        if self.group is None:
            return [Dense("attention", COMPUTE, Work(run=self._forward_whole))]
        return [
            Dense("norm", COMPUTE, Work(run=self._forward_norm)),
            Dense("mp-gather", INTRA, Work(run=self._gather)),
            Dense("attention", COMPUTE, Work(run=self._forward_attention)),
            Dense("mp-scatter", INTRA, Work(run=self._scatter)),
            Dense("residual", COMPUTE, Work(run=self._forward_join)),
        ]

    def backward(self, made: Callable[[], None]) -> list[Dense]:
        """``made``: called as soon as the gradients of the attention's projections are complete."""

        def whole() -> None:
            self.dresidual, self.dmade = self.whole.backward(pop(self, "dresidual"), pop(self, "dx"))
            made()

        def attention() -> None:
            (dtokens,) = self.attention.backward(pop(self, "tokens"))
            assert dtokens is not None
            self.partial = dtokens
            made()

        if self.group is None:
            return [Dense("attention", COMPUTE, Work(run=whole))]
        return [
            Dense("residual", COMPUTE, Work(run=self._backward_join)),
            Dense("mp-gather", INTRA, Work(run=self._gather)),
            Dense("attention", COMPUTE, Work(run=attention)),
            Dense("mp-scatter", INTRA, Work(run=self._scatter)),
            Dense("norm", COMPUTE, Work(run=self._backward_norm)),
        ]

    # ------------------------------------------------------------------ segments

    def _norm(self, residual: torch.Tensor, made: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x = residual if made is None else residual + made.view_as(residual)
        return x, self.block.attention_norm(x)

    def _join(self, x: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + attended
        return x, self.steer(self.block.moe_norm(x).flatten(0, 1))

    def _whole(self, residual: torch.Tensor, made: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x, normed = self._norm(residual, made)
        return self._join(x, self.block.attention(normed))

    # ------------------------------------------------------------------ tasks

    def _forward_whole(self) -> None:
        self.residual, self.x = self.whole.forward(self._whole, pop(self, "residual"), pop(self, "made"))

    def _forward_norm(self) -> None:
        self.residual, own = self.norm.forward(self._norm, pop(self, "residual"), pop(self, "made"))
        self.own = own.detach()

    def _gather(self) -> None:
        """own [B, L, M] of every rank of the node -> tokens [ranks B, L, M]."""
        self.tokens = self.own.new_empty(dist.get_world_size(self.group) * len(self.own), *self.own.shape[1:])
        dist.all_gather_into_tensor(self.tokens, self.own.contiguous(), group=self.group)
        self.tokens.requires_grad_()

    def _forward_attention(self) -> None:
        self.partial = self.attention.forward(self.block.attention, pop(self, "tokens")).detach()

    def _scatter(self) -> None:
        """partial [ranks B, L, M] of every rank -> own [B, L, M], summed."""
        self.own = torch.empty_like(self.own)
        dist.reduce_scatter_tensor(self.own, pop(self, "partial").contiguous(), group=self.group)

    def _forward_join(self) -> None:
        own = pop(self, "own").requires_grad_()
        self.residual, self.x = self.join.forward(self._join, pop(self, "residual"), own)

    def _backward_join(self) -> None:
        self.dresidual, own = self.join.backward(pop(self, "dresidual"), pop(self, "dx"))
        assert own is not None
        self.own = own

    def _backward_norm(self) -> None:
        self.dresidual, self.dmade = self.norm.backward(pop(self, "dresidual"), pop(self, "own"))


class TrainingStep:
    """One step. ``passages``: of the MoE layers; ``steer``: what stands before each; ``summed``: replicated parameters
    whose gradients are summed over all ranks after backward, beside the attention's, which are ``stream``;
    ``slices``: of the stream in each layer's backward, last layer first. ``loss``: after the plan ran. ``watched``: the
    layer of which ``seen`` then holds what went into its MoE part and came out, ``x``, ``y``, ``dy`` and ``dx``."""

    def __init__(
        self,
        gpt: GPT,
        job: Job,
        passages: Sequence[Passage],
        steer: Sequence[Callable[[torch.Tensor], torch.Tensor]],
        stream: Stream,
        slices: Sequence[GradientSlices],
        summed: Sequence[nn.Parameter],
        *,
        model_parallel: bool = False,
        watched: int | None = None,
    ):
        self.watched, self.seen = watched, Held()
        self.gpt, self.job, self.passages, self.stream, self.slices = gpt, job, passages, stream, slices
        self.summed = summed
        group = job.inner(0) if model_parallel else None
        self.dense = [DensePart(block, each, group) for block, each in zip(gpt.blocks, steer, strict=True)]  # type: ignore[arg-type]
        self.awaited: list[str] = []  # tasks that the optimizer waits for beside the sums of gradients
        self.loss: torch.Tensor

    def _see(self, layer: int, name: str, tensor: torch.Tensor | None) -> None:
        if layer == self.watched and tensor is not None:
            self.seen[name] = tensor.detach()

    def plan(
        self,
        tokens: torch.Tensor,
        loss: Callable[[torch.Tensor], torch.Tensor],
        update: Callable[[], object],
    ) -> Plan:
        """tokens int64 [B, L]; ``loss``: logits [B, L, vocab] -> this rank's share; ``update``: the optimizer's."""
        plan, num_layers = Plan(), len(self.dense)
        self.awaited = []
        last = self._forward(plan, tokens, loss)
        for i in reversed(range(num_layers)):
            last = self._backward_layer(plan, i, last)

        def embed_backward() -> None:
            self.embed.backward(pop(self.dense[0], "dresidual"))

        last = [plan.add("embedding.backward", COMPUTE, last, run=embed_backward, kind="embedding")]
        rest = sum(self.stream.part_bytes) - self.stream.taken * self.stream.element_bytes
        tail = self.stream.take("gradients-tail", rest, after_part=num_layers)

        def reduce_rest() -> None:
            if tail is not None and tail.run is not None:
                tail.run()
            sum_over(self.summed, self.job.world if self.job.num_ranks > 1 else None)

        def optimize() -> None:
            self.stream.give_back()
            update()

        cost = None if tail is None else tail.cost
        last = [plan.add("gradients-tail", INTER, last, cost, reduce_rest, "gradients")]
        plan.add("optimizer", COMPUTE, [*last, *self.awaited], run=optimize)
        return plan

    def _forward(self, plan: Plan, tokens: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> list[str]:
        gpt, dense, passages = self.gpt, self.dense, self.passages
        self.embed, self.head = Segment(), Segment()
        passages[-1].turns = True

        def look_up(ids: torch.Tensor) -> torch.Tensor:
            return gpt.token(ids) + gpt.position.weight[: ids.shape[1]]

        def head(residual: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
            return loss(gpt.head(gpt.norm(residual + made.view_as(residual))))

        def embed() -> None:
            dense[0].residual, dense[0].made = self.embed.forward(look_up, tokens), None

        def finish() -> None:
            self._see(len(passages) - 1, "y", passages[-1].y)
            share = self.head.forward(head, pop(dense[-1], "residual"), pop(passages[-1], "y"))
            self.loss = share.detach()
            dense[-1].dresidual, passages[-1].dy = self.head.backward(torch.ones_like(share))  # type: ignore[assignment]
            self._see(len(passages) - 1, "dy", passages[-1].dy)

        last = [plan.add("embedding", COMPUTE, run=embed)]
        for i, (part, way) in enumerate(zip(dense, passages, strict=True)):

            def hand_over(i: int = i, part: DensePart = part, way: Passage = way) -> None:
                way.x = pop(part, "x")
                self._see(i, "x", way.x)

            def take_over(i: int = i, part: DensePart = part) -> None:
                self._see(i - 1, "y", passages[i - 1].y)
                part.residual, part.made = pop(dense[i - 1], "residual"), pop(passages[i - 1], "y")

            tasks = part.forward()
            tasks[0] = _before(take_over, tasks[0]) if i else tasks[0]
            tasks[-1] = _behind(tasks[-1], hand_over)
            last = forward_layer(plan, way.forward, tasks, ahead=way.ahead, prefix=f"layer{i}.", after=last)
        return [plan.add("head", COMPUTE, last, run=finish)]

    def _backward_layer(self, plan: Plan, i: int, after: list[str]) -> list[str]:
        dense, passages = self.dense, self.passages
        part, way, back = dense[i], passages[i], len(dense) - 1 - i

        def take_over() -> None:
            self._see(i, "dx", way.dx)
            part.dx = pop(way, "dx")

        def hand_over() -> None:
            if i:
                dense[i - 1].dresidual, passages[i - 1].dy = pop(part, "dresidual"), pop(part, "dmade")
                self._see(i - 1, "dy", passages[i - 1].dy)

        tasks = part.backward(lambda: self.stream.fill(back))
        tasks[0] = _before(take_over, tasks[0])
        tasks[-1] = _behind(tasks[-1], hand_over)
        prefix, (in_moe, beside_dense, behind) = f"layer{i}.", self.slices[back].num_bytes
        counts = self.slices[back].messages
        take = self.stream.take

        def beside() -> None:
            self.awaited += way.behind(plan, f"{prefix}backward.")
            if i:
                passages[i - 1].ahead_back(plan, f"layer{i - 1}.backward.")

        return backward_layer(
            plan,
            way.backward,
            tasks,
            in_moe=take(f"{prefix}backward.gradients", in_moe, counts[0], after_part=back),
            beside_dense=take(f"{prefix}backward.gradients-dense", beside_dense, counts[1], after_part=back),
            after_layer=take(f"{prefix}backward.gradients-after", behind, counts[2], after_part=back + 1),
            beside=beside,
            prefix=prefix,
            after=after,
        )


def _before(first: Callable[[], None], task: Dense) -> Dense:
    """``task`` with ``first`` run before it."""
    return _both(first, task.work.run, task)


def _behind(task: Dense, then: Callable[[], None]) -> Dense:
    """``task`` with ``then`` run after it."""
    return _both(task.work.run, then, task)


def _both(one: Callable[[], None] | None, other: Callable[[], None] | None, task: Dense) -> Dense:
    def run() -> None:
        for each in (one, other):
            if each is not None:
                each()

    return dataclasses.replace(task, work=Work(task.work.cost, run))
