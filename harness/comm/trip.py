"""One direction of a journey, hop by hop and chunk by chunk (``harness.comm.journey``)."""

from __future__ import annotations

import torch

from harness.comm.handover import Handover, Held
from harness.comm.journey import Direction, Journey, Landed, Leg
from harness.comm.packing import pack, restore
from harness.comm.rows import Spread, dot_rows, scale_rows


class Trip(Handover):
    """One direction of a journey. ``begin``, then of each chunk ``out`` over every hop; the experts take ``arrived``
    and ``give`` what they made; then ``home`` over every hop, innermost first; ``end``."""

    def __init__(self, journey: Journey, direction: Direction):
        self.journey, self.cut, self.direction = journey, journey.cut, direction
        self.degree = journey.cut.degree(direction)
        self.back = direction == "backward"
        self.parts, self.given, self.settled = Held(), Held(), Held()
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
            part_of = "combine_grad" if self.back else "dispatch"
            self.parts[chunk] = self._sent(leg, rows, sent.send, sent.receive, chunk, part_of)
        if hop == journey.num_hops - 1:
            self._land(chunk)

    def _sent(
        self, leg: Leg, rows: torch.Tensor, send: list[int], receive: list[int], chunk: int, part: str
    ) -> torch.Tensor:
        """Collective: over one hop, in the format in which rows travel. ``part``: of the exchange."""
        if (exchange_dtype := self.journey.exchange_dtype) is None:
            return leg.exchange(rows, send, receive, self.degree, chunk)
        came = leg.exchange(pack(rows, exchange_dtype, part), send, receive, self.degree, chunk)
        return restore(came, rows.shape[1], rows.dtype)

    def _land(self, chunk: int) -> None:
        journey, part, apart = self.journey, self.parts.pop(chunk), self.cut.whole and self.cut.pieces > 1
        if apart and None not in self.rows:
            self.rows[None] = part.new_empty(int(journey.counts.sum()), part.shape[1])
        for piece in self.cut.of_chunk(self.direction, chunk):
            landed = journey.landed(self.degree)[piece]
            if not self.back or journey.travelling is None:
                rows = part.index_select(0, landed.item)
            else:
                rows = scale_rows(part, landed.item, landed.weight)  # type: ignore[arg-type]
                if journey.learns:
                    self._dots(piece, landed, part)
            if apart:
                self.rows[None].index_copy_(0, landed.place, rows)
            else:
                self.rows[None if self.cut.whole else piece] = rows

    def _dots(self, piece: int, landed: Landed, part: torch.Tensor) -> None:
        """Gradients of a piece's weights, where these travelled: what the experts made times what comes for it."""
        journey = self.journey
        if journey.dweight is None:
            journey.dweight = torch.empty_like(journey.travelling)  # type: ignore[arg-type]
        made = journey.made[None if self.cut.whole else piece]
        dots = dot_rows(part, landed.item, made, landed.place if self.cut.whole else None)
        assert landed.entry is not None
        journey.dweight[landed.entry] = dots.to(journey.dweight.dtype)

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
            part_of = "dispatch_grad" if self.back else "combine"
            rows = self._sent(leg, rows, sent.receive, sent.send, chunk, part_of)
        self.parts[chunk] = rows

    def settle(self, chunk: int) -> None:
        """What may be done ahead of ``end`` when a chunk is home."""
        if not self.journey.shared:
            self.settled[chunk] = self._settle(0, chunk)

    def end(self) -> torch.Tensor:
        """[T, M]: sums over each token's experts, weighted in forward."""
        journey, chunks = self.journey, range(self.degree)
        if journey.shared and self.degree > 1:
            return self._sum_all()
        items = [self.settled.pop(each) if each in self.settled else self._settle(0, each) for each in chunks]
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
                place = torch.cat([each.place for each in landed if each.place is not None])
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
        return whole.gather(torch.cat(parts), None if self.back else journey.staying)
