"""The exchange: how tokens travel to experts and back, and the flat all-to-all-v that is everyone's control.

An exchange makes a ``Journey`` of every batch. Who computes a row is decided before, by one rule for all exchanges
(``harness.comm.assign``); how the row gets there is the exchange's.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np
import torch

from harness.comm.assign import Hosting, assign, dealt_pieces, expert_pieces
from harness.comm.job import Job
from harness.comm.journey import Cut, Journey, Leg, all_to_all, bounds
from harness.comm.replicas import there_and_back
from harness.comm.rows import stable_order
from harness.comm.trip import Trip
from harness.placement import Placement
from harness.routing.certificate import expert_counts
from harness.routing.types import Routing


class Exchange(abc.ABC):
    """Tokens to experts and back, on one rank of ``job``. ``placement``: the experts' owners, or all that hold one.
    ``weights_travel``: gate weights go with the tokens, and so their gradients come back (``Journey.tell_back``).
    ``trip``: how a direction of its journeys is walked; hops need not be all-to-alls."""

    weights_travel: ClassVar[bool] = False
    trip: ClassVar[type[Trip]] = Trip

    def __init__(self, job: Job, placement: Placement):
        self.job = job
        self.placement = placement
        self._hosting: tuple[Placement, Hosting] | None = None

    def place(self, placement: Placement) -> None:
        """Experts are where ``placement`` says from now on."""
        self.placement = placement

    @property
    def hosting(self) -> Hosting:
        """Of the placement alone."""
        if self._hosting is None or self._hosting[0] is not self.placement:
            self._hosting = self.placement, Hosting(self.placement.hosts, self.placement.local(self.job.rank))
        return self._hosting[1]

    @abc.abstractmethod
    def journey(
        self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None, hosting: Hosting, cut: Cut
    ) -> Journey:
        """ids int64 [T, k], weights [T, k], kept bool [T, k] or None: the way of a batch, of which nothing is told."""

    def count(self, ids: torch.Tensor, kept: torch.Tensor | None, pieces: int = 1) -> np.ndarray:
        """Collective: rows of every rank for every expert, int64 [pieces, num_ranks, E]."""
        num_experts, num_ranks = self.placement.hosts.shape
        chosen = taken(ids, kept)
        key = ids.flatten()[chosen]
        if pieces > 1:
            key = key + num_experts * piece_of(chosen // ids.shape[1], len(ids), pieces)
        own = torch.bincount(key, minlength=pieces * num_experts)
        if num_ranks == 1:
            return own.cpu().numpy().reshape(pieces, 1, num_experts)
        each = [len(own)] * num_ranks
        every = all_to_all(own.repeat(num_ranks), each, each, self.job.world)
        return every.cpu().numpy().reshape(num_ranks, pieces, num_experts).transpose(1, 0, 2)


def piece_of(token: torch.Tensor, num_tokens: int, pieces: int) -> torch.Tensor:
    """Of tokens int64 [R] the piece in which each lies."""
    edges = torch.tensor(bounds(num_tokens, pieces)[1:], device=token.device)
    return torch.searchsorted(edges, token, right=True)


def taken(ids: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Flat indices into [T, k] of the assignments that the gate did not drop, int64 [R]."""
    choice = torch.arange(ids.numel(), device=ids.device)
    return choice if kept is None else choice[kept.flatten()]


# --- flat: one copy of a token per chosen expert, one all-to-all-v over all ranks ---------------------------------


class FlatExchange(Exchange):
    """One all-to-all-v over all ranks. Rows are sorted by expert before they are sent, so only counts travel as
    metadata; gate weights stay with the token and are applied when the rows come home."""

    def journey(
        self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None, hosting: Hosting, cut: Cut
    ) -> FlatJourney:
        if hosting.several and hosting.counts is None:
            hosting = hosting.counted(self.count(ids, kept, cut.tables))
        return FlatJourney(self.job, ids, weights, kept, hosting, cut)


