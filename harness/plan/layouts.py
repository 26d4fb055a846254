"""Which tasks make up an MoE layer, on which lanes and in which order: once for what runs and for what is priced.

    OpaqueTasks      one task a direction: a real package, whose communication is its own affair
    PlannedTasks     gate, the way to the experts and back, mix
    NativeTasks      whole experts behind metadata, dispatch and combine
    ReplicatedTasks  and copies of them for one batch, gathered before and reduced after
    CopiedTasks      and copies that stay, whose gradients are summed

Each asks ``Passage.work`` what its tasks do.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Literal

from harness.comm.journey import Cut
from harness.comm.sparse import SparsePlan
from harness.options import yes
from harness.plan.graph import COMPUTE, INTER, INTRA, Plan, Work
from harness.plan.passage import Direction, Passage
from harness.plan.schedule import AWAY, Bound, Schedule, hop_name
from harness.plan.slots import OVERLAP
from harness.system import Case
from harness.topology import Topology

#: of one task of a transfer: its stages, and which hops (``SparsePlan.near``; None: all)
StageWork = Callable[[tuple[int, ...], bool | None], Work]


class OpaqueTasks(Passage):
    def forward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        return [plan.put(f"{prefix}moe", COMPUTE, after, self.work("forward", "moe"))]

    def backward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        last = [plan.put(f"{prefix}moe", COMPUTE, after, self.work("backward", "moe"))]
        if gradients is not None:  # never beside collectives that nobody here knows of
            last = [plan.put(f"{prefix}gradients", INTER, last, gradients)]
        return last


class PlannedTasks(Passage):
    """``shares``: there are shared experts, computed before the rows are sent; ``overlaps``: while these travel."""

    shares: bool = False
    overlaps: bool = False

    def share(self, case: Case) -> None:
        """As ``case`` has it."""
        self.shares = case.model.num_shared_experts > 0 and not case.identity_experts
        self.overlaps = yes(case, OVERLAP, False)

    def shared(self, plan: Plan, prefix: str, direction: Direction, after: list[str]) -> tuple[list[str], list[str]]:
        """Adds the shared experts' task: what the rows then wait for, and what the last task waits for beside them."""
        if not self.shares:
            return after, []
        done = [plan.put(f"{prefix}shared", COMPUTE, after, self.work(direction, "shared"))]
        return after if self.overlaps else done, done

    @abc.abstractmethod
    def there_and_back(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        """Add the tasks between the gate and the mix."""

    @abc.abstractmethod
    def back_and_there(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        """The same in backward."""

    def forward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        last = [plan.put(f"{prefix}gate", COMPUTE, after, self.work("forward", "gate"))]
        last, shared = self.shared(plan, prefix, "forward", last)
        last = self.there_and_back(plan, prefix=prefix, after=last, gradients=gradients)
        return [plan.put(f"{prefix}restore", COMPUTE, [*last, *shared], self.work("forward", "restore"))]

    def backward(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        last = [plan.put(f"{prefix}restore", COMPUTE, after, self.work("backward", "restore"))]
        last, shared = self.shared(plan, prefix, "backward", last)
        last = self.back_and_there(plan, prefix=prefix, after=last, gradients=gradients)
        return [plan.put(f"{prefix}gate", COMPUTE, [*last, *shared], self.work("backward", "gate"))]


class NativeTasks(PlannedTasks):
    """``schedule``: lays out the tasks between gate and mix, of ``num_hops`` hops and a batch cut by ``cut``.
    ``weights_travel``: gradients of gate weights come back over the hops."""

    schedule: Schedule
    num_hops: int
    cut: Cut
    weights_travel: bool = False
    tells: bool = True

    def called(self, direction: Direction, way: Bound, hop: int) -> str:
        """A task of a hop; its kind is what stands before the dot."""
        return AWAY[direction][way == "home"] + hop_name(hop)

    def ready(self, plan: Plan, prefix: str) -> list[str]:
        """What the experts' forward waits for beside the tokens. Called when these have their place in the plan."""
        return []

    def ready_back(self) -> list[str]:
        """What the experts' backward waits for beside the gradients of their outputs."""
        return []

    def there_and_back(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        return self.schedule.lay(plan, self, "forward", prefix, after, gradients)

    def back_and_there(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        return self.schedule.lay(plan, self, "backward", prefix, after, gradients)

    def last_experts(self, prefix: str) -> str:
        """The task behind which a backward's gradients of parameters are complete."""
        names = self.schedule.names(self, "backward")
        return f"{prefix}{names[-1]}"


class ReplicatedTasks(NativeTasks):
    """``early``: what is gathered before the gate; ``revises``: more may follow behind it; ``rematerialises``: copies
    do not stay from forward to backward, but those of the last layer."""

    topology: Topology
    early: SparsePlan
    revises: bool
    rematerialises: bool
    gathered: tuple[str, ...] | list[str] = ()
    regathered: tuple[str, ...] | list[str] = ()

    @abc.abstractmethod
    def transfer(self, what: Literal["gather", "late", "regather", "reduce"], num_tasks: int) -> StageWork:
        """Of a transfer in so many tasks."""

    @property
    def releases(self) -> bool:
        """Whether copies are let go between forward and backward."""
        return self.rematerialises and not self.turns

    def ahead(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        self.gathered = self._stages(plan, prefix, "gather", after, self.early)
        return self.gathered

    def ready(self, plan: Plan, prefix: str) -> list[str]:
        if not self.revises:
            return list(self.gathered)
        known = [f"{prefix}metadata"]  # what is late is known after it
        return [*self.gathered, *self._stages(plan, prefix, "late", known, None)]

    def ahead_back(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        if not self.releases:
            return list(self.regathered)
        self.regathered = self._stages(plan, prefix, "regather", after, None if self.revises else self.early)
        return self.regathered

    def ready_back(self) -> list[str]:
        return list(self.regathered)

    def behind(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        known = None if self.revises else self.early
        last = self._stages(plan, prefix, "reduce", [*after, self.last_experts(prefix)], known)
        return [plan.put(f"{prefix}release", INTER, last, self.work("backward", "release"))] if last else []

    def _stages(
        self,
        plan: Plan,
        prefix: str,
        what: Literal["gather", "late", "regather", "reduce"],
        after: Iterable[str],
        known: SparsePlan | None,
    ) -> list[str]:
        """Add a transfer: what crosses between nodes and what stays inside are tasks of their lanes. A gather spreads
        chunks whose owner is in the node without waiting for others. ``known``: what will travel; None: known only
        then. No tasks where nothing does; returns the last ones."""
        inside = tuple(range(1, self.topology.num_levels))
        parts: list[tuple[str, str, tuple[int, ...], bool | None]] = [
            (INTER, INTER, (0,), None),
            ("near", INTRA, inside, True),
            (INTRA, INTRA, inside, False),
        ]
        if what == "reduce":  # owners' rows are added to by one lane after the other
            parts = [(INTRA, INTRA, inside[::-1], None), (INTER, INTER, (0,), None)]
        if known is not None:
            parts = [part for part in parts if any(known.travels(stage, part[3]) for stage in part[2])]
        work = self.transfer(what, len(parts))
        last, ends = list(after), []
        for part, lane, stages, near in parts:
            waits = after if part == "near" else last
            name = f"{prefix}{what}.{part}"
            task = plan.put(name, lane, waits, work(stages, near), what)
            if part == "near":
                ends = [task]
            else:
                last = [task]
        return [*ends, *last] if parts else []


class CopiedTasks(NativeTasks):
    """``sparse``: who holds what; None where there are no experts."""

    topology: Topology
    sparse: SparsePlan | None

    @abc.abstractmethod
    def transfer(self, what: Literal["reduce", "spread"], num_tasks: int) -> StageWork:
        """Of a transfer in so many tasks."""

    def behind(self, plan: Plan, prefix: str = "", after: Iterable[str] = ()) -> list[str]:
        sparse = self.sparse
        if sparse is None or not any(len(hops.chunk) for hops in sparse.stages):
            return []
        inside = tuple(range(1, self.topology.num_levels))
        last = [*after, self.last_experts(prefix)]
        ways = {"reduce": ((INTRA, inside[::-1]), (INTER, (0,))), "spread": ((INTER, (0,)), (INTRA, inside))}
        for what, parts in ways.items():
            work = self.transfer(what, 2)  # type: ignore[arg-type]
            for lane, stages in parts:
                if any(sparse.travels(stage) for stage in stages):
                    last = [plan.put(f"{prefix}{what}.{lane}", lane, last, work(stages, None), what)]
        return last


__all__ = ["CopiedTasks", "NativeTasks", "OpaqueTasks", "PlannedTasks", "ReplicatedTasks", "StageWork"]
