"""Native systems that differ by their exchange alone: whole experts behind metadata, dispatch and combine."""

from __future__ import annotations

import abc

import torch

from harness.comm.exchange import Exchange
from harness.comm.handover import pop
from harness.comm.job import Job
from harness.layer.experts import Experts, IdentityExperts
from harness.layer.gates import Gated
from harness.layer.moe import UnifiedSystem
from harness.layer.weights import Weights
from harness.placement import Placement
from harness.plan.layouts import NativeTasks
from harness.plan.moving import resize
from harness.plan.passage import Passage
from harness.plan.planned import PlannedLayer, PlannedPassage
from harness.plan.priced import native
from harness.plan.segment import Segment
from harness.system import Case


class NativeLayer(PlannedLayer):
    """Whole experts on their ranks behind an exchange."""

    def __init__(self, case: Case, exchange: Exchange, weights: Weights, rank: int):
        super().__init__(case, exchange.job, weights)
        self.exchange_ = exchange
        if case.identity_experts:
            self.experts = IdentityExperts()
        else:
            self.experts = Experts(weights, case.placement.local(rank).tolist(), case.device)
            self.experts.stand_in = case.stand_in_costs

        self.routed: tuple[torch.Tensor, torch.Tensor | None] | None = (
            None  # the gate's ids and kept, of the last batch
        )

    def place(self, placement: Placement) -> None:
        """Experts, which have been moved, are where ``placement`` says from now on."""
        self.exchange_.place(placement)
        if isinstance(self.experts, Experts):
            self.experts.local = placement.local(self.rank).tolist()
            resize(list(self.experts.parameters()), None, len(self.experts.local))  # if nothing was moved here

    def passage(self, gated: Gated | None = None) -> NativePassage:
        return NativePassage(self, gated)


class NativePassage(NativeTasks, PlannedPassage):
    layer: NativeLayer

    def __init__(self, layer: NativeLayer, gated: Gated | None):
        super().__init__(layer, gated)
        self.metadata, self.dispatch, self.experts, self.combine = (Segment() for _ in range(4))

    def _metadata(self, weights: torch.Tensor) -> torch.Tensor:
        self.layer.routed = (self.ids, self.kept)
        self.plan = self.layer.exchange_.plan(self.ids, weights, self.kept)
        return self.plan.weights

    def _dispatch(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layer.exchange_.dispatch(rows, self.plan)

    def _experts(self, arrived: torch.Tensor) -> torch.Tensor:
        return self.layer.experts(arrived, self.plan.counts)

    def _experts_back(self, dmade: torch.Tensor | None) -> torch.Tensor | None:
        return self.experts.backward(dmade)[0]

    def _combine(self, made: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.plan.weights = weights
        return self.layer.exchange_.combine(made, self.plan)

    def depart(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def arrive(self) -> torch.Tensor:
        return pop(self, "home")

    def depart_back(self, dhome: torch.Tensor | None) -> None:
        self.dhome = dhome

    def arrive_back(self) -> torch.Tensor | None:
        return pop(self, "drows")

    def forward_metadata(self) -> None:
        self.at_experts = self.metadata.forward(self._metadata, self.weights)

    def forward_dispatch(self) -> None:
        self.arrived = self.dispatch.forward(self._dispatch, pop(self, "rows"))

    def forward_experts(self) -> None:
        self.made = self.experts.forward(self._experts, pop(self, "arrived"))

    def forward_combine(self) -> None:
        self.home = self.combine.forward(self._combine, pop(self, "made"), pop(self, "at_experts"))

    def backward_combine(self) -> None:
        self.dmade, self.dat_experts = self.combine.backward(pop(self, "dhome"))

    def backward_experts(self) -> None:
        self.darrived = self._experts_back(pop(self, "dmade"))

    def backward_dispatch(self) -> None:
        (self.drows,) = self.dispatch.backward(pop(self, "darrived"))

    def backward_metadata(self) -> None:
        (self.dweights,) = self.metadata.backward(pop(self, "dat_experts"))


class NativeSystem(UnifiedSystem):
    """A native system that differs by its exchange alone."""

    stands_in = True

    @classmethod
    @abc.abstractmethod
    def exchange(cls, case: Case, job: Job) -> Exchange:
        """Collective: the exchange of this rank."""

    @classmethod
    def layout(cls, case: Case) -> Passage | None:
        return native(cls, case)

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> NativeLayer:
        return NativeLayer(case, cls.exchange(case, job), weights, job.rank)
