"""The slots of a native system: how rows travel, and in which order; as a system names them, with their options.

Each says the same thing three ways: how it runs on a rank, what it costs, and what it refuses.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from harness.comm.assign import expert_pieces
from harness.comm.exchange import Exchange, FlatExchange, flat_bytes
from harness.comm.job import Job
from harness.comm.journey import Cut
from harness.comm.replicas import bytes_of_rows, replica_bytes, travel
from harness.dtypes import row_bytes
from harness.plan.cost import Cost, Transfer
from harness.plan.schedule import Chunks, Schedule
from harness.routing.certificate import expert_counts
from harness.routing.types import Routing
from harness.system import Case, GradientSlices

#: option -> one-line meaning with its default
Options = Mapping[str, str]
OVERLAP = "overlap_shared"
#: of every schedule
COMMON: Options = {OVERLAP: "shared experts beside the exchange, as Megatron-Core can (default false: before it)"}
#: who gets a row that is sent to an expert: one rank that holds it, or all ranks of its node
Reach = Literal["rank", "node"]


class Fares(abc.ABC):
    """What the exchange of one batch sends, and what that costs. Parts are those of ``System.planned_bytes``.
    ``weights_travel``: as ``harness.comm.exchange.Exchange`` has it."""

    num_hops: int
    weights_travel: ClassVar[bool] = False

    @property
    def sums(self) -> bool:
        """Whether rows of one token are added up before they go home."""
        return False

    @abc.abstractmethod
    def bytes(self, part: str) -> np.ndarray | None:
        """Over all hops, float64 [num_ranks, num_ranks], diagonal 0; None: nothing is sent."""

    @abc.abstractmethod
    def cost(self, part: str, hop: int, degree: int) -> Cost | None:
        """Of one hop of one of ``degree`` chunks; of metadata, of the hop."""

    def of_piece(self, piece: int) -> Fares:
        """What one piece sends, where pieces are of experts (``Cut.by``) and so differ."""
        raise NotImplementedError(f"{type(self).__name__} has no pieces of experts")

    def parts(self) -> dict[str, np.ndarray]:
        names = ("metadata", "dispatch", "combine", "combine_grad", "dispatch_grad", "metadata_grad")
        return {name: matrix for name in names if (matrix := self.bytes(name)) is not None}


class ExchangeSlot(abc.ABC):
    """``name``, ``title`` (one line) and ``source``: in recipes. ``stages``: as ``System.stages``."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    options: ClassVar[Options] = {}
    stages: ClassVar[tuple[str, ...]] = ("flat",)
    reaches: ClassVar[Reach] = "rank"
    packs: ClassVar[bool] = False  # whether its rows may travel in another format (harness.comm.packing)

    def refuse(self, case: Case) -> str | None:
        """Why it cannot carry this case, as data."""
        return None

    def unpacked(self, case: Case) -> str | None:
        """Why its rows cannot travel in the case's ``exchange_dtype``, as data."""
        if (sent := case.exchange_dtype) is None:
            return None
        if not self.packs:
            return f"exchange {self.name} sends rows in the format that is computed in, not as {sent}"
        if case.topology.num_ranks == 1:
            return f"one rank sends no rows, as {sent} or otherwise"
        return f"gate softmoe sends mixtures of tokens, not rows as {sent}" if case.model.gate == "softmoe" else None

    def unreached(self, case: Case, hosts: Callable[[Case], np.ndarray]) -> str | None:
        """Why it cannot bring rows to ``hosts``, bool [E, num_ranks] of a case, as data."""
        return None

    @abc.abstractmethod
    def num_hops(self, case: Case) -> int: ...

    @abc.abstractmethod
    def make(self, case: Case, job: Job) -> Exchange:
        """Collective: the exchange of this rank."""

    @abc.abstractmethod
    def fares(self, case: Case, routing: Routing, hosts: np.ndarray, cut: Cut, counted: bool = False) -> Fares:
        """Of a batch of ``routing`` to the nearest of ``hosts`` bool [E, num_ranks]. ``counted``: every rank is told
        all ranks' counts, whatever the exchange needs."""

    def chunks(self, case: Case) -> int:
        """Into how many a schedule cuts it that leaves that to the exchange."""
        return 1


