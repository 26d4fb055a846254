"""FasterMoE's smart schedule: the exchange in n groups of ranks, and the experts on what has arrived (PPoPP 2022,
section 4.3). Group i of ranks exchanges with group i + j at once, for j = 0, 1, ...; the experts compute on part j
while part j + 1 travels, and on tokens of shadows last."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from harness.comm.exchange import FlatExchange, FlatPlan
from harness.comm.handover import Handover, pop
from harness.comm.replicas import travel
from harness.comm.rows import accumulator
from harness.layer.experts import Experts
from harness.layer.gates import Gated
from harness.plan.graph import COMPUTE, INTER, Plan, Work
from harness.plan.layouts import ReplicatedTasks
from harness.plan.passage import Direction
from harness.plan.priced import PARTS, PricedReplicated, all_to_all, expert_work
from harness.plan.replicated import Policy, ReplicatedLayer, ReplicatedPassage
from harness.plan.segment import Segment
from harness.routing.certificate import expert_counts
from harness.system import Case


class SmartTasks(ReplicatedTasks):
    """``num_groups``: n; with 1 the exchange is whole."""

    num_groups: int

    @property
    def smart(self) -> bool:
        return self.num_groups > 1

    def there_and_back(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        if not self.smart:
            return super().there_and_back(plan, prefix=prefix, after=after, gradients=gradients)
        groups = range(self.num_groups)
        plan.put(f"{prefix}metadata", INTER, after, self.work("forward", "metadata"))
        sent = [plan.put(f"{prefix}dispatch[{j}]", INTER, (), self.work("forward", "send", j)) for j in groups]
        ready = self.ready(plan, prefix)
        if gradients is not None:
            plan.put(f"{prefix}gradients", INTER, (), gradients)
        made = [
            plan.put(f"{prefix}experts[{j}]", COMPUTE, [sent[j]], self.work("forward", "compute", j)) for j in groups
        ]
        last = [plan.put(f"{prefix}experts", COMPUTE, [*sent, *ready], self.work("forward", "shadows"))]
        for j in groups:
            home = plan.put(f"{prefix}combine[{j}]", INTER, [made[j]], self.work("forward", "receive", j))
        return [*last, home]

    def back_and_there(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        if not self.smart:
            return super().back_and_there(plan, prefix=prefix, after=after, gradients=gradients)
        groups = range(self.num_groups)
        sent = [plan.put(f"{prefix}combine[{j}]", INTER, after, self.work("backward", "send", j)) for j in groups]
        made = [
            plan.put(f"{prefix}experts[{j}]", COMPUTE, [sent[j]], self.work("backward", "compute", j)) for j in groups
        ]
        last = [plan.put(f"{prefix}experts", COMPUTE, after, self.work("backward", "shadows"))]
        if gradients is not None:
            plan.put(f"{prefix}gradients", INTER, (), gradients)
        for j in groups:
            home = plan.put(f"{prefix}dispatch[{j}]", INTER, [made[j]], self.work("backward", "receive", j))
        return [*last, home]


class FasterLayer(ReplicatedLayer):
    """``num_groups``: n of the smart schedule."""

    num_groups = 1

    def passage(self, gated: Gated | None = None) -> FasterPassage:
        return FasterPassage(self, gated)


class Part(Handover):
    """One S, C and R: rows between ranks whose groups lie so far apart, or (``home``) those that stay with a shadow."""

    def __init__(self) -> None:
        self.dispatch, self.experts, self.combine = Segment(), Segment(), Segment()
        self.plan: FlatPlan
        self.arrived: torch.Tensor
        self.made: torch.Tensor
        self.home: torch.Tensor | None = None  # None: no row came
        self.grads: list[torch.Tensor | None] = [None, None]  # of the rows and the weights


class AtHome(FlatExchange):
    """Rows that go nowhere."""

    def _out(self, rows: torch.Tensor, plan: FlatPlan) -> torch.Tensor:
        return rows.index_select(0, plan.by_expert)

    def _home(self, rows: torch.Tensor, plan: FlatPlan) -> torch.Tensor:
        return rows.index_select(0, plan.by_source)


class FasterPassage(SmartTasks, ReplicatedPassage):
    """The smart schedule: group i of ranks exchanges with group i + j at once, for j = 0, 1, ...; the experts compute
    on part j while part j + 1 travels, and on shadows' tokens last."""

    layer: FasterLayer

    def __init__(self, layer: FasterLayer, gated: Gated | None):
        super().__init__(layer, gated)
        self.parts = [Part() for _ in range(layer.num_groups)]
        self.shadows = Part()
        self.stay = AtHome(layer.job, layer.placement)
        self.num_groups = layer.num_groups if isinstance(layer.experts, Experts) else 1

    def _plan(self, held: np.ndarray, weights: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
        if not self.smart:
            return super()._plan(held, weights, counts)
        num_ranks = self.layer.job.num_ranks
        distance = apart(num_ranks, len(self.parts))
        copied = self.hosts & ~self.own.hosts  # [E, rank]
        stays = copied[None] & np.eye(num_ranks, dtype=bool)[:, None]  # [source, E, rank]
        masks = [(distance == j)[:, None, :] & ~stays for j in range(len(self.parts))]
        for part, only in zip((*self.parts, self.shadows), (*masks, stays), strict=True):
            part.plan = self.layer.exchange_.plan_to(
                self.hosts, held, self.ids, weights, self.kept, counts, np.broadcast_to(only, stays.shape)
            )
        return weights

    def _combine_part(self, part: Part, exchange: FlatExchange) -> torch.Tensor:
        def combine(made: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            part.plan.weights = weights
            return exchange.combine(made, part.plan)

        return part.combine.forward(combine, pop(part, "made"), self.weights)

    def _compute(self, part: Part) -> None:
        def experts(arrived: torch.Tensor) -> torch.Tensor:
            own = len(self.layer.experts.local)
            if part is self.shadows:
                return self.layer.experts(arrived, part.plan.counts, [each.tensors for each in self.copies])
            return self.layer.experts(arrived, part.plan.counts[:own])

        part.made = part.experts.forward(experts, pop(part, "arrived"))

    def forward_metadata(self) -> None:
        if self.smart:
            self._metadata(self.weights)
        else:
            super().forward_metadata()

    def forward_send(self, j: int) -> None:
        part, exchange = self.parts[j], self.layer.exchange_
        part.arrived = part.dispatch.forward(lambda rows: exchange.dispatch(rows, part.plan), self.rows)

    def forward_compute(self, j: int) -> None:
        self._compute(self.parts[j])

    def forward_receive(self, j: int) -> None:
        self.parts[j].home = self._combine_part(self.parts[j], self.layer.exchange_)

    def forward_shadows(self) -> None:
        part = self.shadows
        if not int(part.plan.counts.sum()):
            return
        part.arrived = part.dispatch.forward(lambda rows: self.stay.dispatch(rows, part.plan), self.rows)
        self._compute(part)
        part.home = self._combine_part(part, self.stay)

    def backward_send(self, j: int) -> None:
        self._back_send(self.parts[j])

    def backward_compute(self, j: int) -> None:
        self._back_compute(self.parts[j])

    def backward_receive(self, j: int) -> None:
        self._back_receive(self.parts[j])

    def backward_shadows(self) -> None:
        if self.shadows.home is not None:
            for step in (self._back_send, self._back_compute, self._back_receive):
                step(self.shadows)

    def _back_send(self, part: Part) -> None:
        part.grads = part.combine.backward(self.dhome)

    def _back_compute(self, part: Part) -> None:
        part.grads[:1] = part.experts.backward(part.grads[0])

    def _back_receive(self, part: Part) -> None:
        part.grads[:1] = part.dispatch.backward(part.grads[0])

    def arrive(self) -> torch.Tensor:
        if not self.smart:
            return super().arrive()
        homes = [part.home for part in (*self.parts, self.shadows) if part.home is not None]
        whole = torch.stack([home.detach() for home in homes]).sum(0, dtype=accumulator(homes[0].dtype))
        return whole.to(homes[0].dtype).requires_grad_(any(home.requires_grad for home in homes))

    def arrive_back(self) -> torch.Tensor | None:
        if not self.smart:
            return super().arrive_back()
        drows, dweights = zip(*(pop(part, "grads") for part in (*self.parts, self.shadows)), strict=True)
        self.dhome = None
        self.dweights = _sum(dweights)
        return _sum(drows)


def _sum(parts: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    if not there:
        return None
    return torch.stack(there).sum(0, dtype=accumulator(there[0].dtype)).to(there[0].dtype)


class PricedSmart(SmartTasks, PricedReplicated):
    """``num_groups``: of the smart schedule."""

    def __init__(self, case: Case, policy: Policy, num_groups: int):
        super().__init__(case, policy)
        self.num_groups = 1 if case.identity_experts else num_groups
        if not self.smart:
            return
        num_ranks = case.topology.num_ranks
        distance = apart(num_ranks, num_groups)
        self.masks = distance == np.arange(num_groups)[:, None, None]  # [n, source, rank]
        self.by_group = travel(expert_counts(case.routing), self.hosts, self.topology, self.masks).computed
        copied = self.hosts & ~case.placement.hosts
        self.staying = np.where(copied.T, self.travels.stays, 0.0)  # [W, E]
        self.by_group[0] -= self.staying

    def work(self, direction: Direction, task: str, part: int | None = None) -> Work:
        if task == "shadows":
            return Work(expert_work(self.case, self.staying, direction) if self.staying.any() else None)
        if part is None:
            return super().work(direction, task)
        if task == "compute":
            return Work(expert_work(self.case, self.by_group[part], direction))
        away = (task == "send") == (direction == "forward")
        name = PARTS[direction]["dispatch" if away else "combine"]
        mask = self.masks[part]
        return Work(all_to_all(self.parts[name] * (mask if task == "send" else mask.T)))


def apart(num_ranks: int, num_groups: int) -> np.ndarray:
    """How many groups lie from one rank to another, going around, int [source, rank]."""
    group = np.arange(num_ranks) * num_groups // num_ranks
    return (group[None, :] - group[:, None]) % num_groups