class FlatJourney(Journey):
    """Where experts have several hosts, every rank knows how many rows the others have (``Hosting.counts``), and
    nothing else travels as metadata; else each rank is told how many it gets. ``groups``: of ranks; a piece then is
    what goes between ranks so many groups apart, and the last one what stays with a copy (FasterMoE's smart
    schedule)."""

    num_hops = 1
    one_each = True

    def __init__(
        self,
        job: Job,
        ids: torch.Tensor,
        weights: torch.Tensor,
        kept: torch.Tensor | None,
        hosting: Hosting,
        cut: Cut,
        groups: int = 0,
    ):
        super().__init__(cut, weights.requires_grad)
        self.job, self.ids, self.weights, self.kept, self.hosting = job, ids, weights.detach(), kept, hosting
        self.groups, self.shared = groups, bool(groups) or cut.by == "experts"
        self.item_bounds = [len(ids)] * (cut.pieces + 1) if self.shared else bounds(len(ids), cut.pieces)

    def tell(self, hop: int) -> None:
        job, hosting, pieces, (num_tokens, top_k) = self.job, self.hosting, self.cut.pieces, self.ids.shape
        choice = taken(self.ids, self.kept)
        expert = self.ids.flatten()[choice]
        held = assign(expert, hosting, job.topology, job.rank)
        rank_of = torch.as_tensor(hosting.holder, device=held.device)
        order = stable_order(held, len(rank_of))
        choice, held = choice[order], held[order]
        if pieces > 1:
            if self.groups:
                to = torch.as_tensor(self._apart()[job.rank], device=held.device)  # [E, rank]
                piece = to[torch.as_tensor(hosting.expert, device=held.device)[held], rank_of[held]]
            elif self.cut.by == "experts":
                piece = torch.as_tensor(self._of_expert()[hosting.expert], device=held.device)[held]
            else:
                piece = piece_of(choice // top_k, num_tokens, pieces)
            order = stable_order(piece, pieces)
            choice, held, piece = choice[order], held[order], piece[order]
        else:
            piece = torch.zeros_like(held)
        sent = torch.bincount(piece * job.num_ranks + rank_of[held], minlength=pieces * job.num_ranks).cpu()
        received = self._received(piece, held)
        slots = np.argsort(hosting.held, kind="stable")  # rows come by ascending expert
        self.counts = np.empty((pieces, len(slots)), dtype=np.int64)
        self.counts[:, slots] = received.sum(1).numpy()
        self.slot = (
            torch.as_tensor(slots).repeat(pieces * job.num_ranks).repeat_interleave(received.flatten()).to(held.device)
        )
        self.item = torch.arange(len(self.slot), device=held.device)
        self.staying = self.weights.flatten()[choice]
        group = job.world if job.num_ranks > 1 else None
        # A token's rows are added in the order of its choices: so sums do not depend on where experts are.
        self.legs.append(
            Leg(
                group,
                choice // top_k,
                sent.view(pieces, -1),
                received.sum(2),
                order=choice % top_k,
                stays=self.groups or None,
            )
        )
        del self.hosting  # with all ranks' counts

    def _received(self, piece: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Rows of each piece from each rank for each own expert, ascending: int64 [pieces, num_ranks, held] on the
        CPU."""
        job, hosting, pieces = self.job, self.hosting, self.cut.pieces
        if hosting.counts is not None and hosting.several:
            masks = None if not self.groups else self._apart()[:, :, job.rank]
            if self.cut.by == "experts":
                masks = np.broadcast_to(self._of_expert(), (job.num_ranks, len(hosting.hosts)))
            return torch.as_tensor(dealt_pieces(hosting, job.topology, job.rank, pieces, masks))
        num_held = np.bincount(hosting.holder, minlength=job.num_ranks).tolist()
        own = num_held[job.rank]
        tables = self.cut.tables
        key = held * pieces + piece if tables > 1 else held
        table = torch.bincount(key, minlength=len(hosting.holder) * tables).view(-1, tables)
        every = all_to_all(table, num_held, [own] * job.num_ranks, job.world if job.num_ranks > 1 else None)
        told = every.view(job.num_ranks, own, tables).permute(2, 0, 1).cpu()
        if tables == pieces:
            return told
        own_experts = np.sort(hosting.held)
        of = torch.as_tensor(self._apart()[:, own_experts, job.rank] if self.groups else self._of_expert()[own_experts])
        return torch.where(of == torch.arange(pieces)[:, None, None], told, 0)

    def _of_expert(self) -> np.ndarray:
        """Piece of each expert, int [E]."""
        return expert_pieces(self.hosting.owner, self.cut.pieces)

    def _apart(self) -> np.ndarray:
        """Piece of what goes from each rank for each expert to each rank, int [source, E, rank]."""
        num_ranks, hosting = self.job.num_ranks, self.hosting
        found = np.broadcast_to(apart(num_ranks, self.groups)[:, None, :], (num_ranks, *hosting.hosts.shape)).copy()
        rank = np.arange(num_ranks)
        found[rank, :, rank] = np.where(hosting.copied.T, self.groups, found[rank, :, rank])
        return found

    def gradients(self) -> torch.Tensor:
        found = torch.zeros(self.ids.numel(), dtype=self.weights.dtype, device=self.ids.device)
        (leg,) = self.legs
        assert leg is not None
        assert leg.order is not None
        assert self.dweight is not None
        found[leg.item * self.ids.shape[1] + leg.order] = self.dweight
        return found.view(self.ids.shape)


def apart(num_ranks: int, num_groups: int) -> np.ndarray:
    """How many groups lie from one rank to another, going around, int [source, rank]."""
    group = np.arange(num_ranks) * num_groups // num_ranks
    return (group[None, :] - group[:, None]) % num_groups


def flat_bytes(
    routing: Routing, placement: Placement, row_bytes: int, kept: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Planned bytes of the flat exchange, [num_ranks, num_ranks] from -> to, by part (see ``System.planned_bytes``)."""
    num_ranks = placement.hosts.shape[1]
    matrix = np.zeros((num_ranks, num_ranks))
    if kept is None:
        np.add.at(matrix.T, placement.owner, expert_counts(routing).T * float(row_bytes))
    else:
        target = placement.owner[routing.ids][kept]  # [T, k]
        source = np.broadcast_to(routing.source[:, None], routing.ids.shape)[kept]
        np.add.at(matrix, (source, target), float(row_bytes))
    np.fill_diagonal(matrix, 0)
    counts = np.broadcast_to(placement.hosts.sum(0) * 8.0, (num_ranks, num_ranks)).copy()  # int64 per expert
    np.fill_diagonal(counts, 0)
    return there_and_back(counts, matrix)
