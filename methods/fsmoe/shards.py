"""Expert-sharding parallelism (ESP) as a state of experts (arXiv 2501.10714, section 3.1): every expert is cut along
its FFN dimension over the ranks of a node, each of which computes its part of all rows of the node.

A layer alone stands for a generalized one (section 5): with stand-in compute there is a timed wait for its attention,
and ``gradient_bytes`` of a layer whose backward is done are all-reduced where the schedule puts them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from harness.comm.job import Job
from harness.comm.rows import accumulator
from harness.layer.experts import IdentityExperts
from harness.layer.gates import Gated
from harness.layer.order import ORDERS
from harness.layer.weights import Weights
from harness.plan.cost import Compute, Cost, Even, Hold, InTurn, Timed
from harness.plan.gradients import GradientBytes, Stream
from harness.plan.graph import COMPUTE, Work
from harness.plan.native import NativeLayer, NativePassage, NativeSystem
from harness.plan.passage import Dense, Direction
from harness.plan.priced import gate_work, mix_work, shared_work
from harness.plan.slots import Reach
from harness.specs import DTYPE_BYTES
from harness.system import Case, GradientSlices, System
from methods.fsmoe.chunks import Adaptive
from methods.fsmoe.sizes import LayerSizes, PricedSlots, Slices, SlotTasks, layer_sizes, planned_capacity, sharded
from methods.fsmoe.slots import CapacitySlots, SlotExchange, SlotTrip, one_of


class Shards(nn.Module):
    """This rank's shard of its EP group's experts: ``w1`` (and ``w3``) [E_ep, M, H / N_ESP], ``w2``
    [E_ep, H / N_ESP, M]."""

    def __init__(self, weights: Weights, exchange: SlotExchange):
        super().__init__()
        self.exchange, num_own = exchange, weights.model.num_experts // exchange.num_ep
        self.experts = range(exchange.ep_index * num_own, (exchange.ep_index + 1) * num_own)
        drawn = [weights.expert(e) for e in self.experts]
        self.names = ("w1", "w2", "w3") if weights.model.ffn_type == "swiglu" else ("w1", "w2")
        for name in self.names:
            whole = torch.stack([w[name] for w in drawn])
            shard = whole.chunk(exchange.num_esp, dim=1 if name == "w2" else 2)[exchange.esp_index].contiguous()
            self.register_parameter(name, nn.Parameter(shard.to(exchange.job.device)))

    def how(self) -> str:
        return "one batched GEMM over padded slots"

    def gradients(self) -> dict[int, dict[str, torch.Tensor]]:
        """Collective over the ESP group: whole gradients of its experts, put together from the shards."""
        found: dict[int, dict[str, torch.Tensor]] = {e: {} for e in self.experts}
        for name in self.names:
            parameter = getattr(self, name)
            own = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).contiguous()
            parts = [own]
            if self.exchange.esp_group is not None:
                parts = [torch.empty_like(own) for _ in range(self.exchange.num_esp)]
                dist.all_gather(parts, own, group=self.exchange.esp_group)
            whole = torch.cat(parts, dim=1 if name == "w2" else 2)
            for e, gradient in zip(self.experts, whole, strict=True):
                found[e][name] = gradient
        return found


class ShardedTasks(SlotTasks):
    """What stands beside the experts of a layer that runs alone: a dense part by ``of_layer``, and as ``stream``
    gradients of a layer whose backward is done, in the slices ``placed``."""

    of_layer: LayerSizes
    placed: GradientSlices
    stream: GradientBytes

    def dense(self, direction: Direction) -> list[Dense]:
        seconds = self.of_layer.dense_s[direction == "backward"]
        return [Dense("attention", COMPUTE, Work(Hold(seconds), partial(time.sleep, seconds)))] if seconds else []

    def slices(self) -> Slices:
        self.stream.taken = 0
        pairs = zip(self.placed.num_bytes, self.placed.messages, strict=True)
        return tuple(self.stream.take("gradients", *each, after_part=1) for each in pairs)  # type: ignore[return-value]


class ShardedLayer(NativeLayer):
    exchange_: SlotExchange

    def __init__(self, system: type[Sharded], case: Case, job: Job, weights: Weights):
        super().__init__(system, case, job, weights)
        self.case, self.placed = case, system.placed(case)
        self.order, self.restore = ORDERS[one_of(case, "order", "tutel", "gshard")]
        count = sum(self.placed.num_bytes) // case.torch_dtype.itemsize
        gradient = nn.Parameter(torch.empty(1, dtype=case.torch_dtype, device=job.device).expand(count))
        self.stream = Stream([[gradient]], job.rail(0), "inter")
        self._sizes: dict[int, LayerSizes] = {}

    @property
    def sizes(self) -> LayerSizes:
        """Of the case's own routing as it is cut now."""
        multiple = self.cut.pieces
        if multiple not in self._sizes:
            self._sizes[multiple] = layer_sizes(self.case, planned_capacity(self.case, self.case.routing, multiple))
        return self._sizes[multiple]

    def passage(self, gated: Gated | None = None) -> ShardedPassage:
        return ShardedPassage(self, gated)


