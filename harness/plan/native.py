"""Native systems that differ by their exchange alone: whole experts behind metadata, dispatch and combine."""

from __future__ import annotations

import abc
from collections.abc import Iterable

import torch

from harness.comm.exchange import Exchange
from harness.comm.handover import pop
from harness.comm.job import Job
from harness.layer.experts import Experts, IdentityExperts
from harness.layer.gates import Gated
from harness.layer.moe import UnifiedSystem
from harness.layer.weights import Weights
from harness.placement import Placement
from harness.plan.graph import COMPUTE, INTER, Plan, Work
from harness.plan.moving import resize
from harness.plan.planned import PlannedLayer, PlannedPassage
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


class NativePassage(PlannedPassage):
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

    def ready(self, plan: Plan, prefix: str) -> list[str]:
        """What the experts' forward waits for beside the tokens. Called when these have their place in the plan."""
        return []

    def ready_back(self) -> list[str]:
        """What the experts' backward waits for beside the gradients of their outputs."""
        return []

    def there_and_back(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        def metadata() -> None:
            self.at_experts = self.metadata.forward(self._metadata, self.weights)

        def dispatch() -> None:
            self.arrived = self.dispatch.forward(self._dispatch, pop(self, "rows"))

        def experts() -> None:
            self.made = self.experts.forward(self._experts, pop(self, "arrived"))

        def combine() -> None:
            self.home = self.combine.forward(self._combine, pop(self, "made"), pop(self, "at_experts"))

        plan.add(f"{prefix}metadata", INTER, after, run=metadata)
        arrived = plan.add(f"{prefix}dispatch", INTER, run=dispatch)
        needed = [arrived, *self.ready(plan, prefix)]
        if gradients is not None:
            plan.add(f"{prefix}gradients", INTER, (), gradients.cost, gradients.run)
        last = plan.add(f"{prefix}experts", COMPUTE, needed, run=experts)
        return [plan.add(f"{prefix}combine", INTER, [last], run=combine)]

    def back_and_there(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        def combine() -> None:
            self.dmade, self.dat_experts = self.combine.backward(pop(self, "dhome"))

        def experts() -> None:
            self.darrived = self._experts_back(pop(self, "dmade"))

        def dispatch() -> None:
            (self.drows,) = self.dispatch.backward(pop(self, "darrived"))

        def metadata() -> None:
            (self.dweights,) = self.metadata.backward(pop(self, "dat_experts"))

        last = plan.add(f"{prefix}combine", INTER, after, run=combine)
        last = plan.add(f"{prefix}experts", COMPUTE, [last, *self.ready_back()], run=experts)
        if gradients is not None:
            plan.add(f"{prefix}gradients", INTER, (), gradients.cost, gradients.run)
        plan.add(f"{prefix}dispatch", INTER, [last], run=dispatch)
        return [plan.add(f"{prefix}metadata", INTER, run=metadata)]


class NativeSystem(UnifiedSystem):
    """A native system that differs by its exchange alone."""

    stands_in = True

    @classmethod
    @abc.abstractmethod
    def exchange(cls, case: Case, job: Job) -> Exchange:
        """Collective: the exchange of this rank."""

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> NativeLayer:
        return NativeLayer(case, cls.exchange(case, job), weights, job.rank)
