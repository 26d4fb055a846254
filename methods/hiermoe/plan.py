"""Planning HierD-AlltoAll: who needs what at every stage, and the metadata that says so.

A stage is planned when its metadata is exchanged: the first before its rows leave, the others while rows travel. Rows
wait for their numbers alone: which experts they need comes beside them, and is awaited when the next stage is planned.
The metadata's way back, with the gradients of the gate weights, is here too.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.assign import Hosting, assign
from harness.comm.exchange import taken
from harness.comm.handover import Handover
from harness.comm.journey import Cut, Journey, Leg, all_to_all, bounds
from harness.comm.rows import Spread, accumulator, stable_order

if TYPE_CHECKING:
    from methods.hiermoe.hierd import HierExchange


@dataclasses.dataclass(frozen=True, eq=False)
class Entries(Handover):
    """(item, holding, weight) triples, by item: which experts, and on which ranks, an item here still has to reach."""

    item: torch.Tensor  # int64 [Q]
    held: torch.Tensor  # int64 [Q], as ``Hosting`` numbers them
    weight: torch.Tensor  # [Q], float32 (float64 for float64)


class Told(Handover):
    """How the metadata of a stage went, for the way back of gate weights' gradients. ``wire_order`` int64 [Q]: entry at
    each place of what was sent; ``arrival`` int64 [Q']: entry (by item) of each that arrived; how many went to and came
    from each member."""

    def __init__(self, wire_order: torch.Tensor, arrival: torch.Tensor, sent: list[int], received: list[int]):
        self.wire_order, self.arrival, self.sent, self.received = wire_order, arrival, sent, received


class HierJourney(Journey):
    """By HDd (or by Hd, if the exchange does not deduplicate: every (token, expert) pair is then an item of its own).
    Hop i goes over link level i; those beyond d go nowhere. Gate weights travel with the metadata."""

    def __init__(
        self,
        exchange: HierExchange,
        ids: torch.Tensor,
        weights: torch.Tensor,
        kept: torch.Tensor | None,
        hosting: Hosting,
        cut: Cut,
    ):
        super().__init__(cut, weights.requires_grad)
        self.exchange, self.hosting, self.num_hops = exchange, hosting, exchange.num_hops
        num_tokens, self.top_k = ids.shape
        self.like = weights.detach()
        self.choice = taken(ids, kept)  # flat index into [T, k] of every first entry
        token = item = self.choice // self.top_k
        self.item_bounds = bounds(num_tokens, cut.pieces)
        if not exchange.deduplicate:
            self.copies = Spread(token, num_tokens)
            item = torch.arange(len(token), device=ids.device)
            edges = torch.tensor(self.item_bounds, device=ids.device)
            self.item_bounds = torch.searchsorted(token, edges).tolist()
        held = assign(ids.flatten()[self.choice], hosting, exchange.job.topology, exchange.job.rank)
        weight = self.like.flatten()[self.choice].to(accumulator(weights.dtype))
        self.entries = Entries(item, held, weight)
        self.items = [b - a for a, b in itertools.pairwise(self.item_bounds)]  # of every piece
        self.told: dict[int, Told] = {}  # by hop
        self.coming: Coming | None = None  # of the last hop that was told
        self.returning: tuple[dist.Work, torch.Tensor, torch.Tensor] | None = None  # gradients of weights
        self.chain: list[Hop | None] = []

    def tell(self, hop: int) -> None:
        if not hop:
            self.chain = self.exchange.chain(self.hosting, self.entries.held, self.choice, self.top_k)
        self._enter(hop - 1)
        if (at := self.chain[hop]) is None:
            self.legs.append(None)
        else:
            leg, self.coming = _stage(at, self.entries, self.items, self.exchange)
            self.legs.append(leg)
        if hop == self.num_hops - 1:
            self._enter(hop)
            self._arrive()

    def _enter(self, hop: int) -> None:
        """What came over ``hop`` as metadata is what the next one has to send."""
        if self.coming is not None:
            self.entries, self.told[hop] = self.coming.arrived()
            self.items, self.coming = self.coming.receive_rows.sum(0).tolist(), None

    def _arrive(self) -> None:
        """Which of its experts each entry that has arrived is for."""
        entries, hosting = self.entries, self.hosting
        slot_of = np.zeros(len(hosting.hosts), dtype=np.int64)
        slot_of[hosting.held] = np.arange(len(hosting.held))
        local = torch.as_tensor(slot_of[hosting.expert], device=entries.held.device)
        self.slot, self.item, self.travelling = local[entries.held], entries.item, entries.weight
        edges = torch.tensor([0, *itertools.accumulate(self.items)], device=entries.item.device)
        ends = torch.searchsorted(entries.item, edges).tolist()  # entries come by item, and items by piece
        counts = [torch.bincount(self.slot[a:b], minlength=len(hosting.held)) for a, b in itertools.pairwise(ends)]
        self.counts = torch.stack(counts).cpu().numpy().copy()
        del self.hosting, self.entries

    def tell_back(self, hop: int) -> None:
        told, leg = self.told.get(hop), self.legs[hop]
        if told is None or leg is None or not self.learns:
            return
        assert self.dweight is not None
        sent = self.dweight[told.arrival]
        self.dweight = sent.new_empty(len(told.wire_order))
        if hop:
            self.dweight[told.wire_order] = all_to_all(sent, told.received, told.sent, leg.group)
            return
        came = torch.empty_like(self.dweight)
        work = dist.all_to_all_single(came, sent, told.sent, told.received, group=leg.group, async_op=True)
        self.returning = work, came, told.wire_order  # the rows behind it do not wait for it

    def gradients(self) -> torch.Tensor:
        if self.returning is not None:
            work, came, order = self.returning
            work.wait()
            self.dweight[order] = came  # type: ignore[index]
        found = self.like.new_zeros(self.like.numel())
        found[self.choice] = self.dweight.to(found.dtype)  # type: ignore[union-attr]
        return found.view(self.like.shape)


class Hop(NamedTuple):
    """One stage's place in the hierarchy, for one rank."""

    group: dist.ProcessGroup
    unit: torch.Tensor  # int64 [n]: index in the group of the rank on the way to each holding; -1: not below it
    index_inside: torch.Tensor  # int64 [n]: of every holding among those of the unit that its hop leads to
    own: torch.Tensor  # holdings of the unit that leads to this rank


def _stage(hop: Hop, entries: Entries, chunk_items: list[int], exchange: HierExchange) -> tuple[Leg, Coming]:
    """Collective over the hop's group: deduplicate, tell how many rows come; which experts they need is on its way."""
    group, unit, index_inside, own = hop
    size, num_chunks, device = group.size(), len(chunk_items), entries.item.device
    num_items = sum(chunk_items)
    chunk_of_item = torch.as_tensor(np.repeat(np.arange(num_chunks), chunk_items), device=device)

    # Rows to send, once per (item, unit), ordered by (chunk, unit, item).
    target = unit.to(device)[entries.held]
    needed = torch.full((num_items, size), exchange.everyone, dtype=torch.bool, device=device)
    needed[entries.item, target] = True
    row_item, row_unit = needed.nonzero(as_tuple=True)
    order = stable_order(chunk_of_item[row_item] * size + row_unit, num_chunks * size)
    row_item, row_unit = row_item[order], row_unit[order]
    send_rows = torch.bincount(chunk_of_item[row_item] * size + row_unit, minlength=num_chunks * size)
    send_rows = send_rows.view(num_chunks, size)

    # Metadata to send, ordered by (unit, chunk, item), because an all-to-all is cut by unit. Entries come by item.
    wire_order = stable_order(target, size)
    per_row = torch.zeros(num_items * size, dtype=torch.int64, device=device)
    per_row.index_add_(0, entries.item * size + target, torch.ones_like(target))
    per_row = per_row[row_item * size + row_unit]
    by_unit = stable_order(row_unit, size)
    send_entries = torch.bincount(target, minlength=size)
    table = torch.cat([send_rows.t(), send_entries[:, None]], dim=1).to(torch.int32).contiguous()  # [size, C + 1]
    received_table = all_to_all(table, [1] * size, [1] * size, group)
    received_table = received_table.long().cpu()
    receive_rows, receive_entries = received_table[:, :num_chunks], received_table[:, num_chunks]

    index_dtype = torch.uint8 if len(own) <= 256 else torch.int16
    columns = [
        (per_row[by_unit].to(torch.uint8), send_rows.sum(0), receive_rows.sum(1)),
        (index_inside.to(device)[entries.held[wire_order]].to(index_dtype), send_entries, receive_entries),
        (entries.weight[wire_order], send_entries, receive_entries),
    ]
    coming = Coming(_Columns(columns, group), own, wire_order, send_entries.tolist(), receive_rows)
    longest = None
    if exchange.padded:  # p of eqs. 2 to 5: the largest over all ranks, so that all all-to-alls of a stage are alike
        longest = send_rows.max(1).values
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=exchange.job.world)
    leg = Leg(group, row_item, send_rows.cpu(), receive_rows.t().contiguous(), longest)
    return leg, coming


