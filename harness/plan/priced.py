"""Priced twins: the tasks of ``harness.plan.layouts`` with what they cost, in numpy, at any number of ranks.

The last axis of every cost is that of the ranks, so skew is never averaged away. Bytes come from the system
(``planned_bytes``, or the exchange's own hops), rows from the routing and who holds which expert, multiply-adds from
``harness.layer.work``. What is copied ahead is decided before the routing is seen, as in the executed layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from harness.comm.assign import expert_pieces
from harness.comm.journey import Cut
from harness.comm.moved import COPIES, LATE_COPIES
from harness.comm.replicas import Travel, travel
from harness.comm.sparse import SparsePlan, plan_sparse
from harness.layer.work import expert_products, gate_macs
from harness.memory import expert_bytes
from harness.plan.cost import Compute, Cost, Even, Experts, InTurn, Transfer, span
from harness.plan.graph import Work
from harness.plan.layouts import CopiedTasks, NativeTasks, OpaqueTasks, ReplicatedTasks, StageWork
from harness.plan.passage import Direction
from harness.plan.schedule import AWAY, Schedule
from harness.routing.certificate import expert_counts
from harness.specs import DTYPE_BYTES, GEMMS, Dtype, Model
from harness.system import Case, System

if TYPE_CHECKING:
    from harness.plan.native import NativeSystem
    from harness.plan.replicated import Policy
    from harness.plan.slots import Fares

Array = np.ndarray

#: part of ``System.planned_bytes`` that a task of an exchange sends
PARTS: dict[Direction, dict[str, str]] = {
    "forward": {"metadata": "metadata", "dispatch": "dispatch", "combine": "combine"},
    "backward": {"combine": "combine_grad", "dispatch": "dispatch_grad", "metadata": "metadata_grad"},
}


def expert_work(case: Case, rows: Array, direction: Direction = "forward", pieces: int = 1) -> Compute | None:
    """Of ``rows`` [.., W, E], of each expert on each rank, in so many ``pieces`` one after another; a backward computes
    twice as many products. None in phase ``exchange``."""
    return None if case.identity_experts else ffn_work(case.model, case.model.ffn, rows, case.dtype, direction, pieces)


def ffn_work(
    model: Model, size: int, rows: Array, dtype: Dtype, direction: Direction = "forward", pieces: int = 1
) -> Compute:
    """The same of FFNs of any ``size``; rows [.., W, 1]: of one that every rank has."""
    times = {"forward": 1, "backward": 2}[direction]
    whole = Compute.of(Experts(rows, expert_products(model, size) * times, DTYPE_BYTES[dtype]))
    return Compute(whole.macs, times * pieces * GEMMS[model.ffn_type], whole.read_bytes, whole.experts)


def shared_work(case: Case, direction: Direction) -> Compute | None:
    """Of all shared experts, through which each rank's own tokens go; None where there are none."""
    if case.identity_experts or not case.model.num_shared_experts:
        return None
    tokens = np.asarray(case.routing.tokens, dtype=np.float64)[:, None]
    return ffn_work(case.model, case.model.shared_size, tokens, case.dtype, direction)


def gate_work(case: Case, direction: Direction) -> Compute | None:
    """None in phase ``exchange``, where the gate is not timed."""
    if case.identity_experts:
        return None
    tokens, times = np.asarray(case.routing.tokens, dtype=np.float64), {"forward": 1, "backward": 2}[direction]
    return Compute(times * tokens * gate_macs(case.model), times, _token_bytes(case) * tokens)


def mix_work(case: Case, parts: int = 1) -> Compute:
    """Reading k rows of a token and writing one, of one of so many parts of the tokens."""
    tokens = np.asarray(case.routing.tokens, dtype=np.float64) / parts
    return Compute(np.zeros(len(tokens)), 1, (1 + case.model.top_k) * _token_bytes(case) * tokens)


def _token_bytes(case: Case) -> int:
    return case.model.hidden * DTYPE_BYTES[case.dtype]


def all_to_all(matrix: Array | None, scope: str = "flat") -> Transfer | None:
    return None if matrix is None else Transfer("a2a", scope, matrix)


