"""One batch's way to its experts and home, forward and backward: over hops, each on the links of one level, in chunks.

An exchange plans a ``Journey``: per hop a ``Leg``, which says of what each row that is sent is a copy, and who gets how
many. Rows go out hop by hop, land in the order of the experts, and their sums come home the same way. A backward is the
same trip with gradients. So a schedule (``harness.plan.schedule``) may put the hops of every chunk on lanes, and the
experts of one chunk beside the hops of another.

Forward and backward may be cut into different numbers of chunks (``Cut``): rows are counted by *pieces*, of which a
chunk of either has a whole number.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from harness.comm.handover import Handover, Held
from harness.comm.rows import Spread, dot_rows, scale_rows, stable_order

Direction = Literal["forward", "backward"]


class Cut(NamedTuple):
    """Chunks of a batch in its forward and in its backward. ``whole``: the experts compute once, on what all chunks
    have brought; else on one piece after another, as it arrives. ``by``: a piece has some of the tokens, or what all of
    them send to some of the experts of every rank (``harness.comm.assign.expert_pieces``)."""

    forward: int = 1
    backward: int = 1
    whole: bool = True
    by: Literal["tokens", "experts"] = "tokens"

    @property
    def pieces(self) -> int:
        """What rows are counted by."""
        return math.lcm(self.forward, self.backward)

    @property
    def tables(self) -> int:
        """How many tables of counts are told: the pieces of experts follow from one."""
        return self.pieces if self.by == "tokens" else 1

    def degree(self, direction: Direction) -> int:
        return self.forward if direction == "forward" else self.backward

    def batches(self, direction: Direction) -> int:
        """How often the experts compute."""
        return 1 if self.whole else self.degree(direction)

    def of_chunk(self, direction: Direction, chunk: int) -> range:
        """Its pieces."""
        each = self.pieces // self.degree(direction)
        return range(chunk * each, (chunk + 1) * each)


def bounds(num_tokens: int, num_parts: int) -> list[int]:
    """First token of every part, and the end."""
    return [num_tokens * part // num_parts for part in range(num_parts + 1)]


def all_to_all(
    send: torch.Tensor, send_rows: list[int], receive_rows: list[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """All-to-all-v over dimension 0 through the installed wire; a rank alone in its group keeps its rows."""
    if group is None:
        return send
    received = send.new_empty(sum(receive_rows), *send.shape[1:])
    dist.all_to_all_single(received, send.contiguous(), receive_rows, send_rows, group=group)
    return received


class Sent(Handover):
    """Of one chunk: what its rows are copies of, how many go to and come from each member of the group, and their
    numbers among all (``Leg``), int64."""

    def __init__(self, spread: Spread, send: list[int], receive: list[int], row: torch.Tensor):
        self.spread, self.send, self.receive, self.row = spread, send, receive, row


class Leg(Handover):
    """One hop of all chunks over ``group``.

    ``item`` int64 [R]: of each row sent, by (piece, member, item), the item that it copies; ``sent`` and ``received``
    int64 [pieces, members] on the CPU. ``padded``: rows of every message of a piece if all are as long as the longest
    of the job, int64 [pieces]. ``order``: in which order an item's rows are added up, int64 [R], if not in theirs.
    ``stays``: a piece of which nothing leaves its rank."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        item: torch.Tensor,
        sent: torch.Tensor,
        received: torch.Tensor,
        padded: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
        stays: int | None = None,
    ):
        self.group, self.item, self.sent, self.received = group, item, sent, received
        self.padded, self.order, self.stays = padded, order, stays

    def cut(self, degree: int, items: Placed) -> list[Sent]:
        """``items``: where this hop's items stand, chunk by chunk."""
        outgoing = Placed.by(self.sent, degree)
        at = items.position.to(self.item.device)[self.item] if items.position is not None else self.item
        row = torch.arange(len(at))
        if outgoing.position is not None:
            row[outgoing.position] = torch.arange(len(at))
        row = row.to(at.device)
        counts = [part.view(degree, -1, part.shape[1]).sum(1).tolist() for part in (self.sent, self.received)]
        found = []
        for chunk, (a, b) in enumerate(_pairs(outgoing.starts)):
            first, end = items.of(chunk)
            order = None if self.order is None else self.order[row[a:b]]
            spread = Spread(at[row[a:b]] - first, end - first, rank_in_item=order)
            found.append(Sent(spread, counts[0][chunk], counts[1][chunk], row[a:b]))
        return found

    def exchange(
        self, rows: torch.Tensor, send: list[int], receive: list[int], degree: int, chunk: int
    ) -> torch.Tensor:
        """Collective: of a chunk."""
        if self.padded is None:
            return rows if chunk == self.stays else all_to_all(rows, send, receive, self.group)
        width = int(self.padded.view(degree, -1).sum(1)[chunk])
        padded = rows.new_zeros(len(send), width, rows.shape[1])
        for to, part in zip(padded, rows.split(send), strict=True):
            to[: len(part)] = part
        equal = [width] * len(send)
        came = all_to_all(padded.flatten(0, 1), equal, equal, self.group).view(padded.shape)
        return torch.cat([part[:count] for part, count in zip(came, receive, strict=True)])


