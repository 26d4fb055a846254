"""Parm (Pan et al., INFOCOM 2024, arXiv 2407.00599): dedicated schedules for model, expert and expert-sharding
parallelism (MP, EP, ESP), whose experts are cut over the ranks of a node.

DeepSpeed-MoE's way, an interpretation (only the abstract was at hand, and what FSMoE's paper says of it): an all-gather
over the ranks of an expert (ESP), an all-to-all between nodes (EP) of all that was gathered, the experts, an all-reduce
over ESP, and all of it home, where a rank keeps its part.
Parm's S1 splits tokens over the ranks that hold the same ones (MP) ahead of the gate and merges the rest into one
all-to-all over EP and ESP: rows go straight to every rank of their expert's node, partial sums straight home, where
they are added up; an all-gather over MP follows. Its S2 splits behind the gate and hides that all-gather, then of
slots, behind the way home. By linear costs (alpha + beta n) it takes S1 or S2.

Its claim (abstract): 1.13 to 5.77 times as fast as DeepSpeed-MoE. Two exchanges for the state ``shards``: ``parm-s1``,
and ``parm-baseline``, what it is measured against.

Interpretations: a rank has tokens of its own here, as behind S1's split, and needs only these behind the layer: there
is nothing to split, nor to gather over MP. S2 differs only in where that is done, so it is S1 again, and nothing is to
be chosen. The baseline's all-gather stands for the tokens that ranks of a node have in common; its all-reduce is a
reduce-scatter and an all-gather. Backward walks the same way. Capacity slots are FSMoE's, of the fullest expert.

Not seen here: what ranks of MP do twice, which both schedules spare, with it much of the claim's range; and S2's
overlap. Between nodes S1 sends as many bytes as the baseline, a row to each rank of a node; ``slots`` sends it once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.comm.rows import accumulator
from harness.plan.cost import Cost, Even, InTurn, Operation
from harness.plan.slots import Options, Serial
from harness.system import Case
from methods.fsmoe.shards import Sharded
from methods.fsmoe.sizes import Sizes, sharded
from methods.fsmoe.slots import ALGORITHMS, CapacitySlots, SlotExchange


class Merged(SlotExchange):
    """One all-to-all over EP and ESP."""

    def there(self, parts: torch.Tensor) -> torch.Tensor:
        came = ALGORITHMS["flat"](self.job, parts.repeat_interleave(self.num_esp, 0))
        return came.unflatten(0, (self.num_ep, self.num_esp)).transpose(0, 1)

    def back(self, parts: torch.Tensor) -> torch.Tensor:
        by_rank = parts.unflatten(0, (self.num_esp, self.num_ep)).transpose(0, 1).flatten(0, 1)
        came = ALGORITHMS["flat"](self.job, by_rank).unflatten(0, (self.num_ep, self.num_esp))
        return came.sum(1, dtype=accumulator(came.dtype)).to(came.dtype)


class Gathered(SlotExchange):
    """All-gather inside the node, then all of that between nodes; home likewise, with sums."""

    def there(self, parts: torch.Tensor) -> torch.Tensor:
        return self._between_nodes(self._gather(parts)).transpose(0, 1)

    def back(self, parts: torch.Tensor) -> torch.Tensor:
        if self.esp_group is not None:
            own = parts.new_empty(self.num_ep, *parts.shape[1:])
            dist.reduce_scatter_tensor(own, parts, group=self.esp_group)
            parts = self._gather(own)
        return self._between_nodes(parts)[:, self.esp_index]

    def _gather(self, parts: torch.Tensor) -> torch.Tensor:
        """[num_ep, ...] -> [num_esp * num_ep, ...] of all ranks of the node."""
        if self.esp_group is None:
            return parts
        found = parts.new_empty(self.num_esp * len(parts), *parts.shape[1:])
        dist.all_gather_into_tensor(found, parts.contiguous(), self.esp_group)
        return found

    def _between_nodes(self, parts: torch.Tensor) -> torch.Tensor:
        """[num_esp * num_ep, ...] to every node -> [num_ep, num_esp, ...] from every one."""
        return self.across(parts.unflatten(0, (self.num_esp, self.num_ep)).transpose(0, 1).contiguous())


class GatheredSizes(Sizes):
    """All collectives of ``Gathered`` in one hop."""

    def hop(self, hop: int, operation: Operation, degree: int) -> Cost | None:
        whole = self.slot_bytes * self.num_local / degree
        across = () if self.stages == () else (Even("a2a", self.scope, whole),)  # of one node: nothing
        gather = (Even("ag", "intra", whole),) if self.num_local > 1 else ()
        reduce = (Even("rs", "intra", whole),) if self.num_local > 1 and operation == "rs" else ()
        return InTurn((*reduce, *gather, *across)) if gather or across else None


class OneHop(CapacitySlots):
    """Capacity slots whose hop inside the node is part of the one between nodes."""

    options: ClassVar[Options] = {}
    kind: ClassVar[type[SlotExchange]]

    def num_hops(self, case: Case) -> int:
        return 1

    def make(self, case: Case, job: Job) -> SlotExchange:
        return self.kind(job, case.placement, sharded(case), "flat")


class MergedSlots(OneHop):
    name = "parm-s1"
    title = "capacity slots: one all-to-all to all ranks of the expert's node, and one home"
    source = "arXiv 2407.00599, schedule S1"
    kind = Merged

    def links(self, case: Case) -> tuple[str, ...]:
        return ("a2a.flat",)

    def sent(self, sizes: Sizes) -> Sizes:
        whole = sizes.slot_bytes * sizes.num_local
        added = whole + sizes.slot_bytes
        return dataclasses.replace(sizes, slot_bytes=whole, num_local=1, scope="flat", stages=None, summed_bytes=added)


class GatheredSlots(OneHop):
    name = "parm-baseline"
    title = "capacity slots: gathered in the node, all of that between nodes; all-reduced there, and home"
    source = "DeepSpeed-MoE's schedule, an interpretation of arXiv 2407.00599"
    kind = Gathered

    def clashes(self, parts: Mapping[str, Any]) -> str | None:
        return None if isinstance(parts["schedule"], Serial) else "its collectives follow each other; take serial"

    def sent(self, sizes: Sizes) -> Sizes:
        return GatheredSizes(**vars(sizes))


class Parm(Sharded):
    name = "parm"
    title = "Parm's S1: rows straight to all shards of their experts, partial sums straight home"
    source = "arXiv 2407.00599, schedule S1 with tokens of a rank's own"
    exchange: ClassVar[CapacitySlots] = MergedSlots()
    recipe: ClassVar[dict[str, str]] = {"exchange": "parm-s1", "state": "shards"}


class Baseline(Sharded):
    name = "parm-baseline"
    title = "what Parm is measured against: gathered in the node, all of it between nodes, all-reduced, home"
    source = GatheredSlots.source
    exchange: ClassVar[CapacitySlots] = GatheredSlots()
    recipe: ClassVar[dict[str, str]] = {"exchange": "parm-baseline", "state": "shards"}


#: brought to recipes, by name
EXCHANGES = {"parm-s1": Parm.exchange, "parm-baseline": Baseline.exchange}
