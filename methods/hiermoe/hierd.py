"""HierD-AlltoAll (HierMoE, arXiv 2508.09591, section III): tokens cross each link level once per destination group.

The exchange is a list of stages, outermost link level first. At a stage every item (a token, or a copy of one)
goes once to each group in which it has an expert (the OR of eq. 7); which experts it needs there travels beside it as
metadata. The last stage ends on the experts' ranks. HD1 is one stage over all ranks, HD2 (Inter-level-1, Intra-level-1)
two stages: across nodes among ranks with equal local index, then inside the node.

Combine is the transpose: each stage sums the copies of an item in float32 before it sends one row on, so a node
returns one partial weighted sum per token. Backward of dispatch is combine's walk, backward of combine is dispatch's.

The tokens are cut into chunks; chunk c + 1 crosses the outer link while chunk c moves on inside (both are
communicators of their own), so the fast level hides under the slow one.

Interpretation: the paper leaves the wire format of the metadata open. Here each row carries the number of its experts
(1 byte), and each (row, expert) pair the expert's index inside the destination group (1 or 2 bytes) and its gate weight
(4 bytes; 8 in float64). Sizes are exact (all-to-all-v), not padded to max(p).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from harness.comm.exchange import Exchange
from harness.comm.job import Job
from harness.comm.rows import dot_rows, scale_rows
from harness.placement import Placement
from methods.hiermoe.plan import HierPlan, Returning


class HierExchange(Exchange):
    """HierD-AlltoAll with ``levels``: one inter stage per listed link level, then an intra stage below the last."""

    def __init__(self, job: Job, placement: Placement, levels: tuple[int, ...] = (0,), num_chunks: int = 4):
        super().__init__(job, placement)
        self.num_chunks = num_chunks
        topology = job.topology
        hops = [(job.rail(level), topology.rail(job.rank, level), level) for level in levels]
        hops.append((job.inner(levels[-1]), topology.inner_group(job.rank, levels[-1]), topology.num_levels - 1))
        owner = torch.as_tensor(placement.owner)
        #: per stage: group, unit index of every expert's rank within it, index of every expert inside that unit
        self.hops: list[tuple[dist.ProcessGroup, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for group, ranks, level in hops:
            if group is None:
                continue
            unit_of_rank = torch.as_tensor(topology.unit_of(level))
            position = torch.full((topology.num_units(level),), -1)
            position[unit_of_rank[ranks]] = torch.arange(len(ranks))
            unit = position[unit_of_rank[owner]]  # [E], -1: not below this hop's units
            self.hops.append((group, unit, *_index_inside(unit_of_rank[owner], int(unit_of_rank[job.rank]))))

    def plan(self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None) -> HierPlan:
        return HierPlan(self, ids, weights, kept)

    def dispatch(self, x: torch.Tensor, plan: HierPlan) -> torch.Tensor:
        return _Dispatch.apply(x, plan)

    def combine(self, rows: torch.Tensor, plan: HierPlan) -> torch.Tensor:
        return _Combine.apply(rows, plan.weights, plan)


def _spread(x: torch.Tensor, plan: HierPlan, use: Callable[[int, torch.Tensor], None]) -> None:
    """Tokens [T, M] -> one row per (token, expert rank) at the experts' ranks. ``use(chunk, rows)`` takes what has
    arrived while later chunks are still on the outer link."""
    parts = list(x.split(plan.chunk_items))
    works: list[dist.Work | None] = [None] * len(parts)
    num_stages = len(plan.exchange.hops)
    # The outer link first and never idle; behind it each chunk goes as far as it can before the next one.
    for chunk in range(len(parts) if num_stages else 0):
        parts[chunk], works[chunk] = plan.stages[0].out(chunk, parts[chunk])
    plan.complete()
    hops = [(stage, chunk) for stage in range(min(1, num_stages), num_stages + 1) for chunk in range(len(parts))]
    for stage, chunk in sorted(hops, key=lambda hop: (sum(hop), -hop[0])):
        _wait(works[chunk])
        if stage < num_stages:
            parts[chunk], works[chunk] = plan.stages[stage].out(chunk, parts[chunk])
        else:
            use(chunk, parts[chunk])


def _gather(make: Callable[[int], torch.Tensor], plan: HierPlan) -> torch.Tensor:
    """The transpose: ``make(chunk)`` gives the rows at the experts' ranks -> their sum per token [T, M], one partial
    sum per group and hop. A chunk's rows are made while earlier chunks are on their way."""
    num_chunks, last = len(plan.chunk_items), len(plan.stages) - 1
    parts: list[torch.Tensor] = [torch.empty(0)] * num_chunks
    works: list[dist.Work | None] = [None] * num_chunks

    def settle(stage: int, chunk: int) -> None:
        _wait(works[chunk])
        parts[chunk] = plan.stages[stage].spread[chunk].gather(parts[chunk])

    # The first chunk goes straight through, so that the outer link, the last to be entered, starts as early as can
    # be; the others are made one ahead of the inner links.
    hops = [(step, chunk) for step in range(max(1, last + 1)) for chunk in range(num_chunks)]
    for step, chunk in sorted(hops, key=lambda hop: (hop[1] > 0, sum(hop), hop[0])):
        if step == 0:
            parts[chunk] = make(chunk)
        else:
            settle(last - step + 1, chunk)
        if plan.stages:
            parts[chunk], works[chunk] = plan.stages[last - step].home(chunk, parts[chunk])
    if plan.stages:
        for chunk in range(num_chunks):
            settle(0, chunk)
    return torch.cat(parts)


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan):  # type: ignore[no-untyped-def, override]
        ctx.plan = plan
        rows: list[torch.Tensor] = []

        def use(chunk: int, part: torch.Tensor) -> None:
            if not rows:  # their number is known once the plan is complete
                rows.append(x.new_empty(plan.num_entries, x.shape[1]))
            reach = plan.reach[chunk]
            for entries, places in reach.runs:
                torch.index_select(part, 0, reach.rows.item[entries], out=rows[0][places])

        _spread(x, plan, use)
        return rows[0]

    @staticmethod
    def backward(ctx, drows):  # type: ignore[no-untyped-def, override]
        plan = ctx.plan
        return _gather(lambda chunk: plan.reach[chunk].rows.gather(drows), plan), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, plan):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(rows)
        ctx.plan, ctx.like = plan, weights
        return _gather(lambda chunk: plan.reach[chunk].rows.gather(rows, plan.reach[chunk].weight), plan)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        (rows,) = ctx.saved_tensors
        plan = ctx.plan
        drows = torch.empty_like(rows)
        dweight = plan.reach[0].weight.new_empty(plan.num_entries) if ctx.needs_input_grad[1] else None

        def use(chunk: int, part: torch.Tensor) -> None:
            reach = plan.reach[chunk]
            scaled = scale_rows(part, reach.rows.item, reach.weight)
            for entries, places in reach.runs:
                drows[places] = scaled[entries]
                if dweight is not None:
                    dweight[reach.entry[entries]] = dot_rows(part, reach.rows.item[entries], rows[places])

        _spread(dy, plan, use)
        if dweight is None:
            return drows, None, None
        plan.returning = Returning(dweight, plan)
        return drows, torch.zeros_like(ctx.like), None  # the true gradient is on its way to _Weights


def _index_inside(unit_of_expert: torch.Tensor, own_unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of every expert among those of its unit (by expert id), int64 [E]; and this unit's experts."""
    index = torch.empty_like(unit_of_expert)
    for unit in unit_of_expert.unique():
        members = (unit_of_expert == unit).nonzero().flatten()
        index[members] = torch.arange(len(members))
    return index, (unit_of_expert == own_unit).nonzero().flatten()
