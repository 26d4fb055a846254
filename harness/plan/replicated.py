"""A layer whose experts have replicas by a placement that may change with every batch; gradients are summed at owners.

Every expert has one owner, which alone keeps its parameters, gradient and optimizer state. For one batch other ranks
may hold copies: parameters are gathered from the owners before the experts need them, tokens go to the nearest
holder, and what the holders find for the gradient is summed back at the owner. What differs between systems is
*which* copies there are:

    class Shadow(Policy):  # any subset of these; all ranks must decide alike
        def expect(self, owner, num_ranks): ...  # P' of the next batch, bool [E, num_ranks], before its gate
        def saw(self, counts): ...  # after every gate: rows of each rank for each expert, int64 [num_ranks, E]

        revises = True  # and then ask, after the gate and on the critical path, for
        def revise(self, hosts, counts): ...  # more copies in this batch: a P' that contains ``hosts``

    class Mine(ReplicatedSystem):
        def policy(cls, case, job): return Shadow(...)

In a plan: ``gather.inter``, ``gather.near`` (what comes from inside the node) and ``gather.intra`` beside the dense
part before the layer (``Passage.ahead``), ``late.*`` behind the dispatch for revised placements, ``reduce.intra`` and
``reduce.inter`` beside the dense part behind its backward (``Passage.behind``), on the link lanes. With
``Policy.rematerialises`` copies are let go after the layer's forward and gathered again (``regather.*``) beside the
dense part of the layer above in backward; those of the last layer, whose backward is next, stay.

Owners may change between steps: ``harness.plan.moving.move`` with the optimizer, then ``ReplicatedLayer.place``; a rank
may own any number of a layer's experts. Phase ``exchange`` has no experts, so none are copied.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import threading
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from harness.comm.assign import Hosting
from harness.comm.handover import Moment, used_here
from harness.comm.job import Job
from harness.comm.moved import COPIES, LATE_COPIES
from harness.comm.replicas import replica_shares
from harness.comm.sparse import Chunks, SparsePlan, Transfer, plan_sparse
from harness.layer.experts import Experts
from harness.layer.gates import Gated
from harness.layer.weights import Weights
from harness.memory import expert_bytes
from harness.plan.copies import Copies, meter_of
from harness.plan.cost import Cost
from harness.plan.course import Course, PlacedCourse
from harness.plan.graph import Timeline, Work
from harness.plan.layouts import ReplicatedTasks, StageWork
from harness.plan.native import NativeLayer, NativePassage, NativeSystem
from harness.plan.passage import Passage
from harness.plan.priced import PricedReplicated, decided
from harness.plan.segment import Segment
from harness.routing.certificate import expert_counts
from harness.routing.types import Routing
from harness.system import Case


class Policy:
    """Which copies there are; of one layer, on every rank alike. By default none."""

    revises: bool = False  # whether ``revise`` is asked
    rematerialises: bool = False  # copies do not stay from forward to backward

    def expect(self, owner: np.ndarray, num_ranks: int) -> np.ndarray:
        """P' for the next batch, before its gate: bool [E, num_ranks], every owner in it. ``owner`` int [E]."""
        return owner[:, None] == np.arange(num_ranks)

    def saw(self, counts: np.ndarray) -> None:
        """Told after every gate: rows of each rank for each expert, int64 [num_ranks, E]."""

    def revise(self, hosts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """P' for this batch, after its gate; contains ``hosts``, which are gathered already."""
        return hosts


class ReplicatedLayer(NativeLayer):
    """Owned experts, and copies by ``policy``. ``placement``: P, each expert's owner."""

    def __init__(self, system: type[ReplicatedSystem], case: Case, job: Job, weights: Weights):
        super().__init__(system, case, job, weights)
        self.policy = system.policy(case, job)
        self.hosts = case.placement.hosts  # P' of the last batch

    def passage(self, gated: Gated | None = None) -> ReplicatedPassage:
        return ReplicatedPassage(self, gated)

    def expected(self) -> np.ndarray:
        """P' for the next batch."""
        placement = self.exchange_.placement
        if not isinstance(self.experts, Experts):  # nothing to copy
            return placement.hosts
        return self.policy.expect(placement.owner, placement.hosts.shape[1])


class ReplicatedPassage(ReplicatedTasks, NativePassage):
    layer: ReplicatedLayer

    def __init__(self, layer: ReplicatedLayer, gated: Gated | None):
        super().__init__(layer, gated)
        self.own = layer.placement
        self.hosts = layer.expected()
        self.early = self._sparse(self.hosts)
        self.late = self._sparse(self.own.hosts)
        self.copies: list[Copies] = []
        self.topology = layer.job.topology
        self.rematerialises = layer.policy.rematerialises
        self.revises = layer.policy.revises and isinstance(layer.experts, Experts)

    # ------------------------------------------------------------------ tasks

    def transfer(self, what: str, num_tasks: int) -> StageWork:
        """It is made when its first task runs."""
        begin = {"gather": self._gather_early, "late": self._gather_late, "regather": self._regather}.get(
            what, self._reduce
        )
        running: list[tuple[Transfer, Moment]] = []
        left, lock = [num_tasks], threading.Lock()

        def run(stages: tuple[int, ...], near: bool | None) -> None:
            with lock:
                if not running:
                    running.append((begin(), Moment(self.layer.job.device)))
                transfer, begun = running[0]
            begun.wait()
            if transfer.kind == "gather":
                sent = transfer.sent_bytes(stages, near)
                self.layer.job.moved.add(LATE_COPIES if what == "late" else COPIES, sent)
            transfer.run(*stages, near=near)
            with lock:
                left[0] -= 1
                if not left[0]:
                    running.clear()  # and its hold on memory

        return lambda stages, near: Work(run=partial(run, stages, near))

    def _gather_early(self) -> Transfer:
        return self._gather(self.early)

    def _gather_late(self) -> Transfer:
        return self._gather(self.late)

    def _regather(self) -> Transfer:
        for each in self.copies:
            each.restore()
        return Transfer(self.layer.job, self._sparse(self.hosts), self._held())

    def _reduce(self) -> Transfer:
        return Transfer(self.layer.job, self._sparse(self.hosts), self._gradients(), "reduce")

    def backward_release(self) -> None:
        self.copies = []

    # ------------------------------------------------------------------ execution

    def _sparse(self, hosts: np.ndarray) -> SparsePlan:
        return plan_sparse(self.own.owner, hosts, self.layer.job.topology)

    def _mine(self, sparse: SparsePlan) -> np.ndarray:
        """Experts that this rank gets by ``sparse``."""
        rank = self.layer.rank
        return np.flatnonzero(sparse.hosts[:, rank] & (sparse.owner != rank))

    def _gather(self, sparse: SparsePlan) -> Transfer:
        copies = Copies(self.layer.experts, self._mine(sparse), meter_of(self.layer.job))
        self.copies.append(copies)
        own = self._held()[0]
        return Transfer(self.layer.job, sparse, [own, Chunks(copies.ids.tolist(), list(copies.tensors.values()))])

    def _held(self) -> list[Chunks]:
        experts = self.layer.experts
        own = Chunks(experts.local, [getattr(experts, name) for name in experts.names])
        return [own, *(Chunks(each.ids.tolist(), list(each.tensors.values())) for each in self.copies)]

    def _gradients(self) -> list[Chunks]:
        found = []
        for ids, tensors in self._held():
            for tensor in tensors:
                if tensor.grad is None:
                    tensor.grad = torch.zeros_like(tensor)
            found.append(Chunks(ids, [tensor.grad for tensor in tensors]))  # type: ignore[misc]
        return found

    def hosting(self) -> Hosting:
        layer = self.layer
        counts = layer.exchange_.count(self.ids, self.kept, self.cut.tables)
        early, every = self.hosts, counts.sum(0)
        if self.revises:
            self.hosts = layer.policy.revise(early, every)
            self.late = self._sparse((self.hosts & ~early) | self.own.hosts)
        layer.policy.saw(every)
        layer.hosts = self.hosts
        held = np.concatenate([self.own.local(layer.rank), self._mine(self.early), self._mine(self.late)])
        return Hosting(self.hosts, held, counts, self.own.hosts)

    def _experts(self, arrived: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if not self.copies:
            return super()._experts(arrived, counts)
        return self.layer.experts(arrived, counts, [each.tensors for each in self.copies])

    def forward_experts(self, batch: int) -> None:
        super().forward_experts(batch)
        if self.releases and batch == self.cut.batches("forward") - 1:
            for each in self.copies:
                each.release()

    def _experts_back(self, segment: Segment, dmade: torch.Tensor) -> torch.Tensor | None:
        for each in self.copies:  # autograd has them, but not their memory since it was let go and restored elsewhere
            used_here(each.tensors)
        return super()._experts_back(segment, dmade)


class ReplicatedSystem(NativeSystem):
    """A native system that differs by its policy alone."""

    remembers = True  # as most policies do
    copies = True

    @classmethod
    @abc.abstractmethod
    def policy(cls, case: Case, job: Job | None) -> Policy:
        """Of one layer; ``job`` None: for planning alone. ``UserError`` for options that make no sense."""

    @classmethod
    def layout(cls, case: Case) -> Passage | None:
        return cls.laid(case, cls.policy(case, None))

    @classmethod
    def laid(cls, case: Case, policy: Policy) -> Passage | None:
        """By what ``policy`` knows before the batch."""
        routing = cls.planned_routing(case)
        return None if routing is None else PricedReplicated(cls, dataclasses.replace(case, routing=routing), policy)

    @classmethod
    def course(cls, cases: Sequence[Case]) -> Course:
        return ReplicatedCourse(cls, cases)

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> ReplicatedLayer:
        return ReplicatedLayer(cls, case, job, weights)

    @classmethod
    def planned_shares(cls, case: Case) -> np.ndarray:
        _, hosts = decided(case, cls.policy(case, None), expert_counts(case.routing))
        return replica_shares(case.routing, hosts, case.topology)

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        routing = cls.planned_routing(case)
        if routing is None:
            return None
        policy, owner = cls.policy(case, None), case.placement.owner
        early, hosts = decided(case, policy, expert_counts(routing))
        exchange = cls.fares(case, routing, hosts, counted=True).parts()
        if case.identity_experts:
            return exchange
        each = expert_bytes(case.model, case.dtype)
        gather = whole = plan_sparse(owner, hosts, case.topology).bytes(each)
        if hosts is not early:
            late = (hosts & ~early) | case.placement.hosts
            first, then = (plan_sparse(owner, part, case.topology).bytes(each) for part in (early, late))
            gather = first + then
        again = {"regather": whole} if policy.rematerialises else {}
        return {"gather": gather, **again, "reduce": whole.T.copy(), **exchange}


class ReplicatedCourse(PlacedCourse):
    """Policies are told of every step, or of the last ``memory`` before they are asked. ``placements``: the owners."""

    moves = False
    system: type[ReplicatedSystem]  # type: ignore[assignment]

    def __init__(self, system: type[ReplicatedSystem], cases: Sequence[Case], memory: int | None = None):
        super().__init__(system, cases)
        self.policies = [system.policy(case, None) for case in cases]
        self.learns = any(type(policy).saw is not Policy.saw for policy in self.policies)
        self.untold: collections.deque[Sequence[Routing]] = collections.deque(maxlen=memory)

    def passages(self, cases: Sequence[Case]) -> list[Passage | None]:
        self.tell()
        pairs = zip(self.cases(cases), self.policies, strict=True)
        return [self.system.laid(case, policy) for case, policy in pairs]

    def saw(self, step: int, routing: Sequence[Routing], timeline: Timeline | None = None) -> Cost | None:
        self.untold.append(routing)
        return None

    def tell(self) -> None:
        for routing in self.untold:
            for policy, each in zip(self.policies, routing, strict=True):
                policy.saw(each.counts)
        self.untold.clear()
