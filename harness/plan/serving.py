"""A forward pass of a GPT in inference as one plan on this rank: embedding, every layer's attention and MoE part, head.

Attention is replicated (each rank has sequences of its own), experts are shared out. With caches the tokens are the
next ones of their sequences: all of them (prefill), or one each (decode).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from harness.layer.gpt import GPT, Cache
from harness.plan.graph import COMPUTE, Plan, Timeline, Work
from harness.plan.passage import Dense, Passage, forward_layer

PARTS = ("attention", "experts", "all_to_all", "moe")  # whose times ``parts_s`` gives, layer by layer


class ServingStep:
    """One pass. ``passages``: of the MoE layers; ``steer``: what stands before each; ``attention_s``: wait so long in
    place of each attention (None: compute it). ``logits`` [B, L, vocab]: after the plan ran."""

    def __init__(
        self,
        gpt: GPT,
        passages: Sequence[Passage],
        steer: Sequence[Callable[[torch.Tensor], torch.Tensor]],
        caches: Sequence[Cache] | None = None,
        attention_s: float | None = None,
    ):
        self.gpt, self.passages, self.steer, self.caches, self.attention_s = gpt, passages, steer, caches, attention_s
        self.residual: torch.Tensor
        self.logits: torch.Tensor

    def plan(self, tokens: torch.Tensor) -> Plan:
        """tokens int64 [B, L]."""
        plan, gpt = Plan(), self.gpt
        begin = self.caches[0].length if self.caches else 0

        def embed() -> None:
            self.residual = gpt.token(tokens) + gpt.position.weight[begin : begin + tokens.shape[1]]

        def head() -> None:
            self.logits = gpt.head(gpt.norm(self.residual + self.passages[-1].y.view_as(self.residual)))

        last = [plan.add("embedding", COMPUTE, run=embed)]
        for layer, way in enumerate(self.passages):
            dense = [Dense("attention", COMPUTE, Work(run=lambda layer=layer: self._attend(layer)))]  # type: ignore[misc]
            last = forward_layer(plan, way.forward, dense, prefix=f"layer{layer}.", after=last)
        plan.add("head", COMPUTE, last, run=head)
        return plan

    def _attend(self, layer: int) -> None:
        block = self.gpt.blocks[layer]
        if layer:
            self.residual = self.residual + self.passages[layer - 1].y.view_as(self.residual)
        if self.attention_s is None:
            cache = self.caches[layer] if self.caches else None
            self.residual = self.residual + block.attention(block.attention_norm(self.residual), cache)  # type: ignore[operator]
        else:
            time.sleep(self.attention_s)
        self.passages[layer].x = self.steer[layer](block.moe_norm(self.residual).flatten(0, 1))  # type: ignore[operator]


def parts_s(timeline: Timeline, num_layers: int) -> dict[str, list[float]]:
    """Seconds of every layer on this rank by ``PARTS``: its attention; in its MoE part the computation of experts, what
    is done on links, and the whole from first start to last end. A layer of one opaque task has the first and last."""
    found: dict[str, list[float]] = {part: [0.0] * num_layers for part in PARTS}
    begin, end = np.full(num_layers, np.inf), np.full(num_layers, -np.inf)
    opaque = False
    for task, start, stop in zip(timeline.plan.tasks, timeline.start_s, timeline.end_s, strict=True):
        if not task.name.startswith("layer"):
            continue
        layer = int(task.name.split(".")[0].removeprefix("layer"))
        if task.kind == "attention":
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