# ------------------------------------------------------------------------------------------------------ real packages


class PricedOpaque(OpaqueTasks):
    """Of a system whose bytes can be planned: parts and experts one after another. An exchange of several ``stages``
    goes over rails between the nodes, then inside them, or back."""

    def __init__(self, system: type[System], case: Case, parts: Mapping[str, Array]):
        self.system, self.case, self.parts = system, case, parts
        self.rows = system.planned_rows(case)

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        case, forward = self.case, direction == "forward"
        found: list[Cost | None] = [gate_work(case, direction)] if forward else [mix_work(case)]
        names = PARTS[direction]
        for name in names:
            if name == ("combine" if forward else "dispatch"):
                found.append(expert_work(case, self.rows, direction))
            found.append(self.sent(names[name]))
        found.append(shared_work(case, direction))
        found.append(mix_work(case) if forward else gate_work(case, direction))
        return Work(InTurn(tuple(cost for cost in found if cost is not None)))

    def sent(self, part: str) -> Cost | None:
        """What a part of the exchange costs: each stage what it sends between ranks of its own groups."""
        stages, matrix, topology = self.system.stages, self.parts.get(part), self.case.topology
        if matrix is None:
            return None
        if (operation := self.system.collectives.get(part)) is not None:
            return Even(operation, "flat", matrix.max() * topology.num_ranks)
        away = part in ("metadata", "dispatch", "combine_grad")  # outer stage first; the way home the other way round
        found = []
        for stage in stages if away else stages[::-1]:
            first, behind = span(stage, topology.num_levels)
            level = topology.level_between
            found.append(Transfer("a2a", stage, np.where((first <= level) & (level < behind), matrix, 0.0)))
        return InTurn(tuple(found))


# ----------------------------------------------------------------------------------------------------- native systems


