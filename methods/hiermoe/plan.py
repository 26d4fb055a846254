"""Planning HierD-AlltoAll: who needs what at every stage, and the metadata that says so.

Planning is lazy: the first stage is planned before its rows leave, the others while they travel. The metadata's way
back, with the gradients of the gate weights, is here too.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.exchange import all_to_all
from harness.comm.rows import Spread, accumulator, stable_order

if TYPE_CHECKING:
    from methods.hiermoe.hierd import HierExchange


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """(item, expert, weight) triples, by item: which experts an item on this rank still has to reach."""

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
    arrival: torch.Tensor  # int64 [Q']: entry (by item) of each that arrives
    padded_rows: list[int] | None  # per chunk: to every unit, if all are padded to the largest

    def out(self, chunk: int, items: torch.Tensor) -> tuple[torch.Tensor, Waits]:
        """Start sending the items of a chunk to every group that needs them."""
        rows = self.spread[chunk].spread(items)
        return self._exchange(chunk, rows, self.send_rows[chunk], self.receive_rows[chunk])

    def home(self, chunk: int, rows: torch.Tensor) -> tuple[torch.Tensor, Waits]:
        """Start returning the rows of a chunk; ``spread[chunk].gather`` sums what comes back."""
        return self._exchange(chunk, rows, self.receive_rows[chunk], self.send_rows[chunk])

    def _exchange(
        self, chunk: int, rows: torch.Tensor, send: list[int], receive: list[int]
    ) -> tuple[torch.Tensor, Waits]:
        if self.padded_rows is None:
            return all_to_all(rows, send, receive, self.group, async_op=True)
        size, width = len(send), self.padded_rows[chunk]
        padded = rows.new_zeros(size, width, rows.shape[1])
        for to, part in zip(padded, rows.split(send), strict=True):
            to[: len(part)] = part
        equal = [width] * size
        came, work = all_to_all(padded.flatten(0, 1), equal, equal, self.group, async_op=True)
        received = rows.new_empty(sum(receive), rows.shape[1])
        return received, _Unpad(work, came.view(size, width, -1), received, receive)


class Waits(Protocol):
    def wait(self) -> object: ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Unpad:
    """Waits, then takes the rows that are meant."""

    work: Waits
    came: torch.Tensor
    received: torch.Tensor
    rows: list[int]

    def wait(self) -> None:
        self.work.wait()
        for part, source in zip(self.received.split(self.rows), self.came, strict=True):
            part.copy_(source[: len(part)])


@dataclasses.dataclass(frozen=True, eq=False)
class Reach:
    """Which of a chunk's rows each local expert takes. Entries by (expert, row): each expert's are one run of places
    in the order of experts, because that order keeps the chunks' order inside an expert."""

    rows: Spread  # entry -> row of the chunk; its place: in the order of experts
    runs: list[tuple[slice, slice]]  # per local expert: entries of the chunk, places in the order of experts
    entry: torch.Tensor  # int64: index among all entries that arrived
    weight: torch.Tensor  # gate weights


class HierPlan:
    """Planned lazily: the first stage at once, the rest (``complete``) while the first stage's rows are on the wire.

    ``dimension``: d of HDd, or of Hd if the exchange does not deduplicate; then every (token, expert) pair is an item
    of its own, ``copies`` says of which token.
    """

    counts: torch.Tensor  # int64 [E_local]
    reach: list[Reach]  # per chunk

    def __init__(self, exchange: HierExchange, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None):
        self.exchange = exchange
        self.dimension = exchange.choose(ids, kept)
        self.hops = exchange.hops[self.dimension]
        num_tokens, k = ids.shape
        #: flat index into [T, k] of every first entry
        self.choice = torch.arange(num_tokens * k, device=ids.device)
        if kept is not None:
            self.choice = self.choice[kept.flatten()]
        #: [T, k], for autograd alone: combine uses the weights that travelled, and their gradients travel back
        self.weights = _Weights.apply(weights, self)
        self.returning: Returning | None = None
        weight = weights.detach().flatten()[self.choice].to(accumulator(weights.dtype))
        token = item = self.choice // k
        bounds = [num_tokens * c // exchange.num_chunks for c in range(exchange.num_chunks + 1)]
        self.copies: Spread | None = None
        if not exchange.deduplicate:
            self.copies = Spread(token, num_tokens)
            item = torch.arange(len(token), device=ids.device)
            bounds = torch.searchsorted(token, torch.tensor(bounds, device=ids.device)).tolist()
        self._entries = Entries(item, ids.flatten()[self.choice], weight)
        self.chunk_items = [b - a for a, b in itertools.pairwise(bounds)]  # items of every chunk
        self._items = self.chunk_items
        self.stages: list[Stage] = []
        self._next_stage()

    def _next_stage(self) -> None:
        if len(self.stages) < len(self.hops):
            hop = self.hops[len(self.stages)]
            stage, self._entries, self._items = _plan_stage(hop, self._entries, self._items, self.exchange.padded)
            self.stages.append(stage)

    def complete(self) -> None:
        """Collective: the stages left, and the order of experts."""
        if hasattr(self, "counts"):
            return
        while len(self.stages) < len(self.hops):
            self._next_stage()
        entries = self._entries
        local = torch.as_tensor(self.exchange.placement.local(self.exchange.job.rank), device=entries.item.device)
        index = torch.empty(self.exchange.placement.hosts.shape[0], dtype=torch.int64, device=local.device)
        index[local] = torch.arange(len(local), device=local.device)
        local_index = index[entries.expert]
        self.num_entries, num_local = len(local_index), len(local)
        items_before = torch.tensor([0, *itertools.accumulate(self._items)], device=local.device)
        edges = torch.searchsorted(entries.item, items_before).tolist()  # entries come by item, and items by chunk
        counts = torch.stack(
            [torch.bincount(local_index[a:b], minlength=num_local) for a, b in itertools.pairwise(edges)]
        ).cpu()
        self.counts = counts.sum(0)
        places = (self.counts.cumsum(0) - self.counts + counts.cumsum(0) - counts).tolist()  # [chunk][local expert]
        self.reach, first = [], 0
        for chunk, (a, b) in enumerate(itertools.pairwise(edges)):
            order = stable_order(local_index[a:b], num_local)
            runs, start = [], 0
            for count, at in zip(counts[chunk].tolist(), places[chunk], strict=True):
                runs.append((slice(start, start + count), slice(at, at + count)))
                start += count
            place = torch.cat([torch.arange(to.start, to.stop, device=order.device) for _, to in runs])
            entry = order + a
            rows = Spread(entries.item[entry] - first, self._items[chunk], place)
            self.reach.append(Reach(rows, runs, entry, entries.weight[entry]))
            first += self._items[chunk]


class _Weights(torch.autograd.Function):
    """The gate weights as combine sees them. Made before dispatch, so its backward runs after dispatch's: the weights'
    gradients travel while the rows' gradients do."""

    @staticmethod
    def forward(ctx, weights, plan):  # type: ignore[no-untyped-def, override]
        ctx.plan = plan
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, dweights):  # type: ignore[no-untyped-def, override]
        dweights.view(-1)[ctx.plan.choice] = ctx.plan.returning.wait().to(dweights.dtype)
        return dweights, None