class Placed(NamedTuple):
    """Rows that are counted by (piece, member), and where they stand by (chunk, member, piece): ``position`` int64 [R]
    on the CPU, None where that is the same; ``starts``: of each chunk, and the end. ``shared``: every chunk has all."""

    position: torch.Tensor | None
    starts: list[int]
    shared: bool = False

    def of(self, chunk: int) -> tuple[int, int]:
        """First and end of a chunk."""
        return (0, self.starts[-1]) if self.shared else (self.starts[chunk], self.starts[chunk + 1])

    @classmethod
    def by(cls, rows: torch.Tensor, degree: int) -> Placed:
        """``rows`` int64 [pieces, members] on the CPU."""
        pieces, members = rows.shape
        starts = [0, *rows.view(degree, -1).sum(1).cumsum(0).tolist()]
        if pieces == degree or members == 1:
            return cls(None, starts)
        sizes = rows.view(degree, pieces // degree, members)
        by_member = sizes.transpose(1, 2).flatten()
        begins = (by_member.cumsum(0) - by_member).view(degree, members, -1).transpose(1, 2).flatten()
        segment = rows.flatten()
        shift = begins - (segment.cumsum(0) - segment)
        return cls(torch.arange(int(segment.sum())) + shift.repeat_interleave(segment), starts)


class Landed(Handover):
    """One piece: (row, expert) pairs in the order of experts. ``item`` int64 [Q]: the row of the piece's chunk;
    ``runs``: of every expert its pairs, and their places among those of all pieces (``Cut.whole``); ``entry`` int64
    [Q]: number of the pair among all; ``weight`` [Q]: of the gate, where it travels."""

    def __init__(
        self, item: torch.Tensor, runs: list[tuple[slice, slice]], entry: torch.Tensor, weight: torch.Tensor | None
    ):
        self.item, self.runs, self.entry, self.weight = item, runs, entry, weight


class Journey(Handover, abc.ABC):
    """On one rank. ``legs``: of hops, outermost first, as far as they are told; None where a hop goes nowhere.
    ``counts`` int64 [pieces, experts held] on the CPU: rows of each, once all hops are told. Gate weights travel with
    the rows (``travelling`` [Q], by pair) or stay with the tokens (``staying`` [R], by row of the first leg)."""

    num_hops: int
    counts: torch.Tensor
    slot: torch.Tensor  # int64 [Q]: held expert of every (row, expert) pair that arrives, piece by piece
    item: torch.Tensor  # int64 [Q]: its row, as the last leg counts them by (piece, member)
    item_bounds: list[int]  # first item of every piece, and the end
    shared: bool = False  # whether every piece is of all items
    copies: Spread | None = None  # token of every item, if items are not the tokens
    travelling: torch.Tensor | None = None
    dweight: torch.Tensor | None = None  # gradients of the weights, by pair or by row
    staying: torch.Tensor | None = None
    one_each = False  # whether every row that arrives has one expert

    def __init__(self, cut: Cut, learns: bool):
        """``learns``: whether gate weights want gradients."""
        self.cut, self.learns = cut, learns
        self.legs: list[Leg | None] = []
        self.made, self.came = Held(), Held()  # of forward, where gradients of weights need them: by piece, by chunk
        self._sent: dict[tuple[int, int], list[Sent]] = {}
        self._landed: dict[int, list[Landed]] = {}

    @abc.abstractmethod
    def tell(self, hop: int) -> None:
        """Collective: the metadata of a hop, before its rows leave and after that of the hop before."""

    def tell_back(self, hop: int) -> None:
        """Collective: gradients of weights that travelled go back over a hop; innermost first."""

    @abc.abstractmethod
    def gradients(self) -> torch.Tensor:
        """Of the weights [T, k], once all are back; float32 (float64 for float64)."""

    def sent(self, hop: int, degree: int) -> list[Sent]:
        """Of every chunk; of a hop that goes somewhere."""
        if (hop, degree) not in self._sent:
            leg = self.legs[hop]
            assert leg is not None
            self._sent[hop, degree] = leg.cut(degree, self.placed(hop, degree))
        return self._sent[hop, degree]

    def placed(self, hop: int, degree: int) -> Placed:
        """Items that enter ``hop``; behind the last one, rows that arrive."""
        before = next((leg for leg in reversed(self.legs[:hop]) if leg is not None), None)
        if before is not None:
            return Placed.by(before.received, degree)
        return Placed(None, self.item_bounds[:: self.cut.pieces // degree], self.shared)

    def landed(self, degree: int) -> list[Landed]:
        """Of every piece."""
        if degree not in self._landed:
            placed, each = self.placed(self.num_hops, degree), self.cut.pieces // degree
            item = self.item if placed.position is None else placed.position.to(self.item.device)[self.item]
            total = self.counts.sum(0)
            places = (total.cumsum(0) - total + self.counts.cumsum(0) - self.counts).tolist()
            found = []
            for piece, (a, b) in enumerate(_pairs([0, *self.counts.sum(1).cumsum(0).tolist()])):
                order = stable_order(self.slot[a:b], max(1, self.counts.shape[1])) + a
                runs, start = [], 0
                for count, at in zip(self.counts[piece].tolist(), places[piece], strict=True):
                    runs.append((slice(start, start + count), slice(at, at + count)))
                    start += count
                weight = None if self.travelling is None else self.travelling[order]
                found.append(Landed(item[order] - placed.of(piece // each)[0], runs, order, weight))
            self._landed[degree] = found
        return self._landed[degree]


class Trip(Handover):
    """One direction of a journey. ``begin``, then of each chunk ``out`` over every hop; the experts take ``arrived``
    and ``give`` what they made; then ``home`` over every hop, innermost first; ``end``."""

    def __init__(self, journey: Journey, direction: Direction):
        self.journey, self.cut, self.direction = journey, journey.cut, direction
        self.degree = journey.cut.degree(direction)
        self.back = direction == "backward"
        self.parts, self.given = Held(), Held()
        self.rows = Held()  # that landed, by expert: piece by piece, or (None) of all pieces

    # ------------------------------------------------------------------ out

    def begin(self, x: torch.Tensor) -> None:
        """x [T, M]: tokens, or the gradients of what came home."""
        journey = self.journey
        if self.back and journey.staying is not None and journey.learns:
            self._dots_at_home(x)
        items = x if journey.copies is None else journey.copies.spread(x)
        placed = journey.placed(0, self.degree)
        for chunk in range(self.degree):
            self.parts[chunk] = items[slice(*placed.of(chunk))]

    def out(self, hop: int, chunk: int) -> None:
        """Collective; behind the last hop the chunk lands."""
        journey, leg = self.journey, self.journey.legs[hop]
        if leg is not None:
            sent, part = journey.sent(hop, self.degree)[chunk], self.parts.pop(chunk)
            if self.back and journey.staying is not None and not hop:
                rows = scale_rows(part, sent.spread.item, journey.staying[sent.row])
            else:
                rows = sent.spread.spread(part)
            self.parts[chunk] = leg.exchange(rows, sent.send, sent.receive, self.degree, chunk)
        if hop == journey.num_hops - 1:
            self._land(chunk)

    def _land(self, chunk: int) -> None:
        journey, part, apart = self.journey, self.parts.pop(chunk), self.cut.whole and self.cut.pieces > 1
        if apart and None not in self.rows:
            self.rows[None] = part.new_empty(int(journey.counts.sum()), part.shape[1])
        for piece in self.cut.of_chunk(self.direction, chunk):
            landed = journey.landed(self.degree)[piece]
            if not self.back or journey.travelling is None:
                rows = None if apart else part.index_select(0, landed.item)
            else:
                rows = scale_rows(part, landed.item, landed.weight)  # type: ignore[arg-type]
                if journey.learns:
                    self._dots(piece, landed, part)
            if not apart:
                self.rows[None if self.cut.whole else piece] = rows
                continue
            for pairs, places in landed.runs:
                if rows is None:
                    torch.index_select(part, 0, landed.item[pairs], out=self.rows[None][places])
                else:
                    self.rows[None][places] = rows[pairs]

    def _dots(self, piece: int, landed: Landed, part: torch.Tensor) -> None:
        """Gradients of a piece's weights, where these travelled: what the experts made times what comes for it."""
        journey = self.journey
        if journey.dweight is None:
            journey.dweight = torch.empty_like(journey.travelling)  # type: ignore[arg-type]
        made = journey.made[None if self.cut.whole else piece]
        runs = landed.runs if self.cut.whole else [(slice(None), slice(None))]
        for pairs, places in runs:
            dots = dot_rows(part, landed.item[pairs], made[places])
            journey.dweight[landed.entry[pairs]] = dots.to(journey.dweight.dtype)

    def _dots_at_home(self, dy: torch.Tensor) -> None:
        """The same where they stayed: what came home times its gradient."""
        journey, degree = self.journey, self.cut.forward
        journey.dweight = torch.empty_like(journey.staying)  # type: ignore[arg-type]
        placed = journey.placed(0, degree)
        for chunk, sent in enumerate(journey.sent(0, degree)):
            dots = dot_rows(dy[slice(*placed.of(chunk))], sent.spread.item, journey.came.pop(chunk))
            journey.dweight[sent.row] = dots.to(journey.dweight.dtype)

    # ------------------------------------------------------------------ at the experts

    def arrived(self, piece: int | None) -> torch.Tensor:
        """Rows by expert [R, M]; of all pieces for None."""
        return self.rows.pop(piece)  # type: ignore[no-any-return]

    def give(self, piece: int | None, made: torch.Tensor) -> None:
        """What the experts made of ``arrived``."""
        self.given[piece] = made
        if not self.back and self.journey.travelling is not None and self.journey.learns:
            self.journey.made[piece] = made

    # ------------------------------------------------------------------ home

    def home(self, hop: int, chunk: int) -> None:
        """Collective; the innermost hop first."""
        journey, leg = self.journey, self.journey.legs[hop]
        rows = self._depart(chunk) if hop == journey.num_hops - 1 else self._settle(hop + 1, chunk)
        if leg is not None:
            sent = journey.sent(hop, self.degree)[chunk]
            rows = leg.exchange(rows, sent.receive, sent.send, self.degree, chunk)
        self.parts[chunk] = rows

    def end(self) -> torch.Tensor:
        """[T, M]: sums over each token's experts, weighted in forward."""
        journey, chunks = self.journey, range(self.degree)
        if journey.shared and self.degree > 1:
            return self._sum_all()
        items = [self._settle(0, chunk) for chunk in chunks]
        whole = items[0] if len(items) == 1 else torch.cat(items)
        return whole if journey.copies is None else journey.copies.gather(whole)

    def _depart(self, chunk: int) -> torch.Tensor:
        """What was made of a chunk's rows, summed over their experts."""
        journey, pieces = self.journey, self.cut.of_chunk(self.direction, chunk)
        landed = [journey.landed(self.degree)[piece] for piece in pieces]
        item = landed[0].item if len(landed) == 1 else torch.cat([each.item for each in landed])
        place: torch.Tensor | None = None
        if self.cut.whole:
            made = self.given[None]
            if self.cut.pieces > 1:
                place = torch.cat([torch.arange(to.start, to.stop) for each in landed for _, to in each.runs])
                place = place.to(made.device)
            if chunk == self.degree - 1:
                del self.given[None]
        else:
            parts = [self.given.pop(piece) for piece in pieces]
            made = parts[0] if len(parts) == 1 else torch.cat(parts)
        if journey.one_each:
            back = torch.empty_like(item)
            back[item] = torch.arange(len(item), device=item.device) if place is None else place
            return made.index_select(0, back)
        weight = None
        if not self.back and journey.travelling is not None:
            weight = torch.cat([each.weight for each in landed if each.weight is not None])
        first, end = journey.placed(journey.num_hops, self.degree).of(chunk)
        return Spread(item, end - first, place).gather(made, weight)

    def _settle(self, hop: int, chunk: int) -> torch.Tensor:
        """Rows that came home over ``hop``, summed over what they are copies of."""
        journey, rows = self.journey, self.parts.pop(chunk)
        if journey.legs[hop] is None:
            return rows
        sent = journey.sent(hop, self.degree)[chunk]
        if self.back or journey.staying is None or hop:
            return sent.spread.gather(rows)
        if journey.learns:
            journey.came[chunk] = rows
        return sent.spread.gather(rows, journey.staying[sent.row])

    def _sum_all(self) -> torch.Tensor:
        """The same over all chunks at once, where each may have rows of any token."""
        journey, sent = self.journey, self.journey.sent(0, self.degree)
        parts = [self.parts.pop(chunk) for chunk in range(self.degree)]
        if not self.back and journey.learns:
            journey.came.update(enumerate(parts))
        spreads = [each.spread for each in sent]
        order = [each.rank_in_item for each in spreads if each.rank_in_item is not None]
        whole = Spread(
            torch.cat([each.item for each in spreads]),
            spreads[0].num_items,
            rank_in_item=torch.cat(order) if order else None,
        )
        weights = None if self.back else journey.staying[torch.cat([each.row for each in sent])]  # type: ignore[index]
        return whole.gather(torch.cat(parts), weights)


def _pairs(starts: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(starts))