def in_bytes(case: Case, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``parts`` of an exchange, [num_ranks, num_ranks], that count rows; those of metadata are bytes already."""
    return {part: of if part.startswith("metadata") else of * row_bytes(case, part) for part, of in parts.items()}


class FlatFares(Fares):
    num_hops = 1

    def __init__(self, parts: Mapping[str, np.ndarray], pieces: Sequence[Mapping[str, np.ndarray]] = ()):
        self._parts, self._pieces = parts, pieces

    def bytes(self, part: str) -> np.ndarray | None:
        return self._parts.get(part)

    def cost(self, part: str, hop: int, degree: int) -> Cost | None:
        matrix = self.bytes(part)
        return None if matrix is None else Transfer("a2a", "flat", matrix / degree if degree > 1 else matrix)

    def of_piece(self, piece: int) -> Fares:
        return FlatFares(self._pieces[piece])


class FlatSlot(ExchangeSlot):
    """One all-to-all-v over all ranks, exact sizes."""

    name = "flat"
    title = "one all-to-all-v over all ranks, exact sizes"
    source = "expert parallelism of GShard (arXiv 2006.16668)"
    packs = True

    def num_hops(self, case: Case) -> int:
        return 1

    def make(self, case: Case, job: Job) -> Exchange:
        return FlatExchange(job, case.placement)

    def fares(self, case: Case, routing: Routing, hosts: np.ndarray, cut: Cut, counted: bool = False) -> Fares:
        if counted or (hosts.sum(1) > 1).any():
            parts = replica_bytes(routing, hosts, case.topology, 1)
        else:
            parts = flat_bytes(routing, case.placement, 1)
        pieces: list[dict[str, np.ndarray]] = []
        if cut.by == "experts":
            piece, counts = expert_pieces(case.placement.owner, cut.pieces), expert_counts(routing)
            for each in range(cut.pieces):
                rows = travel(np.where(piece == each, counts, 0), hosts, case.topology).rows
                pieces.append(in_bytes(case, bytes_of_rows(rows, len(hosts), 1)))
        parts = in_bytes(case, parts)
        return FlatFares({**parts, "metadata": parts["metadata"] * cut.tables}, pieces)


class ScheduleSlot(Schedule, abc.ABC):
    """A schedule with how it cuts a batch, and where it puts gradients. ``name``, ``title``, ``source``: in recipes."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    options: ClassVar[Options] = {}
    #: options with which it cuts a batch into several chunks
    chunked: ClassVar[Mapping[str, Any]] = {}

    def refuse(self, case: Case, exchange: ExchangeSlot) -> str | None:
        return None

    @abc.abstractmethod
    def cut(self, case: Case, exchange: ExchangeSlot) -> Cut:
        """Alike on all ranks."""

    def settle(
        self, case: Case, exchange: ExchangeSlot, gradient_bytes: Sequence[int], scope: str
    ) -> tuple[list[int], list[GradientSlices]]:
        """Of a training step, last layer first: into how many chunks backwards are cut (none: as they are), and slices.
        ``case``: of the first layer."""
        return [], [GradientSlices()] * len(gradient_bytes)

    def fixed(self, case: Case, cut: Cut) -> Case:
        """``case`` with options by which it is cut so."""
        return case


class Serial(Chunks, ScheduleSlot):
    """One thing after another."""

    name = "serial"
    title = "one thing after another"
    source = "as every framework without overlap"

    def cut(self, case: Case, exchange: ExchangeSlot) -> Cut:
        return Cut()


class Pipelined(Chunks, ScheduleSlot):
    """Hops of a chunk beside those of others; experts compute once all have come."""

    name = "pipelined"
    title = "hops of a chunk beside those of others; experts compute once all have come"
    source = "arXiv 2508.09591, section III"
    options: ClassVar[Options] = {"chunks": "pieces of the batch whose hops overlap (default: as the exchange has it)"}
    chunked: ClassVar[Mapping[str, Any]] = {"chunks": 3}

    def cut(self, case: Case, exchange: ExchangeSlot) -> Cut:
        chunks = exchange.chunks(case)
        return Cut(chunks, chunks)


__all__ = ["ExchangeSlot", "Fares", "FlatFares", "FlatSlot", "Pipelined", "ScheduleSlot", "Serial", "in_bytes"]