class Returning:
    """Gradients of the gate weights, by entry [Q], on their way back along the metadata's hops."""

    def __init__(self, dweight: torch.Tensor, plan: HierPlan):
        self.stages, self.dweight, self.work = list(plan.stages), dweight, None
        self._start()

    def _start(self) -> None:
        if self.stages:
            stage = self.stages[-1]
            arrived = self.dweight[stage.arrival]
            self.dweight, self.work = all_to_all(
                arrived, stage.receive_entries, stage.send_entries, stage.group, async_op=True
            )

    def wait(self) -> torch.Tensor:
        """Collective: finish all hops -> gradients of the first entries."""
        while self.stages:
            if self.work is not None:
                self.work.wait()
            returned = torch.empty_like(self.dweight)
            returned[self.stages.pop().wire_order] = self.dweight
            self.dweight = returned
            self._start()
        return self.dweight


class Hop(NamedTuple):
    """One stage's place in the hierarchy, for one rank."""

    group: dist.ProcessGroup
    unit: torch.Tensor  # int64 [E]: index in the group of the rank on the way to each expert; -1: not below it
    index_inside: torch.Tensor  # int64 [E]: of every expert among those of the unit that its hop leads to
    own_experts: torch.Tensor  # of the unit that leads to this rank


def _plan_stage(hop: Hop, entries: Entries, chunk_items: list[int], padded: bool) -> tuple[Stage, Entries, list[int]]:
    """Collective over the hop's group: deduplicate, exchange metadata; returns the stage, the entries that arrived
    here, and the items of every chunk that will."""
    group, unit, index_inside, own_experts = hop
    size, num_chunks, device = group.size(), len(chunk_items), entries.item.device
    starts = np.concatenate([[0], np.cumsum(chunk_items)])
    num_items = int(starts[-1])
    chunk_of_item = torch.as_tensor(np.repeat(np.arange(num_chunks), chunk_items), device=device)

    # Rows to send, once per (item, unit), ordered by (chunk, unit, item).
    target = unit.to(device)[entries.expert]
    needed = torch.zeros(num_items, size, dtype=torch.bool, device=device)
    needed[entries.item, target] = True
    row_item, row_unit = needed.nonzero(as_tuple=True)
    order = stable_order(chunk_of_item[row_item] * size + row_unit, num_chunks * size)
    row_item, row_unit = row_item[order], row_unit[order]
    send_rows = torch.bincount(chunk_of_item[row_item] * size + row_unit, minlength=num_chunks * size)
    send_rows = send_rows.view(num_chunks, size)
    spreads = []
    for chunk, part in enumerate(row_item.split(send_rows.sum(1).tolist())):
        spreads.append(Spread(part - int(starts[chunk]), chunk_items[chunk]))

    # Metadata to send, ordered by (unit, chunk, item), because an all-to-all is cut by unit. Entries come by item.
    wire_order = stable_order(target, size)
    per_row = torch.zeros(num_items * size, dtype=torch.int64, device=device)
    per_row.index_add_(0, entries.item * size + target, torch.ones_like(target))
    per_row = per_row[row_item * size + row_unit]
    by_unit = stable_order(row_unit, size)
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
    by_item = stable_order(item, max(1, int(segments.sum())))
    arrival = torch.empty_like(by_item)
    arrival[by_item] = torch.arange(len(by_item), device=device)
    arrived = Entries(item[by_item], own_experts.to(device)[index.long()][by_item], weight[by_item])
    padded_rows = None
    if padded:  # p of eqs. 2 to 5: the largest over all ranks, so that all all-to-alls of a stage are alike
        most = send_rows.max(1).values
        dist.all_reduce(most, dist.ReduceOp.MAX)
        padded_rows = most.tolist()
    stage = Stage(
        group,
        spreads,
        send_rows.tolist(),
        receive_rows.t().tolist(),
        wire_order,
        send_entries.tolist(),
        receive_entries.tolist(),
        arrival,
        padded_rows,
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
