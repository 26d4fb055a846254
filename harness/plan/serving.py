"""A forward pass of a GPT in inference on this rank: the tasks of ``harness.plan.step.ServingTasks``, run. With caches
the tokens are the next ones of their sequences: all of them (prefill), or one each (decode)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.handover import Handover, Held, seen
from harness.layer.gpt import GPT, Cache
from harness.plan.graph import COMPUTE, Plan, Timeline, Work
from harness.plan.passage import Direction, Way
from harness.plan.step import SHARED, ServingTasks

PARTS = ("attention", "experts", "all_to_all", "moe")  # whose times ``parts_s`` gives, layer by layer
ATTENTION = (*SHARED, "ffn")  # kinds of task that make up the first


class ServingStep(ServingTasks, Handover):
    """One pass. ``passages``: of the MoE layers; ``steer``: what stands before each; ``attention_s``: wait so long in
    place of each attention (None: compute it); ``group``: ranks over which its heads are shared out, all with as many
    sequences. ``logits`` [B, L, vocab]: after the plan ran. ``watched``: the layers of which ``seen`` then holds
    what went into their MoE parts and came out, ``x`` and ``y``."""

    passages: Sequence[Way]

    def __init__(
        self,
        gpt: GPT,
        passages: Sequence[Way],
        steer: Sequence[Callable[[torch.Tensor], torch.Tensor]],
        caches: Sequence[Cache] | None = None,
        attention_s: float | None = None,
        group: dist.ProcessGroup | None = None,
        watched: Collection[int] = (),
    ):
        self.watched, self.seen = watched, Held()
        self.gpt, self.passages, self.caches, self.attention_s = gpt, passages, caches, attention_s
        self.layers_of = gpt.model.layers_of
        self.layers = {block: i for i, block in enumerate(gpt.model.moe_layers)}  # MoE layer of a block
        self.steer = {block: steer[i] for block, i in self.layers.items()}
        self.x: torch.Tensor  # of a layer without experts, and what it makes of it
        self.y: torch.Tensor
        self.group, self.shares_attention = group, group is not None
        self.residual: torch.Tensor
        self.tokens: torch.Tensor
        self.logits: torch.Tensor

    def plan(self, tokens: torch.Tensor) -> Plan:
        """tokens int64 [B, L]."""
        self.tokens, self.begin = tokens, self.caches[0].length if self.caches else 0
        return self.lay_out()

    def work(self, task: str) -> Work:
        return Work(run=getattr(self, f"_{task}"))

    def dense_work(self, block: int, direction: Direction, task: str) -> Work:
        if task == "ffn":
            return Work(run=partial(self._ffn, block))
        if task == "mp-gather":
            return Work(run=self._gather)
        if task == "mp-scatter":
            return Work(run=self._scatter)
        if not self.shares_attention:
            return Work(run=partial(self._whole, block))
        parts = {"norm": self._enter, "attention": self._attend, "residual": self._leave}
        return Work(run=partial(parts[task], block))

    def _embedding(self) -> None:
        gpt, tokens = self.gpt, self.tokens
        self.residual = gpt.token(tokens) + gpt.position.weight[self.begin : self.begin + tokens.shape[1]]

    def _head(self) -> None:
        self._see(len(self.passages) - 1, "y", self.passages[-1].y)
        self.logits = self.gpt.head(self.gpt.norm(self.residual + self.passages[-1].y.view_as(self.residual)))

    def _whole(self, block: int) -> None:
        for part in (self._enter, self._attend, self._leave):
            part(block)

    def _ffn(self, block: int) -> None:
        self.y = self.gpt.blocks[block].moe(self.x)  # type: ignore[operator]

    def _enter(self, block: int) -> None:
        if block:
            before = self.layers.get(block - 1)
            y = self.y if before is None else self.passages[before].y
            if before is not None:
                self._see(before, "y", y)
            self.residual = self.residual + y.view_as(self.residual)
        self.own = self.gpt.blocks[block].attention_norm(self.residual)  # type: ignore[operator]

    def _gather(self) -> None:
        """own [B, L, M] of every rank of the node -> [ranks B, L, M]."""
        own = self.own.contiguous()
        self.own = own.new_empty(dist.get_world_size(self.group) * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(self.own, own, group=self.group)

    def _attend(self, block: int) -> None:
        if self.attention_s is None:
            self.own = self.gpt.blocks[block].attention(self.own, self.caches[block] if self.caches else None)  # type: ignore[operator]
        else:
            time.sleep(self.attention_s)

    def _scatter(self) -> None:
        """Partial sums own [ranks B, L, M] of every rank of the node -> [B, L, M], summed."""
        partial = self.own.contiguous()
        self.own = torch.empty_like(self.residual)
        dist.reduce_scatter_tensor(self.own, partial, group=self.group)

    def _leave(self, block: int) -> None:
        if self.attention_s is None:
            self.residual = self.residual + self.own
        x = self.gpt.blocks[block].moe_norm(self.residual).flatten(0, 1)  # type: ignore[operator]
        if block not in self.layers:
            self.x = x
            return
        layer = self.layers[block]
        self.passages[layer].x = self.steer[block](x)
        self._see(layer, "x", self.passages[layer].x)

    def _see(self, layer: int, name: str, tensor: torch.Tensor) -> None:
        if layer in self.watched:
            self.seen[layer, name] = seen(tensor)


def parts_s(timeline: Timeline, num_layers: int) -> dict[str, list[float]]:
    """Seconds of every MoE layer on this rank by ``PARTS``: its attention, with what gathers and scatters for it, and
    the dense layers before it; in its MoE part the computation of experts, what is done on links, and the whole from
    first start to last end. A layer of one opaque task has the first and last."""
    found: dict[str, list[float]] = {part: [0.0] * num_layers for part in PARTS}
    begin, end = np.full(num_layers, np.inf), np.full(num_layers, -np.inf)
    opaque = False
    for task, start, stop in zip(timeline.plan.tasks, timeline.start_s, timeline.end_s, strict=True):
        if not task.name.startswith("layer"):
            continue
        layer = int(task.name.split(".")[0].removeprefix("layer"))
        if task.kind in ATTENTION:
            found["attention"][layer] += stop - start
            continue
        begin[layer], end[layer] = min(begin[layer], start), max(end[layer], stop)
        opaque |= task.kind == "moe"
        if task.kind == "experts":
            found["experts"][layer] += stop - start
        elif task.lane != COMPUTE:
            found["all_to_all"][layer] += stop - start
    found["moe"] = (end - begin).tolist()
    return {part: of_layers for part, of_layers in found.items() if not opaque or part in ("attention", "moe")}
