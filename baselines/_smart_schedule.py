"""FasterMoE's smart schedule: the exchange in n groups of ranks, and the experts on what has arrived (PPoPP 2022,
section 4.3). Group i of ranks exchanges with group i + j at once, for j = 0, 1, ...; the experts compute on part j
while part j + 1 travels, and on tokens of shadows last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from harness.comm.exchange import FlatExchange, FlatJourney, apart
from harness.comm.journey import Cut, Journey
from harness.comm.replicas import travel
from harness.errors import bad
from harness.layer.gates import Gated
from harness.options import whole
from harness.plan.cost import Cost
from harness.plan.graph import COMPUTE, INTER, Plan, Work
from harness.plan.passage import Direction
from harness.plan.priced import PARTS, PricedReplicated, all_to_all, expert_work
from harness.plan.replicated import Policy, ReplicatedLayer, ReplicatedPassage, ReplicatedSystem
from harness.plan.schedule import AWAY, Tasks
from harness.plan.slots import ExchangeSlot, Options, ScheduleSlot, Serial
from harness.routing.certificate import expert_counts
from harness.system import Case

GROUPS = 4


class Groups(ScheduleSlot):
    """Parts are pieces of the batch: one for each distance between groups of ranks, and what stays with a copy."""

    name = "fastermoe"
    options: ClassVar[Options] = {
        "groups": f"of ranks in the smart schedule, 1: none (default: {GROUPS}, or as many as divide the ranks)"
    }

    title: ClassVar[str] = (
        "FasterMoE's smart schedule: groups of ranks exchange at once, experts compute on what is there"
    )
    source: ClassVar[str] = "PPoPP 2022 (He et al.), section 4.3"

    def clashes(self, parts: Mapping[str, Any]) -> str | None:
        if not getattr(parts["state"], "in_groups", False):
            return "it computes what stays with a shadow last, and of the states only fastermoe has shadows"
        return None

    def refuse(self, case: Case, exchange: ExchangeSlot) -> str | None:
        if exchange.name != "flat" and num_groups(case) > 1:
            return (
                f"groups of ranks exchange at once, which the exchange {exchange.name} cannot; take the exchange flat"
            )
        return None

    def cut(self, case: Case, exchange: ExchangeSlot) -> Cut:
        groups = 1 if case.identity_experts else num_groups(case)
        return Cut() if groups == 1 else Cut(groups + 1, groups + 1, whole=False, by="ranks")

    def names(self, tasks: Tasks, direction: Direction) -> list[str]:
        if tasks.cut.whole:
            return super().names(tasks, direction)
        return [*(f"experts[{j}]" for j in range(tasks.cut.pieces - 1)), "experts"]

    def lay(
        self, plan: Plan, tasks: Tasks, direction: Direction, prefix: str, after: Iterable[str], gradients: Work | None
    ) -> list[str]:
        if tasks.cut.whole:
            return Serial().lay(plan, tasks, direction, prefix, after, gradients)
        groups, (out, home), forward = range(tasks.cut.pieces - 1), AWAY[direction], direction == "forward"
        if forward:
            after = [plan.put(f"{prefix}metadata", INTER, after, tasks.work(direction, "metadata", (0,)))]
        sent = [plan.put(f"{prefix}{out}[{j}]", INTER, after, tasks.work(direction, "out", (0, j))) for j in groups]
        ready = tasks.ready(plan, prefix) if forward else tasks.ready_back()
        if gradients is not None:
            plan.put(f"{prefix}gradients", INTER, (), gradients)
        made = [
            plan.put(f"{prefix}experts[{j}]", COMPUTE, [sent[j]], tasks.work(direction, "experts", (j,)))
            for j in groups
        ]
        last = plan.put(f"{prefix}experts", COMPUTE, [sent[-1], *ready], tasks.work(direction, "stays"))
        for j in groups:
            came = plan.put(f"{prefix}{home}[{j}]", INTER, [made[j]], tasks.work(direction, "home", (0, j)))
        return [last, came]


def num_groups(case: Case) -> int:
    """By a case's options."""
    num_ranks = case.topology.num_ranks
    wanted = whole(case, "groups", math.gcd(GROUPS, num_ranks), num_ranks)
    if num_ranks % wanted:
        raise bad("options.groups", wanted, f"must divide the {num_ranks} ranks")
    return wanted


class GroupedLayer(ReplicatedLayer):
    def passage(self, gated: Gated | None = None) -> GroupedPassage:
        return GroupedPassage(self, gated)


class GroupedPassage(ReplicatedPassage):
    def start(self) -> Journey:
        if self.cut.whole or not isinstance(self.schedule, Groups):
            return super().start()
        exchange = self.layer.exchange_
        assert isinstance(exchange, FlatExchange)
        groups = self.cut.pieces - 1
        return FlatJourney(exchange.job, self.ids, self.weights, self.kept, self.hosting(), self.cut, groups)

    def _experts(self, arrived: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        own = len(self.own.local(self.layer.rank))
        if counts[own:].any():
            return super()._experts(arrived, counts)
        return self.layer.experts(arrived, counts[:own])  # what travels does not wait for copies

    def forward_stays(self) -> None:
        last = self.cut.pieces - 1
        self.forward_out(0, last)
        self.forward_experts(last)
        self.forward_home(0, last)

    def backward_stays(self) -> None:
        last = self.cut.pieces - 1
        self.backward_out(0, last)
        self.backward_experts(last)
        self.backward_home(0, last)


class PricedGroups(PricedReplicated):
    def __init__(self, system: type[ReplicatedSystem], case: Case, policy: Policy):
        super().__init__(system, case, policy)
        self.grouped = isinstance(self.schedule, Groups) and not self.cut.whole
        if not self.grouped:
            return
        groups = self.cut.pieces - 1
        self.masks = apart(case.topology.num_ranks, groups) == np.arange(groups)[:, None, None]  # [n, source, rank]
        self.by_group = travel(expert_counts(case.routing), self.hosts, self.topology, self.masks).computed
        copied = self.hosts & ~case.placement.hosts
        self.staying = np.where(copied.T, self.travels.stays, 0.0)  # [W, E]
        self.by_group[0] -= self.staying

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        if not self.grouped:
            return super().work(direction, task, part)
        away, home = AWAY[direction]
        cost: Cost | None
        match task:
            case "stays":
                cost = expert_work(self.case, self.staying, direction) if self.staying.any() else None
            case "experts":
                cost = expert_work(self.case, self.by_group[part[0]], direction)
            case "out" | "home":
                matrix, mask = self.fares.bytes(PARTS[direction][away if task == "out" else home]), self.masks[part[1]]
                assert matrix is not None
                cost = all_to_all(matrix * (mask if task == "out" else mask.T))
            case _:
                return super().work(direction, task, part)
        return Work(cost)
