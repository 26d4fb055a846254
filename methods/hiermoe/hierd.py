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

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.exchange import Exchange, all_to_all
from harness.comm.job import Job
from harness.comm.rows import Spread, accumulator, dot_rows
from harness.placement import Placement
from harness.routing.types import Routing
from harness.topology import Topology


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """(item, expert, weight) triples: which experts an item on this rank still has to reach."""

    item: torch.Tensor  # int64 [Q]
    expert: torch.Tensor  # int64 [Q]
    weight: torch.Tensor  # [Q], float32 (float64 for float64)


@dataclasses.dataclass(eq=False)
class Stage:
    """One planned hop of all chunks over ``group``."""

    group: dist.ProcessGroup
    spread: list[Spread]  # per chunk: row sent -> item of the chunk
    send_rows: list[list[int]]  # per chunk, per unit
    receive_rows: list[list[int]]
    wire_order: torch.Tensor  # int64 [Q]: entry at each place of the metadata sent
    send_entries: list[int]
    receive_entries: list[int]

    def out(self, chunk: int, items: torch.Tensor) -> tuple[torch.Tensor, dist.Work]:
        """Start sending the items of a chunk to every group that needs them."""
        rows = self.spread[chunk].spread(items)
        return all_to_all(rows, self.send_rows[chunk], self.receive_rows[chunk], self.group, async_op=True)

    def home(self, chunk: int, rows: torch.Tensor) -> tuple[torch.Tensor, dist.Work]:
        """Start returning the rows of a chunk; ``spread[chunk].gather`` sums what comes back."""
        return all_to_all(rows, self.receive_rows[chunk], self.send_rows[chunk], self.group, async_op=True)


