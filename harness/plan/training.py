"""A training step of a GPT on this rank: the tasks of ``harness.plan.step.TrainingTasks``, run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from harness.comm.handover import Handover, Held, pop, seen
from harness.comm.job import Job
from harness.layer.gpt import GPT, Block
from harness.plan.gradients import Stream, sum_over
from harness.plan.graph import Plan, Work
from harness.plan.passage import Direction, Way
from harness.plan.segment import Segment
from harness.plan.step import TrainingTasks
from harness.system import GradientSlices


class DensePart(Handover):
    """A batch's way through the attention of one block, forward and backward, on one rank.

    ``residual`` [B, L, M] and the last MoE part's ``made`` [T, M] (None before the first) come in; a new ``residual``
    and ``x`` [T, M], which enters the MoE part, come out. Backward the other way round.
    """

    def __init__(
        self,
        block: Block,
        steer: Callable[[torch.Tensor], torch.Tensor],
        group: dist.ProcessGroup | None,
        made: Callable[[], None],
    ):
        """``made``: called as soon as the gradients of the attention's projections are complete."""
        self.block, self.steer, self.group, self.made_all = block, steer, group, made
        self.norm, self.attention, self.join, self.whole = (Segment() for _ in range(4))
        self.residual: torch.Tensor
        self.made: torch.Tensor | None
        self.x: torch.Tensor
        self.dresidual: torch.Tensor | None
        self.dx: torch.Tensor | None
        self.dmade: torch.Tensor | None

    def run(self, direction: Direction, task: str) -> Callable[[], None]:
        """Of a task of ``harness.plan.step``."""
        if task == "mp-gather":
            return self._gather
        if task == "mp-scatter":
            return self._scatter
        if self.group is None:
            task = "whole"
        return getattr(self, f"_{direction}_{task}")  # type: ignore[no-any-return]

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

    def _forward_residual(self) -> None:
        own = pop(self, "own").requires_grad_()
        self.residual, self.x = self.join.forward(self._join, pop(self, "residual"), own)

    def _backward_whole(self) -> None:
        self.dresidual, self.dmade = self.whole.backward(pop(self, "dresidual"), pop(self, "dx"))
        self.made_all()

    def _backward_attention(self) -> None:
        (dtokens,) = self.attention.backward(pop(self, "tokens"))
        assert dtokens is not None
        self.partial = dtokens
        self.made_all()

    def _backward_residual(self) -> None:
        self.dresidual, own = self.join.backward(pop(self, "dresidual"), pop(self, "dx"))
        assert own is not None
        self.own = own

    def _backward_norm(self) -> None:
        self.dresidual, self.dmade = self.norm.backward(pop(self, "dresidual"), pop(self, "own"))


class FfnPart(Handover):
    """The same through the FFN of a layer without experts: x [T, M] -> y [T, M]."""

    def __init__(self, ffn: nn.Module):
        self.ffn, self.segment = ffn, Segment()
        self.x: torch.Tensor
        self.y: torch.Tensor
        self.dy: torch.Tensor
        self.dx: torch.Tensor | None

    def forward(self) -> None:
        self.y = self.segment.forward(self.ffn, pop(self, "x"))

    def backward(self) -> None:
        (self.dx,) = self.segment.backward(pop(self, "dy"))


