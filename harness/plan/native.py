"""Native systems: whole experts behind an exchange, in the order of a schedule.

class Mine(NativeSystem):
    exchange = MyExchange()  # an ``ExchangeSlot``; by default the flat all-to-all
    schedule = MySchedule()  # a ``ScheduleSlot``; by default one thing after another
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from harness.comm.assign import Hosting
from harness.comm.exchange import Exchange
from harness.comm.handover import pop
from harness.comm.job import Job
from harness.comm.journey import Cut, Journey
from harness.comm.trip import Trip
from harness.layer.experts import Experts, IdentityExperts
from harness.layer.gates import Gated
from harness.layer.moe import UnifiedSystem
from harness.layer.weights import Weights
from harness.placement import Placement
from harness.plan.layouts import NativeTasks
from harness.plan.moving import resize
from harness.plan.passage import Direction, Passage
from harness.plan.planned import PlannedLayer, PlannedPassage
from harness.plan.priced import PricedNative
from harness.plan.segment import Segment
from harness.plan.slots import COMMON, ExchangeSlot, Fares, FlatSlot, Reach, ScheduleSlot, Serial
from harness.routing.types import Routing
from harness.system import Case, GradientSlices, MoELayer


class NativeLayer(PlannedLayer):
    """Whole experts on their ranks behind an exchange. ``cut``: of the next batches."""

    def __init__(self, system: type[NativeSystem], case: Case, job: Job, weights: Weights):
        super().__init__(case, job, weights)
        self.exchange_: Exchange = system.exchange.make(case, job)
        self.schedule, self.cut, self.exchange_dtype = system.schedule, system.cut(case), case.exchange_dtype
        self.num_hops = system.exchange.num_hops(case)
        self.experts = IdentityExperts() if case.identity_experts else system.experts(case, job, weights)
        self.routed: tuple[torch.Tensor, torch.Tensor | None] | None = (
            None  # the gate's ids and kept, of the last batch
        )

    @property
    def placement(self) -> Placement:
        return self.exchange_.placement

    def place(self, placement: Placement) -> None:
        """Experts, which have been moved, are where ``placement`` says from now on."""
        self.exchange_.place(placement)
        if isinstance(self.experts, Experts):
            self.experts.local = placement.local(self.rank).tolist()
            resize(list(self.experts.parameters()), None, len(self.experts.local))  # if nothing was moved here

    def passage(self, gated: Gated | None = None) -> NativePassage:
        return NativePassage(self, gated)


class NativePassage(NativeTasks, PlannedPassage):
    """``journey``: of the batch, once its metadata is there."""

    layer: NativeLayer
    journey: Journey
    there: Trip
    back: Trip

    def __init__(self, layer: NativeLayer, gated: Gated | None):
        super().__init__(layer, gated)
        self.schedule, self.num_hops = layer.schedule, layer.num_hops
        self.cut, self.weights_travel = layer.cut, layer.exchange_.weights_travel
        self.segments = [Segment() for _ in range(1 if self.cut.whole else self.cut.pieces)]

    # ------------------------------------------------------------------ what the experts do; a subclass has copies

    def hosting(self) -> Hosting:
        """Collective where it has to ask: who holds what in this batch."""
        return self.layer.exchange_.hosting

    def _experts(self, arrived: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return self.layer.experts(arrived, counts)

    def _experts_back(self, segment: Segment, dmade: torch.Tensor) -> torch.Tensor | None:
        return segment.backward(dmade)[0]

    def start(self) -> Journey:
        return self.layer.exchange_.journey(self.ids, self.weights, self.kept, self.hosting(), self.cut)

    # ------------------------------------------------------------------ between gate and mix

    def depart(self, rows: torch.Tensor) -> None:
        self.rows = rows.detach()
        if not self.tells:
            self.forward_metadata(0)

    def arrive(self) -> torch.Tensor:
        home = self.there.end()
        return home.requires_grad_(torch.is_grad_enabled() and not home.requires_grad)

    def depart_back(self, dhome: torch.Tensor | None) -> None:
        self.dhome = dhome

    def arrive_back(self) -> torch.Tensor:
        if self.journey.learns:
            self.dweights = self.journey.gradients().to(self.weights_dtype)
        return self.back.end()

    # ------------------------------------------------------------------ tasks

    @torch.no_grad()
    def forward_metadata(self, hop: int) -> None:
        if not hop:
            self.layer.routed = (self.ids, self.kept)
            self.weights_dtype = self.weights.dtype
            self.journey = self.start()
            self.journey.exchange_dtype = self.layer.exchange_dtype
        self.journey.tell(hop)
        if not hop:
            rows = pop(self, "rows")
            self.none = rows.new_zeros(1, 1).expand(rows.shape)
            self.there = self.layer.exchange_.trip(self.journey, "forward")
            self.there.begin(rows)

    @torch.no_grad()
    def forward_out(self, hop: int, chunk: int) -> None:
        self.there.out(hop, chunk)

    def forward_experts(self, batch: int) -> None:
        for piece in self._pieces("forward", batch):
            counts = torch.from_numpy(self.journey.counts.sum(0) if piece is None else self.journey.counts[piece])
            arrived = self.there.arrived(piece).requires_grad_(torch.is_grad_enabled())
            made = self.segments[piece or 0].forward(lambda rows, counts=counts: self._experts(rows, counts), arrived)
            self.there.give(piece, made.detach())

    @torch.no_grad()
    def forward_home(self, hop: int, chunk: int) -> None:
        self.there.home(hop, chunk)

    @torch.no_grad()
    def forward_settle(self, chunk: int) -> None:
        self.there.settle(chunk)

    @torch.no_grad()
    def backward_out(self, hop: int, chunk: int) -> None:
        if not hop and not chunk:
            dhome = pop(self, "dhome")
            self.back = self.layer.exchange_.trip(self.journey, "backward")
            self.back.begin(self.none if dhome is None else dhome)
        self.back.out(hop, chunk)

    @torch.no_grad()
    def backward_metadata(self, hop: int) -> None:
        self.journey.tell_back(hop)

    def backward_experts(self, batch: int) -> None:
        for piece in self._pieces("backward", batch):
            dmade = self.back.arrived(piece)
            drows = self._experts_back(self.segments[piece or 0], dmade)
            self.back.give(piece, torch.zeros_like(dmade) if drows is None else drows)

    @torch.no_grad()
    def backward_home(self, hop: int, chunk: int) -> None:
        self.back.home(hop, chunk)

    @torch.no_grad()
    def backward_settle(self, chunk: int) -> None:
        self.back.settle(chunk)

    def _pieces(self, direction: Direction, batch: int) -> list[int | None]:
        return [None] if self.cut.whole else list(self.cut.of_chunk(direction, batch))


class NativeSystem(UnifiedSystem):
    """A choice of exchange and schedule, whose experts stay with their owners."""

    stands_in = True
    exchange: ClassVar[ExchangeSlot] = FlatSlot()
    schedule: ClassVar[ScheduleSlot] = Serial()
    recipe: ClassVar[Mapping[str, str] | None] = None  # what it is as a recipe, by slot; what is left out: the default
    still: ClassVar[Mapping[str, Any]] = {}  # options with which it leaves experts where they are
    copies: ClassVar[bool] = False  # whether experts have more than their owners
    takes: ClassVar[Reach] = "rank"  # who must get a row that is sent to an expert

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.options = {**cls.options, **COMMON}

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        if (unpacked := cls.exchange.unpacked(case)) is not None:
            return unpacked
        refused = cls.exchange.refuse(case) or cls.schedule.refuse(case, cls.exchange) or super().refuse(case)
        return refused or cls.exchange.unreached(case, cls.hosts)

    @classmethod
    def hosts(cls, case: Case) -> np.ndarray:
        """Who holds what in a batch of ``case``, by what is known before it, bool [E, num_ranks]."""
        return case.placement.hosts

    @classmethod
    def cut(cls, case: Case) -> Cut:
        """Of a batch, alike on all ranks."""
        return cls.schedule.cut(case, cls.exchange)

    @classmethod
    def fares(cls, case: Case, routing: Routing, hosts: np.ndarray, counted: bool = False) -> Fares:
        """Of a batch, as ``ExchangeSlot.fares``."""
        return cls.exchange.fares(case, routing, hosts, cls.cut(case), counted)

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        routing = cls.planned_routing(case)
        if routing is None:
            return None
        return cls.fares(case, routing, cls.hosts(case)).parts()

    @classmethod
    def layout(cls, case: Case) -> Passage | None:
        routing = cls.planned_routing(case)
        if routing is None:
            return None
        fares = cls.fares(case, routing, cls.hosts(case))
        return PricedNative(case, cls.schedule, cls.cut(case), fares, cls.planned_rows(case))

    @classmethod
    def experts(cls, case: Case, job: Job, weights: Weights) -> Any:
        """Of one rank, a module."""
        found = Experts(weights, case.placement.local(job.rank).tolist(), case.device)
        found.stand_in = case.stand_in_costs
        return found

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> Any:
        return NativeLayer(cls, case, job, weights)

    @classmethod
    def place_gradients(
        cls, layers: Sequence[MoELayer], case: Case, gradient_bytes: Sequence[int], scope: str
    ) -> list[GradientSlices]:
        degrees, slices = cls.schedule.settle(case, cls.exchange, gradient_bytes, scope)
        for layer, degree in zip(layers, degrees, strict=False):
            assert isinstance(layer, NativeLayer)
            layer.cut = layer.cut._replace(backward=degree)
        return slices

    @classmethod
    def settle(
        cls, cases: Sequence[Case], gradient_bytes: Sequence[int], scope: str
    ) -> tuple[list[Case], list[GradientSlices]]:
        degrees, slices = cls.schedule.settle(cases[0], cls.exchange, gradient_bytes, scope)
        cuts = [cls.cut(case) for case in cases]
        for i, degree in enumerate(reversed(degrees)):
            cuts[i] = cuts[i]._replace(backward=degree)
        return [cls.schedule.fixed(case, cut) for case, cut in zip(cases, cuts, strict=True)], slices


__all__ = ["NativeLayer", "NativePassage", "NativeSystem"]
