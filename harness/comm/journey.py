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
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.handover import Handover, Held
from harness.comm.rows import Spread, stable_order
from harness.specs import ExchangeDtype

Direction = Literal["forward", "backward"]


class Cut(NamedTuple):
    """Chunks of a batch in its forward and in its backward. ``whole``: the experts compute once, on what all chunks
    have brought; else on one piece after another, as it arrives. ``by``: a piece has some of the tokens, or what all of
    them send to some of the experts of every rank (``harness.comm.assign.expert_pieces``)."""

    forward: int = 1
    backward: int = 1
    whole: bool = True
    by: Literal["tokens", "experts", "ranks"] = "tokens"

    @property
    def pieces(self) -> int:
        """What rows are counted by."""
        return math.lcm(self.forward, self.backward)

    @property
    def tables(self) -> int:
        """How many tables of counts are told: the pieces of experts and of ranks follow from one."""
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
    """Of one chunk: what its rows are copies of, how many go to and come from each member of the group, and which rows
    they are of all (``Leg``)."""

    def __init__(self, spread: Spread, send: list[int], receive: list[int], row: torch.Tensor | slice):
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
        self.group, self.item, self.padded, self.order, self.stays = group, item, padded, order, stays
        self.sent, self.received = (part.numpy().astype(np.int64) for part in (sent, received))

    def cut(self, degree: int, items: Placed) -> list[Sent]:
        """``items``: where this hop's items stand, chunk by chunk."""
        outgoing = Placed.by(self.sent, degree)
        at = items.position.to(self.item.device)[self.item] if items.position is not None else self.item
        moved = None
        if outgoing.position is not None:
            moved = torch.empty_like(outgoing.position)
            moved[outgoing.position] = torch.arange(len(at))
            moved = moved.to(at.device)
        counts = [part.reshape(degree, -1, part.shape[1]).sum(1).tolist() for part in (self.sent, self.received)]
        found = []
        for chunk, (a, b) in enumerate(itertools.pairwise(outgoing.starts)):
            first, end = items.of(chunk)
            row = slice(a, b) if moved is None else moved[a:b]
            order = None if self.order is None else self.order[row]
            item = at[row] - first if first else at[row]
            found.append(Sent(Spread(item, end - first, rank_in_item=order), counts[0][chunk], counts[1][chunk], row))
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
    def by(cls, rows: np.ndarray, degree: int) -> Placed:
        """``rows`` int64 [pieces, members]."""
        pieces, members = rows.shape
        starts = [0, *rows.reshape(degree, -1).sum(1).cumsum().tolist()]
        if pieces == degree or members == 1:
            return cls(None, starts)
        by_member = rows.reshape(degree, pieces // degree, members).transpose(0, 2, 1).ravel()
        begins = (by_member.cumsum() - by_member).reshape(degree, members, -1).transpose(0, 2, 1).ravel()
        segment = rows.ravel()
        shift = begins - (segment.cumsum() - segment)
        return cls(torch.from_numpy(np.arange(segment.sum()) + shift.repeat(segment)), starts)


class Landed(Handover):
    """One piece: (row, expert) pairs in the order of experts. ``item`` int64 [Q]: the row of the piece's chunk;
    ``place`` int64 [Q]: among the pairs of all pieces in the order of experts (``Cut.whole``); None where there is one
    piece; ``entry`` int64 [Q]: number of the pair among all, and ``weight`` [Q]: of the gate, where weights travel."""

    def __init__(
        self,
        item: torch.Tensor,
        place: torch.Tensor | None,
        entry: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ):
        self.item, self.place, self.entry, self.weight = item, place, entry, weight


class Journey(Handover, abc.ABC):
    """On one rank. ``legs``: of hops, outermost first, as far as they are told; None where a hop goes nowhere.
    ``counts`` int64 [pieces, experts held]: rows of each, once all hops are told. Gate weights travel with
    the rows (``travelling`` [Q], by pair) or stay with the tokens (``staying`` [R], by row of the first leg)."""

    num_hops: int
    counts: np.ndarray
    slot: torch.Tensor  # int64 [Q]: held expert of every (row, expert) pair that arrives, piece by piece
    item: torch.Tensor  # int64 [Q]: its row, as the last leg counts them by (piece, member)
    item_bounds: list[int]  # first item of every piece, and the end
    shared: bool = False  # whether every piece is of all items
    copies: Spread | None = None  # token of every item, if items are not the tokens
    travelling: torch.Tensor | None = None
    dweight: torch.Tensor | None = None  # gradients of the weights, by pair or by row
    staying: torch.Tensor | None = None
    exchange_dtype: ExchangeDtype | None = None  # in which its rows travel
    one_each = False  # whether every row that arrives has one expert

    def __init__(self, cut: Cut, learns: bool):
        """``learns``: whether gate weights want gradients."""
        self.cut, self.learns = cut, learns
        self.legs: list[Leg | None] = []
        self.made, self.came = Held(), Held()  # of forward, where gradients of weights need them: by piece, by chunk
        self._sent: dict[tuple[int, int], list[Sent]] = {}
        self._landed: dict[int, list[Landed]] = {}
        self._placed: dict[tuple[int, int], Placed] = {}

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
        if (hop, degree) not in self._placed:
            before = next((leg for leg in reversed(self.legs[:hop]) if leg is not None), None)
            if before is not None:
                found = Placed.by(before.received, degree)
            else:
                found = Placed(None, self.item_bounds[:: self.cut.pieces // degree], self.shared)
            self._placed[hop, degree] = found
        return self._placed[hop, degree]

    def landed(self, degree: int) -> list[Landed]:
        """Of every piece."""
        if degree not in self._landed:
            placed, each = self.placed(self.num_hops, degree), self.cut.pieces // degree
            item = self.item if placed.position is None else placed.position.to(self.item.device)[self.item]
            total = self.counts.sum(0)
            places = total.cumsum() - total + self.counts.cumsum(0) - self.counts
            found = []
            for piece, (a, b) in enumerate(itertools.pairwise([0, *self.counts.sum(1).cumsum().tolist()])):
                order = stable_order(self.slot[a:b], max(1, self.counts.shape[1])) + a
                place, count = None, self.counts[piece]
                if self.cut.pieces > 1:
                    shift = places[piece] - (count.cumsum() - count)
                    place = torch.from_numpy(np.arange(b - a) + shift.repeat(count)).to(item.device)
                first = placed.of(piece // each)[0]
                if self.travelling is None:
                    found.append(Landed(item[order] - first, place))
                else:
                    found.append(Landed(item[order] - first, place, order, self.travelling[order]))
            self._landed[degree] = found
            if self.cut.forward == self.cut.backward:  # nobody asks again
                del self.slot, self.item
        return self._landed[degree]