class PricedNative(NativeTasks):
    """``fares``: of the exchange; ``rows`` [W, E]: that each rank computes of each expert."""

    def __init__(self, case: Case, schedule: Schedule, cut: Cut, fares: Fares, rows: Array):
        self.case, self.schedule, self.cut, self.fares, self.rows = case, schedule, cut, fares, rows
        self.num_hops, self.weights_travel = fares.num_hops, fares.weights_travel
        self.share(case)
        by_experts = cut.by == "experts"
        self.piece = expert_pieces(case.placement.owner, cut.pieces) if by_experts else None  # of each expert

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        names, degree = PARTS[direction], self.cut.degree(direction)
        away, home = AWAY[direction]
        match task:
            case "gate":
                return Work(gate_work(self.case, direction))
            case "restore" | "settle":
                if self.schedule.settles and self.piece is None:
                    return Work(mix_work(self.case, degree))
                return Work(mix_work(self.case) if task == "restore" else None)  # chunks may have rows of any token
            case "shared":
                return Work(shared_work(self.case, direction))
            case "experts":
                return Work(self.experts(direction, part[0] if part else 0))
            case "metadata":
                return Work(self.fares.cost(names["metadata"], part[0], 1))
            case "out" | "home":
                name = names[away if task == "out" else home]
                if self.piece is not None:
                    return Work(self.fares.of_piece(part[1]).cost(name, part[0], 1))
                cost = self.fares.cost(name, part[0], degree)
                return Work(self._adding(cost, name, part[0], degree) if task == "home" and self.fares.sums else cost)
        return Work()

    def _adding(self, cost: Cost | None, name: str, hop: int, degree: int) -> Cost | None:
        """With the partial sums that go home over ``hop``: of what a rank's experts made, or of what came over the hop
        before."""
        if not isinstance(cost, Transfer):
            return cost
        inner = self.fares.cost(name, hop + 1, degree) if hop < self.num_hops - 1 else None
        if isinstance(inner, Transfer):
            came = inner.matrix.sum(-2)
        else:
            came = self.rows.sum(-1) * _token_bytes(self.case) / degree
        return dataclasses.replace(cost, summed_bytes=came + cost.matrix.sum(-1))

    def experts(self, direction: Direction, batch: int = 0) -> Cost | None:
        """Of one batch of rows."""
        batches = self.cut.batches(direction)
        if self.piece is not None:
            return expert_work(self.case, np.where(self.piece == batch, self.rows, 0), direction)
        return expert_work(self.case, self.rows / batches, direction, self.cut.pieces // self.cut.degree(direction))


class _Transfers:
    """Chunks that travel by a sparse plan, each of an expert's parameters."""

    def __init__(self, case: Case):
        self.chunk_bytes = float(expert_bytes(case.model, case.dtype))

    def of(self, sparse: SparsePlan, *, home: bool = False) -> StageWork:
        """``home``: the hops backwards, as a reduction takes them."""

        def work(stages: tuple[int, ...], near: bool | None) -> Work:
            matrix = sparse.bytes(self.chunk_bytes, near, stages)
            scope = "inter" if 0 in stages else "intra"
            if not home:
                return Work(Transfer("a2a", scope, matrix))
            return Work(Transfer("a2a", scope, matrix.T, summed_bytes=3 * matrix.sum(-1)))  # added to what is there

        return work


def decided(case: Case, policy: Policy, counts: Array) -> tuple[Array, Array]:
    """P' of a batch with ``counts`` [W, E], bool [E, num_ranks], by what ``policy`` knows ahead of it: before the gate
    and after. Phase ``exchange`` copies nothing."""
    if case.identity_experts:
        return case.placement.hosts, case.placement.hosts
    early = policy.expect(case.placement.owner, case.topology.num_ranks)
    return early, policy.revise(early, counts) if policy.revises else early


class PricedReplicated(ReplicatedTasks, PricedNative):
    """``policy``: with what it knows before the batch of ``case``."""

    def __init__(self, system: type[NativeSystem], case: Case, policy: Policy):
        self.topology, owner = case.topology, case.placement.owner
        counts = expert_counts(case.routing)
        self.revises = policy.revises and not case.identity_experts
        self.rematerialises = policy.rematerialises
        early, hosts = decided(case, policy, counts)
        self.early = plan_sparse(owner, early, self.topology)
        self.late = plan_sparse(owner, (hosts & ~early) | case.placement.hosts, self.topology)
        self.whole = plan_sparse(owner, hosts, self.topology)
        self.hosts, self.transfers = hosts, _Transfers(case)
        self.travels: Travel = travel(counts, hosts, self.topology)
        fares = system.fares(case, case.routing, hosts, counted=True)
        super().__init__(case, system.schedule, system.cut(case), fares, self.travels.computed)

    def copied_bytes(self, *, backward: bool) -> dict[str, float]:
        """Of parameters, that all ranks send for the copies of a batch, by what for (``harness.comm.moved``)."""
        plans, each = (self.early, self.late, self.whole), self.transfers.chunk_bytes
        early, late, again = (float(sparse.bytes(each).sum()) for sparse in plans)
        return {COPIES: early + again * (backward and self.releases), LATE_COPIES: late}

    def transfer(self, what: str, num_tasks: int) -> StageWork:
        sparse = {"gather": self.early, "late": self.late}.get(what, self.whole)
        return self.transfers.of(sparse, home=what == "reduce")


class PricedCopied(CopiedTasks, PricedNative):
    """``case``: whose placement has the copies."""

    def __init__(self, system: type[NativeSystem], case: Case):
        self.topology, placement = case.topology, case.placement
        self.sparse = None if case.identity_experts else plan_sparse(placement.owner, placement.hosts, self.topology)
        self.transfers = _Transfers(case)
        moved = travel(expert_counts(case.routing), placement.hosts, self.topology)
        fares = system.fares(case, case.routing, placement.hosts)
        super().__init__(case, system.schedule, system.cut(case), fares, moved.computed)

    def transfer(self, what: str, num_tasks: int) -> StageWork:
        assert self.sparse is not None
        return self.transfers.of(self.sparse, home=what == "reduce")


__all__ = [
    "PricedCopied",
    "PricedNative",
    "PricedOpaque",
    "PricedReplicated",
    "all_to_all",
    "decided",
    "expert_work",
    "gate_work",
    "mix_work",
]