class Coming(Handover):
    """The metadata of a stage on its way. ``own``: holdings of this rank's unit; ``receive_rows`` int64 [members,
    pieces]."""

    def __init__(
        self,
        columns: _Columns,
        own: torch.Tensor,
        wire_order: torch.Tensor,
        sent: list[int],
        receive_rows: torch.Tensor,
    ):
        self.columns, self.own, self.wire_order, self.sent = columns, own, wire_order, sent
        self.receive_rows = receive_rows

    def arrived(self) -> tuple[Entries, Told]:
        """Once it is here."""
        experts_of_row, index, weight = self.columns.wait()
        device, (size, num_chunks) = index.device, self.receive_rows.shape
        # Rows arrive by (chunk, source, row) but their metadata by (source, chunk, row).
        in_data_order = self.receive_rows.t().flatten()  # (chunk, source)
        segment_start = (in_data_order.cumsum(0) - in_data_order).view(num_chunks, size).t().flatten()
        segments = self.receive_rows.flatten()  # (source, chunk)
        first = (segments.cumsum(0) - segments).repeat_interleave(segments)
        place = torch.arange(int(segments.sum())) - first + segment_start.repeat_interleave(segments)
        item = place.to(device).repeat_interleave(experts_of_row.long())
        by_item = stable_order(item, max(1, int(segments.sum())))
        arrival = torch.empty_like(by_item)
        arrival[by_item] = torch.arange(len(by_item), device=device)
        entries = Entries(item[by_item], self.own.to(device)[index.long()][by_item], weight[by_item])
        return entries, Told(self.wire_order, arrival, self.sent, self.columns.counts[-1])


