"""Schedules: in which order the hops of a batch and its experts stand on the lanes, and where gradients go among them.

    Chunks    every chunk over its hops, out, to the experts, and home; with one chunk: one thing after another

A schedule is one object for what runs and for what is priced: it asks ``Tasks.work`` what a task does. Hops are counted
from the outermost link level, and each is on a lane of its own (``inter``, ``intra``, ``intra2``), unless links are not
to work side by side.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, Protocol

from harness.comm.journey import Cut, Direction
from harness.plan.graph import COMPUTE, INTER, INTRA, INTRA2, Plan, Work

#: what rows are on their way to the experts and from them, in each direction
AWAY: dict[Direction, tuple[str, str]] = {"forward": ("dispatch", "combine"), "backward": ("combine", "dispatch")}
Bound = Literal["out", "home"]


class Tasks(Protocol):
    """What a schedule lays out: a passage with ``num_hops`` hops, cut by ``cut``. ``tells``: metadata goes before the
    rows of each hop, and what comes home is summed. ``weights_travel``: gradients of gate weights go home, too."""

    num_hops: int
    cut: Cut
    weights_travel: bool
    tells: bool

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work: ...
    def called(self, direction: Direction, way: Bound, hop: int) -> str: ...
    def ready(self, plan: Plan, prefix: str) -> list[str]: ...
    def ready_back(self) -> list[str]: ...


class Schedule(abc.ABC):
    """``lay`` adds the tasks between the gate and the mix, in either direction; returns the last ones. ``gradients``: a
    slice of the gradient all-reduce that goes among them. ``settles``: what is home is summed as the rest travels."""

    settles: ClassVar[bool] = False

    @abc.abstractmethod
    def lay(
        self, plan: Plan, tasks: Tasks, direction: Direction, prefix: str, after: Iterable[str], gradients: Work | None
    ) -> list[str]: ...

    def names(self, tasks: Tasks, direction: Direction) -> list[str]:
        """Of the tasks in which experts compute, in their order."""
        batches = tasks.cut.batches(direction)
        return ["experts"] if batches == 1 else [f"experts[{i}]" for i in range(batches)]


@dataclasses.dataclass(frozen=True)
class Chunks(Schedule):
    """``overlap``: links between and inside nodes work side by side."""

    settles: ClassVar[bool] = True
    overlap: bool = True

    def lay(
        self, plan: Plan, tasks: Tasks, direction: Direction, prefix: str, after: Iterable[str], gradients: Work | None
    ) -> list[str]:
        cut, hops, forward = tasks.cut, range(tasks.num_hops), direction == "forward"
        degree, last, after = cut.degree(direction), tasks.num_hops - 1, list(after)

        def put(way: Bound, hop: int, chunk: int, waits: Sequence[str]) -> str:
            what = tasks.called(direction, way, hop)
            name = f"{prefix}{what}" + (f"[{chunk}]" if degree > 1 else "")
            work = tasks.work(direction, way, (hop, chunk))
            return plan.put(name, self.lane(hop), waits, work, what.partition(".")[0])

        def tell(hop: int, waits: Sequence[str]) -> str:
            name = f"{prefix}metadata{hop_name(hop)}"
            return plan.put(name, self.lane(hop), waits, tasks.work(direction, "metadata", (hop,)), "metadata")

        if forward and tasks.tells:
            told = [tell(0, after)]
            for hop in hops[1:]:
                told = [tell(hop, told)]
            after = []
        # The outer link first and never idle; behind it each chunk goes as far as it can before the next one. Where the
        # experts need not wait for the last chunk, the first goes home before that one goes on inside the node: the
        # outer link then turns round at once. FSMoE's slots keep their paper's order.
        sent: dict[tuple[int, int], str] = {}
        outwards = sorted(((h, c) for h in hops for c in range(degree)), key=lambda at: (sum(at), -at[0]))
        turns = self.overlap and tasks.tells and not cut.whole and degree > 2
        late = [at for at in outwards if turns and at[0] and at[1] == degree - 1]
        left: dict[tuple[int, int], str] = {}
        made: dict[int, str] = {}
        names = self.names(tasks, direction)

        def go(at: Iterable[tuple[int, int]]) -> None:
            for hop, chunk in at:
                sent[hop, chunk] = put("out", hop, chunk, [sent[hop - 1, chunk]] if hop else after)

        def compute(batches: Iterable[int]) -> None:
            for i in batches:
                waits = [sent[last, chunk] for chunk in (range(degree) if cut.whole else (i,))]
                work = tasks.work(direction, "experts", (i,))
                made[i] = plan.put(f"{prefix}{names[i]}", COMPUTE, [*waits, *ready], work, "experts")

        def come(hop: int, chunk: int) -> None:
            waits = left[hop + 1, chunk] if hop < last else made[0 if cut.whole else chunk]
            left[hop, chunk] = put("home", hop, chunk, [waits])

        go(at for at in outwards if at not in late)
        ready = tasks.ready(plan, prefix) if forward else tasks.ready_back()
        if gradients is not None:
            plan.put(f"{prefix}gradients", INTER, (), gradients)
        compute(range(len(names) - turns))
        for hop in hops[:0:-1] if turns else ():
            come(hop, 0)
        go(late)
        compute(range(len(made), len(names)))
        # The first chunk goes straight through, so that the outer link, the last to be entered, starts early; where all
        # links share a lane, each does, so that the last one alone trails.
        homewards = sorted(
            ((h, c) for h in hops[::-1] for c in range(degree) if (h, c) not in left),
            key=lambda at: (at[1] > 0, last - at[0] + at[1]) if self.overlap else (at[1], last - at[0]),
        )
        back = [sent[last, degree - 1]]
        for hop, chunk in homewards:
            if chunk == degree - 1 and not forward and tasks.weights_travel:  # of gate weights, beside other rows
                back = [tell(hop, back)]
            come(hop, chunk)
        for chunk in range(degree - 1 if tasks.tells else 0):  # sums of what is home, while others are on their way
            work = tasks.work(direction, "settle", (chunk,))
            plan.put(f"{prefix}settle[{chunk}]", COMPUTE, [left[0, chunk]], work, "restore")
        return [left[0, degree - 1]]

    def lane(self, hop: int) -> str:
        return (INTER, INTRA, INTRA2)[min(hop, 2)] if self.overlap else INTER


def hop_name(hop: int) -> str:
    """Of a task's hop, behind what it does: nothing for the outermost."""
    return "" if not hop else ".intra" if hop == 1 else f".intra{hop}"


__all__ = ["AWAY", "Chunks", "Schedule", "Tasks", "hop_name"]