class TrainingStep(TrainingTasks):
    """One step. ``passages``: of the MoE layers; ``steer``: what stands before each; ``summed``: replicated parameters
    whose gradients are summed over all ranks after backward, beside the attention's, which are ``stream``;
    ``slices``: of the stream in each layer's backward, last layer first; ``experts``: of each layer, whose gradients
    are then summed over ``replicas``, if there are any. ``loss``: after the plan ran. ``watched``: the layers of which
    ``seen`` then holds what went into their MoE parts and came out, ``x``, ``y``, ``dy`` and ``dx``."""

    passages: Sequence[Way]
    stream: Stream

    def __init__(
        self,
        gpt: GPT,
        job: Job,
        passages: Sequence[Way],
        steer: Sequence[Callable[[torch.Tensor], torch.Tensor]],
        stream: Stream,
        slices: Sequence[GradientSlices],
        summed: Sequence[nn.Parameter],
        *,
        experts: Sequence[Sequence[nn.Parameter]] = (),
        replicas: dist.ProcessGroup | None = None,
        model_parallel: bool = False,
        watched: Collection[int] = (),
    ):
        self.watched, self.seen = watched, Held()
        self.gpt, self.job, self.passages, self.stream, self.slices = gpt, job, passages, stream, slices
        self.layers_of, self.summed, self.shares_attention = gpt.model.layers_of, summed, model_parallel
        self.experts, self.replicas, self.sums_replicas = experts, replicas, replicas is not None
        group, last = job.inner(0) if model_parallel else None, len(passages) - 1
        self.parts: list[DensePart] = []  # of all layers, as ``ways``
        self.ways: list[Way | FfnPart] = []
        for i, blocks in enumerate(self.layers_of):
            for block in blocks:
                of, has_experts = gpt.blocks[block], block == blocks[-1]
                made = partial(stream.fill, last - i) if block == blocks[0] else _nothing
                self.parts.append(DensePart(of, steer[i] if has_experts else _as_it_is, group, made))  # type: ignore[arg-type]
                self.ways.append(passages[i] if has_experts else FfnPart(of.moe))  # type: ignore[arg-type]
        self.layers = {block: i for i, block in enumerate(gpt.model.moe_layers)}  # MoE layer of a block
        self.embed, self.head = Segment(), Segment()
        self.loss: torch.Tensor

    def plan(
        self,
        tokens: torch.Tensor,
        loss: Callable[[torch.Tensor], torch.Tensor],
        update: Callable[[], object],
        after: Callable[[], None] | None = None,
        scale: float = 1.0,
    ) -> Plan:
        """tokens int64 [B, L]; ``loss``: logits [B, L, vocab] -> this rank's share; ``update``: the optimizer's;
        ``after``: what moves behind it; ``scale``: what gradients are multiplied by."""
        self.tokens, self.loss_of, self.update, self.after = tokens, loss, update, after
        self.moves, self.scale = after is not None, scale
        return self.lay_out()

    def work(self, task: str) -> Work:
        return Work(run=getattr(self, f"_{task}"))

    def dense_work(self, block: int, direction: Direction, task: str) -> Work:
        if task == "ffn":
            return Work(run=getattr(self.ways[block], direction))
        run = self.parts[block].run(direction, task)
        first, last = ("norm", "residual") if direction == "forward" else ("residual", "norm")
        if not self.shares_attention:
            first = last = task
        steps = [run]
        if task == first and (direction == "backward" or block):
            steps.insert(0, partial(getattr(self, f"_{direction}_into"), block))
        if task == last:
            steps.append(partial(getattr(self, f"_{direction}_out"), block))

        def run_all() -> None:
            for each in steps:
                each()

        return Work(run=run_all)

    def tail(self, of_stream: Work | None) -> Work:
        def run() -> None:
            if of_stream is not None and of_stream.run is not None:
                of_stream.run()
            sum_over(self.summed, self.job.world if self.job.num_ranks > 1 else None)
            for parameters in self.experts:
                sum_over(parameters, self.replicas)

        return Work(None if of_stream is None else of_stream.cost, run)

    # ------------------------------------------------------------------ tasks

    def _embedding(self) -> None:
        gpt, first = self.gpt, self.parts[0]

        def look_up(ids: torch.Tensor) -> torch.Tensor:
            return gpt.token(ids) + gpt.position.weight[: ids.shape[1]]

        first.residual, first.made = self.embed.forward(look_up, self.tokens), None

    def _head(self) -> None:
        gpt, loss, way, last = self.gpt, self.loss_of, self.passages[-1], len(self.ways) - 1

        def head(residual: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
            return loss(gpt.head(gpt.norm(residual + made.view_as(residual))))

        self._see(last, "y", way.y)
        share = self.head.forward(head, pop(self.parts[-1], "residual"), pop(way, "y"))
        self.loss = share.detach()
        self.parts[-1].dresidual, way.dy = self.head.backward(torch.full_like(share, self.scale))  # type: ignore[assignment]
        self._see(last, "dy", way.dy)

    def _embedding_back(self) -> None:
        self.embed.backward(pop(self.parts[0], "dresidual"))

    def _optimizer(self) -> None:
        self.stream.give_back()
        self.update()

    def _after_step(self) -> None:
        assert self.after is not None
        self.after()

    # ------------------------------------------------------------------ from part to part

    def _forward_into(self, block: int) -> None:
        """Into the attention of layer ``block``."""
        part, before, way = self.parts[block], self.parts[block - 1], self.ways[block - 1]
        self._see(block - 1, "y", way.y)
        part.residual, part.made = pop(before, "residual"), pop(way, "y")

    def _forward_out(self, block: int) -> None:
        way = self.ways[block]
        way.x = pop(self.parts[block], "x")
        self._see(block, "x", way.x)

    def _backward_into(self, block: int) -> None:
        way = self.ways[block]
        self._see(block, "dx", way.dx)
        self.parts[block].dx = pop(way, "dx")

    def _backward_out(self, block: int) -> None:
        if block:
            part, below, way = self.parts[block], self.parts[block - 1], self.ways[block - 1]
            below.dresidual, way.dy = pop(part, "dresidual"), pop(part, "dmade")
            self._see(block - 1, "dy", way.dy)

    def _see(self, block: int, name: str, tensor: torch.Tensor | None) -> None:
        layer = self.layers.get(block)
        if layer in self.watched and tensor is not None:
            self.seen[layer, name] = seen(tensor)


def _nothing() -> None:
    """Where no gradients are complete yet."""


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x
