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
(4 bytes; 8 in float64). Sizes are exact (all-to-all-v), or padded to max(p) as the paper's are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from harness.comm.exchange import Exchange, all_to_all
from harness.comm.job import Job
from harness.comm.rows import dot_rows, scale_rows
from harness.placement import Placement
from harness.topology import Topology
from methods.hiermoe.counts import Counts, needed, stages
from methods.hiermoe.plan import HierPlan, Hop, Returning, Waits
from methods.hiermoe.planner import PlannerModel


class HierExchange(Exchange):
    """HierD-AlltoAll. ``dimension``: d of HDd, 1 (all ranks at once) to the number of link levels; or by what every
    routing chooses its own. ``deduplicate``: no for the paper's Hd, which send every (token, expert) pair. ``padded``:
    as the paper's sizes, all messages of a stage as long as its longest; else as they are."""

    def __init__(
        self,
        job: Job,
        placement: Placement,
        dimension: int | PlannerModel = 2,
        *,
        num_chunks: int = 4,
        deduplicate: bool = True,
        padded: bool = False,
        row_bytes: float = 1.0,
    ):
        super().__init__(job, placement)
        self.num_chunks, self.deduplicate, self.padded, self.row_bytes = num_chunks, deduplicate, padded, row_bytes
        self.dimension = dimension
        self.used = dimension if isinstance(dimension, int) else 1  # of the last routing
        self.place(placement)

    def place(self, placement: Placement) -> None:
        """Experts are where ``placement`` says from now on."""
        self.placement = placement
        num_levels = self.job.topology.num_levels
        wanted = range(1, num_levels + 1) if isinstance(self.dimension, PlannerModel) else [self.dimension]
        #: per dimension that may be used, its stages
        self.hops = {d: self._chain(d) for d in wanted}

    def choose(self, ids: torch.Tensor, kept: torch.Tensor | None) -> int:
        """d of this routing; collective where it is chosen: every rank tells all how many of its tokens go where."""
        if not isinstance(self.dimension, PlannerModel):
            return self.dimension
        topology, num_ranks = self.job.topology, self.job.num_ranks
        taken = None if kept is None else kept.cpu().numpy()
        own = _own_counts(ids.cpu().numpy(), taken, self.placement.owner, topology)
        mine = torch.as_tensor(own.astype(np.int32), device=self.job.device).expand(num_ranks, -1)
        group = self.job.world if num_ranks > 1 else None
        every, _ = all_to_all(mine, [1] * num_ranks, [1] * num_ranks, group)
        edges = np.cumsum([topology.num_units(level) for level in range(topology.num_levels)])
        tables = tuple(np.split(every.cpu().numpy().astype(np.int64), edges[:-1], axis=1))
        counts = Counts(topology, tables, tables)
        self.used = self.dimension.best(counts, self.row_bytes, padded=self.padded, chunks=self.num_chunks)
        return self.used

    def _chain(self, dimension: int) -> list[Hop]:
        job, topology, found = self.job, self.job.topology, []
        owner = torch.as_tensor(self.placement.owner)
        for stage in stages(dimension, topology.num_levels):
            level = stage.b - 1
            if stage.b < topology.num_levels:
                group, ranks = job.rail(level), topology.rail(job.rank, level)
            elif stage.a:
                group, ranks = job.inner(stage.a - 1), topology.inner_group(job.rank, stage.a - 1)
            else:
                group, ranks = (job.world if job.num_ranks > 1 else None), list(range(job.num_ranks))
            if group is None:
                continue
            unit_of_rank = torch.as_tensor(topology.unit_of(level))
            position = torch.full((topology.num_units(level),), -1)
            position[unit_of_rank[ranks]] = torch.arange(len(ranks))
            unit = position[unit_of_rank[owner]]  # [E], -1: not below this stage's units
            found.append(Hop(group, unit, *_index_inside(unit_of_rank[owner], int(unit_of_rank[job.rank]))))
        return found

    def plan(self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None) -> HierPlan:
        return HierPlan(self, ids, weights, kept)

    def dispatch(self, x: torch.Tensor, plan: HierPlan) -> torch.Tensor:
        return _Dispatch.apply(x, plan)

    def combine(self, rows: torch.Tensor, plan: HierPlan) -> torch.Tensor:
        return _Combine.apply(rows, plan.weights, plan)


def _spread(x: torch.Tensor, plan: HierPlan, use: Callable[[int, torch.Tensor], None]) -> None:
    """Tokens [T, M] -> one row per (token, expert rank) at the experts' ranks. ``use(chunk, rows)`` takes what has
    arrived while later chunks are still on the outer link."""
    items = x if plan.copies is None else plan.copies.spread(x)
    parts = list(items.split(plan.chunk_items))
    works: list[Waits | None] = [None] * len(parts)
    num_stages = len(plan.hops)
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
    works: list[Waits | None] = [None] * num_chunks

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
    items = torch.cat(parts)
    return items if plan.copies is None else plan.copies.gather(items)


def _wait(work: Waits | None) -> None:
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


def _own_counts(ids: np.ndarray, kept: np.ndarray | None, owner: np.ndarray, topology: Topology) -> np.ndarray:
    """Of this rank's tokens: how many need each unit of each level, int64 [sum of U_i]."""
    parts = []
    for level in range(topology.num_levels):
        unit = topology.unit_of(level)[owner][ids]
        parts.append(needed(unit if kept is None else np.where(kept, unit, -1), topology.num_units(level)).sum(0))
    return np.concatenate(parts)


def _index_inside(unit_of_expert: torch.Tensor, own_unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of every expert among those of its unit (by expert id), int64 [E]; and this unit's experts."""
    index = torch.empty_like(unit_of_expert)
    for unit in unit_of_expert.unique():
        members = (unit_of_expert == unit).nonzero().flatten()
        index[members] = torch.arange(len(members))
    return index, (unit_of_expert == own_unit).nonzero().flatten()