class ShardedPassage(ShardedTasks, NativePassage):
    """Forward and backward may be cut differently, because what forward keeps lies in whole buffers that backward
    slices again: rows [E_ep, N, C, M] and pre-activations [E_ep, N, C, H / N_ESP] of all N ranks' slots."""

    layer: ShardedLayer
    there: SlotTrip
    back: SlotTrip

    def __init__(self, layer: ShardedLayer, gated: Gated | None):
        super().__init__(layer, gated)
        self.of_layer, self.placed, self.stream = layer.sizes, layer.placed, layer.stream
        self.shards = tuple(layer.experts.parameters())
        self.kept_rows: list[torch.Tensor] = []
        self.dshards: list[torch.Tensor] = []

    # ------------------------------------------------------------------ gate and mix

    def order(self, x: torch.Tensor, gated: Gated) -> torch.Tensor:
        self.slots = self.layer.exchange_.assign(gated.ids, gated.kept, self.cut.pieces)
        return self.layer.order(x, self.slots)

    def restore(self, home: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.layer.restore(home, weights, self.slots)

    def _enter(self, x: torch.Tensor) -> Any:
        return super()._enter(x if self.gated else self.layer.exchange_.hooks.before_moe_start(x))

    def _leave(self, *came: Any) -> torch.Tensor:
        y = super()._leave(*came)
        return y if self.gated else self.layer.exchange_.hooks.before_moe_end(y)

    def arrive_back(self) -> torch.Tensor:
        for shard, gradient in zip(self.shards, self.dshards, strict=True):
            gradient = gradient.to(shard.dtype)
            shard.grad = gradient if shard.grad is None else shard.grad + gradient
        return super().arrive_back()

    # ------------------------------------------------------------------ experts

    def forward_experts(self, batch: int) -> None:
        self._compute("forward", self.there, batch, self._made)

    def backward_experts(self, batch: int) -> None:
        if not self.dshards:
            self.dshards = [torch.zeros_like(shard, dtype=accumulator(shard.dtype)) for shard in self.shards]
        self._compute("backward", self.back, batch, self._made_back)

    @torch.no_grad()
    def _compute(self, direction: Direction, trip: SlotTrip, batch: int, make: Any) -> None:
        for chunk in range(trip.degree) if self.cut.whole else (batch,):
            arrived, sizes = trip.arrived(chunk), getattr(self.of_layer, direction)
            if sizes.wait_s is not None:  # values mean nothing
                time.sleep(sizes.chunk_wait_s(trip.degree))
                trip.give(chunk, arrived)
            elif not self.shards:  # identity: the shards' sum is the row again
                trip.give(chunk, arrived / arrived.shape[1])
            else:
                trip.give(chunk, make(trip.slots(chunk), arrived.flatten(1, 2)).view(arrived.shape))

    def _made(self, chunk: slice, rows: torch.Tensor) -> torch.Tensor:
        """rows [E_ep, N, c, M] of the slots ``chunk`` -> as many [E_ep, N c, M]: this shard's partial sums."""
        w1, w2, *w3 = self.shards
        if not self.kept_rows:
            shape, widths = (*rows.shape[:2], self.slots.padded), (rows.shape[3], *(w.shape[2] for w in (w1, *w3)))
            self.kept_rows = [rows.new_empty(*shape, width) for width in widths]
        pre = [rows.flatten(1, 2) @ w for w in (w1, *w3)]
        for kept, values in zip(self.kept_rows, (rows, *pre), strict=True):
            kept[:, :, chunk] = values.view(*rows.shape[:3], -1)
        return activate(pre) @ w2

    def _made_back(self, chunk: slice, rows: torch.Tensor) -> torch.Tensor:
        """The same of gradients; those of the shards are summed over chunks."""
        w1, w2, *w3 = self.shards
        dw1, dw2, *dw3 = self.dshards
        dy = rows.flatten(1, 2)  # [E_ep, N c, M]
        x, *pre = (kept[:, :, chunk].flatten(1, 2) for kept in self.kept_rows)
        with torch.enable_grad():
            hidden = activate([each.requires_grad_() for each in pre])
        dpre = torch.autograd.grad(hidden, pre, dy @ w2.mT)
        dw2 += hidden.detach().mT @ dy
        dx = torch.zeros_like(dy)
        for w, dw, d in zip((w1, *w3), (dw1, *dw3), dpre, strict=True):
            dw += x.mT @ d
            dx += d @ w.mT
        return dx


def activate(pre: Sequence[torch.Tensor]) -> torch.Tensor:
    """gpt: gelu of the one; swiglu: silu of the first times the second."""
    return F.gelu(pre[0]) if len(pre) == 1 else F.silu(pre[0]) * pre[1]


class PricedShards(ShardedTasks, PricedSlots):
    def __init__(self, system: type[Sharded], case: Case, of_layer: LayerSizes):
        self.case, self.schedule, self.cut, self.of_layer = case, system.schedule, system.cut(case), of_layer
        self.num_hops, self.placed = system.exchange.num_hops(case), system.placed(case)
        self.share(case)
        self.stream = GradientBytes([sum(self.placed.num_bytes)], DTYPE_BYTES[case.dtype], "inter")
        self.sizes = {"forward": of_layer.forward, "backward": of_layer.backward}

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        if task not in ("gate", "shared", "restore"):
            return super().work(direction, task, part)
        if task == "shared":
            return Work(shared_work(self.case, direction))
        if task == "restore":
            return Work(mix_work(self.case))
        gate = gate_work(self.case, direction)
        if direction == "backward":
            return Work(gate)
        row_bytes = self.case.model.hidden * DTYPE_BYTES[self.case.dtype]
        tokens = np.asarray(self.case.routing.tokens, dtype=np.float64)
        order = Compute(np.zeros(len(tokens)), 1, row_bytes * tokens + self.of_layer.forward.slot_bytes)
        return Work(InTurn(tuple(cost for cost in (gate, self._agreement(), order) if cost is not None)))

    def _agreement(self) -> Cost:
        """All ranks meet to agree on a capacity, 8 bytes. What that takes is left out where a cluster states costs, but
        none of this."""
        known = {} if self.case.cluster is None else self.case.cluster.collectives
        return Timed("ar", "flat", 0.0) if known and "ar.flat" not in known else Even("ar", "flat", 8.0)


class Sharded(NativeSystem):
    """Each rank of a node holds a part of every expert of the node."""

    title = "each rank of a node holds a part of all its experts, cut along the FFN"
    source = "arXiv 2501.10714, section 3.1: expert-sharding parallelism"
    takes: ClassVar[Reach] = "node"
    exchange: ClassVar[CapacitySlots] = CapacitySlots()
    options: ClassVar[dict[str, str]] = {
        "experts": "sharded (over the ranks of a node, as the paper assumes) or whole (one rank each); default sharded",
        "order": "gshard (matrix products) or tutel (copied rows); default tutel",
        "gradient_bytes": "gradients to all-reduce between nodes in backward (default: 0; with stand-in compute, where "
        "a layer has an attention too, those of one attention)",
    }

    @classmethod
    def clashes(cls, parts: Any) -> str | None:
        if issubclass(parts["placement"], System):
            return "its experts are cut over their node and do not move; leave the placement out"
        return None

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        ranks = case.topology.num_ranks // case.topology.shape[0]
        if sharded(case) and case.model.ffn % ranks:
            return f"ffn = {case.model.ffn} does not divide over the {ranks} ranks of a node that share an expert"
        return super().refuse(case)

    @classmethod
    def placed(cls, case: Case) -> GradientSlices:
        """Slices of the gradients of a layer alone."""
        if isinstance(cls.schedule, Adaptive):
            return cls.schedule.decide(case, cls.exchange)[1]
        return GradientSlices((0, 0, layer_sizes(case, 1).gradient_bytes))

    @classmethod
    def experts(cls, case: Case, job: Job, weights: Weights) -> Shards | IdentityExperts:
        if case.stand_in:  # which needs no weights
            return IdentityExperts()
        return Shards(weights, cls.exchange.make(case, job))

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> ShardedLayer:
        one_of(case, "experts", "sharded", "whole")
        return ShardedLayer(cls, case, job, weights)

    @classmethod
    def layout(cls, case: Case) -> PricedShards:
        routing = cls.planned_routing(case) or case.routing
        return PricedShards(cls, case, cls.exchange.sizes(case, planned_capacity(case, routing, cls.cut(case).pieces)))

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        """The gradient all-reduce between nodes is a ring: each rank sends its buffer 2 (nodes - 1) / nodes times to
        the next."""
        parts, (nodes, *_), num_ranks = super().planned_bytes(case), case.topology.shape, case.topology.num_ranks
        if parts is None:
            return None
        gradients, ranks = np.zeros((num_ranks, num_ranks)), np.arange(num_ranks)
        if nodes > 1:
            each = sum(cls.placed(case).num_bytes) * 2 * (nodes - 1) / nodes
            gradients[ranks, np.roll(ranks, -num_ranks // nodes)] = each
        return {**parts, "gradients": gradients}