class _Columns(Handover):
    """Several columns (values, counts to each unit, counts from each unit) in one all-to-all of bytes. ``counts``: of
    each column, from each unit."""

    def __init__(self, columns: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], group: dist.ProcessGroup):
        size = group.size()
        self.counts = [came.tolist() for _, _, came in columns]
        self.dtypes = [values.dtype for values, _, _ in columns]
        pieces = [values.split(send.tolist()) for values, send, _ in columns]
        packed = torch.cat([part[unit].contiguous().view(torch.uint8) for unit in range(size) for part in pieces])
        send_bytes = [sum(part[unit].nbytes for part in pieces) for unit in range(size)]
        self.fields = [
            count[unit] * dtype.itemsize
            for unit in range(size)
            for count, dtype in zip(self.counts, self.dtypes, strict=True)
        ]
        receive_bytes = [sum(self.fields[unit * len(columns) :][: len(columns)]) for unit in range(size)]
        self.received = packed.new_empty(sum(receive_bytes))
        self.work = dist.all_to_all_single(self.received, packed, receive_bytes, send_bytes, group=group, async_op=True)

    def wait(self) -> list[torch.Tensor]:
        self.work.wait()  # type: ignore[union-attr]
        split = self.received.split(self.fields)
        return [torch.cat(split[c :: len(self.dtypes)]).view(dtype) for c, dtype in enumerate(self.dtypes)]