@dataclasses.dataclass(eq=False)
class HierPlan:
    counts: torch.Tensor  # int64 [E_local]
    stages: list[Stage]
    chunk_items: list[int]  # tokens of every chunk
    reach: list[Spread]  # per chunk: (row, expert) entry -> row that arrived; its place: the expert order
    weight: list[torch.Tensor]  # per chunk: gate weight of each of its entries
    arrival: torch.Tensor  # int64 [Q]: entries in the order of arrival -> index into the chunks' entries, joined
    choice: torch.Tensor  # int64: flat index into [T, k] of every first entry


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
        num_tokens, k = ids.shape
        choice = torch.arange(num_tokens * k, device=ids.device)
        if kept is not None:
            choice = choice[kept.flatten()]
        weight = weights.flatten()[choice].to(accumulator(weights.dtype))
        entries = Entries(choice // k, ids.flatten()[choice], weight)
        bounds = [num_tokens * c // self.num_chunks for c in range(self.num_chunks + 1)]
        chunk_items = [b - a for a, b in itertools.pairwise(bounds)]

        stages, items = [], chunk_items
        for hop in self.hops:
            stage, entries, items = _plan_stage(*hop, entries, items)
            stages.append(stage)

        local = torch.as_tensor(self.placement.local(self.job.rank), device=ids.device)
        local_index = torch.searchsorted(local, entries.expert)
        counts = torch.bincount(local_index, minlength=len(local)).cpu()
        place = torch.empty_like(local_index)  # of every entry in the order of experts
        place[local_index.argsort(stable=True)] = torch.arange(len(place), device=ids.device)
        by_row = entries.item.argsort(stable=True)  # so that a chunk's entries are neighbours
        arrival = torch.empty_like(by_row)
        arrival[by_row] = torch.arange(len(by_row), device=ids.device)
        row, place, weight = entries.item[by_row], place[by_row], entries.weight[by_row]
        reach, chunk_weight, first = [], [], 0
        for num_rows in items:
            mine = slice(*torch.searchsorted(row, torch.tensor([first, first + num_rows], device=row.device)).tolist())
            reach.append(Spread(row[mine] - first, num_rows, place[mine]))
            chunk_weight.append(weight[mine])
            first += num_rows
        return HierPlan(counts, stages, chunk_items, reach, chunk_weight, arrival, choice)

    def dispatch(self, x: torch.Tensor, plan: HierPlan) -> torch.Tensor:
        return _Dispatch.apply(x, plan)

    def combine(self, rows: torch.Tensor, weights: torch.Tensor, plan: HierPlan) -> torch.Tensor:
        return _Combine.apply(rows, weights, plan)


def _spread(x: torch.Tensor, plan: HierPlan, use: Callable[[int, torch.Tensor], None]) -> None:
    """Tokens [T, M] -> one row per (token, expert rank) at the experts' ranks. ``use(chunk, rows)`` takes what has
    arrived while later chunks are still on the outer link."""
    parts = list(x.split(plan.chunk_items))
    works: list[dist.Work | None] = [None] * len(parts)
    num_stages = len(plan.stages)
    hops = [(stage, chunk) for stage in range(num_stages + 1) for chunk in range(len(parts))]
    # The outer link first and never idle; behind it each chunk goes as far as it can before the next one.
    hops.sort(key=lambda hop: (hop[0] > 0, sum(hop), -hop[0]) if hop[0] else (False, hop[1], 0))
    for stage, chunk in hops:
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

    # One chunk ahead on each inner link, so that the outer link, the last to be entered, is fed as early as can be.
    hops = [(step, chunk) for step in range(max(1, last + 1)) for chunk in range(num_chunks)]
    for step, chunk in sorted(hops, key=lambda hop: (sum(hop), hop[0])):
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
        rows = x.new_empty(len(plan.arrival), x.shape[1])
        _spread(x, plan, lambda chunk, part: plan.reach[chunk].spread(part, out=rows))
        return rows

    @staticmethod
    def backward(ctx, drows):  # type: ignore[no-untyped-def, override]
        plan = ctx.plan
        return _gather(lambda chunk: plan.reach[chunk].gather(drows), plan), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, plan):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(rows)
        ctx.plan, ctx.weights = plan, (weights.shape, weights.dtype)
        return _gather(lambda chunk: plan.reach[chunk].gather(rows, plan.weight[chunk]), plan)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        (rows,) = ctx.saved_tensors
        plan = ctx.plan
        drows = torch.empty_like(rows)
        dweights: list[torch.Tensor] = [torch.empty(0)] * len(plan.reach)

        def use(chunk: int, part: torch.Tensor) -> None:
            reach = plan.reach[chunk]
            entries = reach.spread(part)
            dweights[chunk] = dot_rows(entries, rows.index_select(0, reach.place))
            drows[reach.place] = entries.mul_(plan.weight[chunk].unsqueeze(-1).to(entries.dtype))

        _spread(dy, plan, use)
        return drows, _return_weight_gradients(torch.cat(dweights), plan, *ctx.weights), None


def _return_weight_gradients(
    dweight: torch.Tensor, plan: HierPlan, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """Gradients of the gate weights, by entry, back along the metadata's way to their tokens [T, k]."""
    arrived = dweight[plan.arrival]
    for stage in reversed(plan.stages):
        returned, _ = all_to_all(arrived, stage.receive_entries, stage.send_entries, stage.group)
        arrived = torch.empty_like(returned)
        arrived[stage.wire_order] = returned
    out = torch.zeros(shape.numel(), dtype=dtype, device=dweight.device)
    out[plan.choice] = arrived.to(dtype)
    return out.view(shape)


# --- planning one stage: who needs what, and the metadata that says so ---------------------------------------------


def _plan_stage(
    group: dist.ProcessGroup,
    unit: torch.Tensor,
    index_inside: torch.Tensor,
    own_experts: torch.Tensor,
    entries: Entries,
    chunk_items: list[int],
) -> tuple[Stage, Entries, list[int]]:
    """Collective over ``group``: deduplicate, exchange metadata; returns the stage, the entries that arrived here,
    and the items of every chunk that will."""
    size, num_chunks, device = group.size(), len(chunk_items), entries.item.device
    starts = np.concatenate([[0], np.cumsum(chunk_items)])
    num_items = int(starts[-1])
    chunk_of_item = torch.as_tensor(np.repeat(np.arange(num_chunks), chunk_items), device=device)

    # Rows to send, once per (item, unit), ordered by (chunk, unit, item).
    target = unit.to(device)[entries.expert]
    needed = torch.zeros(num_items, size, dtype=torch.bool, device=device)
    needed[entries.item, target] = True
    row_item, row_unit = needed.nonzero(as_tuple=True)
    order = (chunk_of_item[row_item] * size + row_unit).argsort(stable=True)
    row_item, row_unit = row_item[order], row_unit[order]
    send_rows = torch.bincount(chunk_of_item[row_item] * size + row_unit, minlength=num_chunks * size)
    send_rows = send_rows.view(num_chunks, size)
    spreads = []
    for chunk, part in enumerate(row_item.split(send_rows.sum(1).tolist())):
        spreads.append(Spread(part - int(starts[chunk]), chunk_items[chunk]))

    # Metadata to send, ordered by (unit, chunk, item): an all-to-all is cut by unit.
    wire_order = ((target * num_chunks + chunk_of_item[entries.item]) * max(1, num_items) + entries.item).argsort(
        stable=True
    )
    per_row = torch.zeros(num_items * size, dtype=torch.int64, device=device)
    per_row.index_add_(0, entries.item * size + target, torch.ones_like(target))
    per_row = per_row[row_item * size + row_unit]
    by_unit = row_unit.argsort(stable=True)
    send_entries = torch.bincount(target, minlength=size)
    table = torch.cat([send_rows.t(), send_entries[:, None]], dim=1).to(torch.int32).contiguous()  # [size, C + 1]
    received_table, _ = all_to_all(table, [1] * size, [1] * size, group)
    received_table = received_table.long().cpu()
    receive_rows, receive_entries = received_table[:, :num_chunks], received_table[:, num_chunks]

    index_dtype = torch.uint8 if len(own_experts) <= 256 else torch.int16
    columns = [
        (per_row[by_unit].to(torch.uint8), send_rows.sum(0), receive_rows.sum(1)),
        (index_inside.to(device)[entries.expert[wire_order]].to(index_dtype), send_entries, receive_entries),
        (entries.weight[wire_order], send_entries, receive_entries),
    ]
    experts_of_row, index, weight = _exchange_columns(columns, group)

    # Rows arrive by (chunk, source, row) but their metadata by (source, chunk, row).
    segment_start = torch.empty(num_chunks * size, dtype=torch.int64)
    in_data_order = receive_rows.t().flatten()  # (chunk, source)
    segment_start = (in_data_order.cumsum(0) - in_data_order).view(num_chunks, size).t().flatten()
    segments = receive_rows.flatten()  # (source, chunk)
    first = (segments.cumsum(0) - segments).repeat_interleave(segments)
    place = torch.arange(int(segments.sum())) - first + segment_start.repeat_interleave(segments)
    item = place.to(device).repeat_interleave(experts_of_row.long())
    arrived = Entries(item, own_experts.to(device)[index.long()], weight)
    stage = Stage(
        group,
        spreads,
        send_rows.tolist(),
        receive_rows.t().tolist(),
        wire_order,
        send_entries.tolist(),
        receive_entries.tolist(),
    )
    return stage, arrived, [int(rows) for rows in receive_rows.sum(0)]


def _exchange_columns(
    columns: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Send several columns (values, counts to each unit, counts from each unit) in one all-to-all of bytes."""
    size = group.size()
    pieces = [values.split(send.tolist()) for values, send, _ in columns]
    packed = torch.cat([pieces[c][u].contiguous().view(torch.uint8) for u in range(size) for c in range(len(columns))])
    widths = [values.element_size() for values, _, _ in columns]
    send_bytes = [sum(int(columns[c][1][u]) * widths[c] for c in range(len(columns))) for u in range(size)]
    receive_bytes = [sum(int(columns[c][2][u]) * widths[c] for c in range(len(columns))) for u in range(size)]
    received, _ = all_to_all(packed, send_bytes, receive_bytes, group)
    fields = [int(columns[c][2][u]) * widths[c] for u in range(size) for c in range(len(columns))]
    split = received.split(fields)
    out = []
    for c, (values, _, _) in enumerate(columns):
        joined = torch.cat([split[u * len(columns) + c] for u in range(size)])
        out.append(joined.view(values.dtype))
    return out


def _index_inside(unit_of_expert: torch.Tensor, own_unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of every expert among those of its unit (by expert id), int64 [E]; and this unit's experts."""
    index = torch.empty_like(unit_of_expert)
    for unit in unit_of_expert.unique():
        members = (unit_of_expert == unit).nonzero().flatten()
        index[members] = torch.arange(len(members))
    return index, (unit_of_expert == own_unit).nonzero().flatten()


# --- what it will send, from the routing alone ----------------------------------------------------------------------


def hier_bytes(
    routing: Routing,
    placement: Placement,
    topology: Topology,
    row_bytes: int,
    weight_bytes: int,
    levels: tuple[int, ...] = (0,),
    num_chunks: int = 4,
) -> dict[str, np.ndarray]:
    """Planned bytes [num_ranks, num_ranks] from -> to, by part (see ``System.planned_bytes``), O(D T k log)."""
    num_ranks = topology.num_ranks
    owner = placement.owner[routing.ids]  # [T, k]
    token = np.broadcast_to(np.arange(len(owner))[:, None], owner.shape)
    holder = np.broadcast_to(routing.source[:, None], owner.shape)
    rows = np.zeros((num_ranks, num_ranks))
    entries, tables, index_bytes = np.zeros_like(rows), np.zeros_like(rows), np.zeros_like(rows)
    coordinates = topology.coordinates
    for level in (*levels, None):
        if level is None:
            unit_level, target = topology.num_levels - 1, owner
        else:
            unit_level = level
            place = coordinates[holder].copy()
            place[..., level] = coordinates[owner][..., level]
            target = np.ravel_multi_index(np.moveaxis(place, -1, 0), topology.shape)
        for rank in range(num_ranks):
            peers = topology.rail(rank, level) if level is not None else topology.inner_group(rank, levels[-1])
            tables[rank, peers] += 4.0 * (num_chunks + 1)
        experts_of_unit = np.bincount(topology.unit_of(unit_level)[placement.owner])
        width = np.where(experts_of_unit[topology.unit_of(unit_level)] <= 256, 1.0, 2.0)  # per receiving rank
        sent = np.zeros_like(rows)
        np.add.at(sent, (holder.ravel(), target.ravel()), 1.0)
        entries += sent
        index_bytes += sent * width[None, :]
        _, first = np.unique(token.ravel() * num_ranks + target.ravel(), return_index=True)
        np.add.at(rows, (holder.ravel()[first], target.ravel()[first]), 1.0)
        holder = target
    parts = {
        "metadata": tables + rows + index_bytes + entries * weight_bytes,
        "dispatch": rows * row_bytes,
        "combine": rows.T * row_bytes,
        "combine_grad": rows * row_bytes,
        "dispatch_grad": rows.T * row_bytes,
        "metadata_grad": entries.T * weight_bytes,
    }
    for matrix in parts.values():
        np.fill_diagonal(matrix, 0)
    return parts
