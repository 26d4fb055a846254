"""When experts swap in training, and which, in numpy: by the routing of the step just done, for the next one.

The same algorithm for what runs (``methods.hiermoe.training``), where ranks share the search and clocks are real, and
for what is priced (``Swaps``), where they are not.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from harness.errors import bad
from harness.memory import OPTIMIZER_STATES, expert_bytes
from harness.plan.cost import Cost, Even, Hold, InTurn
from harness.plan.course import PlacedCourse
from harness.plan.graph import Timeline
from harness.routing.types import Routing
from harness.system import Case, System
from harness.topology import Topology
from methods.hiermoe.counts import Stage, count
from methods.hiermoe.planner import PlannerModel
from methods.hiermoe.swap import (
    GAMMA,
    MaxFunction,
    Objective,
    Statistics,
    Swap,
    best_swap,
    collect,
    groups,
)
from methods.hiermoe.traffic import Wire

MAX_SHARE = 0.01
MARGIN = 1.25  # in steps waited, as a search that ends in no swap is lost


@dataclasses.dataclass(frozen=True)
class SwapOptions:
    """``every``: steps between updates; ``pairs``: swaps of each layer in one update; ``max`` and ``gamma``: of the
    objective (``Objective``)."""

    every: int = 1
    pairs: int = 1
    max: MaxFunction = "smooth"
    gamma: float = GAMMA

    def __post_init__(self) -> None:
        if self.every < 1:
            raise bad("options.swap_every", self.every, "must be at least 1 step")
        if self.pairs < 1:
            raise bad("options.swap_pairs", self.pairs, "must be at least 1 pair")


class Updates(abc.ABC):
    """``model``: None where no costs are known; else no update is made that would take more than ``MAX_SHARE`` of the
    steps since the last one: neither the search, as the clock has it, nor the transfer, as predicted. ``made``: all
    swaps so far, [(step, layer, swap)]."""

    def __init__(self, topology: Topology, options: SwapOptions, model: PlannerModel | None, row_bytes: float):
        self.topology, self.options, self.model, self.row_bytes = topology, options, model, row_bytes
        self.made: list[tuple[int, int, Swap]] = []
        self.skipped = 0  # updates that would have cost too much
        self._from, self._since = 0, 0.0  # steps done at the last update, and when that was
        self._due = 0  # steps until which an update would cost too much

    def after(self, step: int) -> None:
        done, began = step + 1, self.now_s()
        if self.model is not None and not self._since:  # nothing is known of a step's length yet
            self._from, self._since = done, began
            return
        if done % self.options.every or done < self._due:
            return
        step_s = (began - self._since) / max(1, done - self._from)
        for _ in range(self.options.pairs):
            swaps = self.decide()
            wanted = [i for i, swap in enumerate(swaps) if swap.r >= 0]
            if not wanted:
                break
            cost_s = self.now_s() - began + self._move_s(len(wanted))
            if (due := self._from + self._serves(cost_s, step_s)) > done:
                self._due, self.skipped = due, self.skipped + 1
                return
            self.swap({i: (swaps[i].r, swaps[i].c) for i in wanted})
            self.made += [(step, i, swaps[i]) for i in wanted]
        now = self.now_s()
        self._due = done + self._serves(now - began, step_s)
        self._from, self._since = done, now

    @abc.abstractmethod
    def now_s(self) -> float:
        """A clock's, above 0."""

    @abc.abstractmethod
    def decide(self) -> list[Swap]:
        """The best swap of every layer by the tokens of its last forward on all ranks."""

    @abc.abstractmethod
    def swap(self, pairs: Mapping[int, tuple[int, int]]) -> None:
        """Two experts of some layers change places, with their optimizer state."""

    @abc.abstractmethod
    def moving_bytes(self) -> float:
        """Of one expert with its optimizer state."""

    @abc.abstractmethod
    def slowest(self, share: float) -> float:
        """The largest of all ranks'."""

    def statistics(
        self, ids: np.ndarray, owner: np.ndarray, dimension: int
    ) -> tuple[Statistics, np.ndarray, Objective]:
        """Of a layer's tokens ids [T, k] (-1 where dropped), experts of ``owner`` [E], and exchange HDd."""
        objective = self._objective(dimension)
        group = groups(owner, self.topology, objective.levels)
        return collect(ids, group, self.topology.num_ranks), group, objective

    def _objective(self, dimension: int) -> Objective:
        options = self.options
        if self.model is None:
            return Objective.unpriced(dimension, self.topology, options.max, options.gamma)
        return Objective.of(self.model, dimension, self.row_bytes, options.max, options.gamma)

    def _move_s(self, num_swaps: int) -> float:
        """Predicted; every swap may cross the outermost link."""
        if self.model is None:
            return 0.0
        shape = self.model.cluster.shape
        outermost = next((level for level, size in enumerate(shape) if size > 1), len(shape) - 1)
        cost = self.model.cost(Stage(outermost, outermost + 1))
        return cost.alpha_s + 2 * num_swaps * self.moving_bytes() * cost.beta_s_per_byte

    def _serves(self, cost_s: float, step_s: float) -> int:
        """Steps that an update must serve; the slowest rank decides."""
        if self.model is None:
            return 0
        return math.ceil(MARGIN * self.slowest(cost_s / step_s) / MAX_SHARE)


# ------------------------------------------------------------------------------------------------------------- priced

#: assumed, not measured: what the search takes on one core, of a token's pair of experts, and of a pair of experts, for
#: each level in use. They decide how often an update is due where the cluster's costs are known
COLLECT_S, SEARCH_S = 2e-9, 4e-9
FIRST_S = 1.0  # at which a clock that stands for a real one begins


class Swaps(PlacedCourse, Updates):
    """A priced training. ``dimension``: d of all layers, or by what each routing chooses its own."""

    def __init__(
        self,
        system: type[System],
        cases: Sequence[Case],
        options: SwapOptions,
        dimension: int | PlannerModel,
        wire: Wire,
    ):
        PlacedCourse.__init__(self, system, cases)
        model = dimension if isinstance(dimension, PlannerModel) else None
        Updates.__init__(self, cases[0].topology, options, model, wire.row_bytes)
        self.dimension, self.wire = dimension, wire
        if self.model is not None:
            self.notes = (f"how long its search for swaps takes is assumed: {COLLECT_S:g} and {SEARCH_S:g} s a pair",)
        self.clock_s, self.step_s = FIRST_S, 0.0
        self.routing: Sequence[Routing] = ()  # of the last step
        self.parts: list[Cost] = []  # of what is done behind it

    def watches(self, step: int) -> bool:
        return self.model is not None and not self.step_s

    def saw(self, step: int, routing: Sequence[Routing], timeline: Timeline | None = None) -> Cost | None:
        if timeline is not None:
            self.step_s = float(timeline.total_s.max())
        self.routing, self.parts = routing, []
        self.clock_s += self.step_s
        self.after(step)
        return InTurn(tuple(self.parts)) if self.parts else None

    def now_s(self) -> float:
        return self.clock_s

    def decide(self) -> list[Swap]:
        num_ranks, found, num_numbers, search_s = self.topology.num_ranks, [], 0, 0.0
        for routing, placement in zip(self.routing, self.placements, strict=True):
            few = routing.sample
            given = self.statistics(few.ids, placement.owner, self._used(routing, placement.owner))
            found.append(best_swap(*given, num_ranks))
            num_levels, num_experts = given[1].shape
            num_numbers += len(given[0].flat())
            pairs = max(routing.tokens) * routing.top_k**2
            search_s += num_levels * (COLLECT_S * pairs + SEARCH_S * num_experts**2 / num_ranks)
        self.clock_s += search_s
        sums = (Even("ar", "flat", 4 * num_numbers), Even("ar", "flat", 4 * 8 * len(found)))
        self.parts += [Hold(search_s), *sums]
        return found

    def swap(self, pairs: Mapping[int, tuple[int, int]]) -> None:
        moved = self.move({i: self.placements[i].swapped([pair]) for i, pair in pairs.items()})
        assert moved is not None
        self.parts.append(moved)

    def moving_bytes(self) -> float:
        case = self.first[0]
        return float(expert_bytes(case.model, case.dtype) * (1 + OPTIMIZER_STATES[case.dtype]))

    def slowest(self, share: float) -> float:
        return share

    def _used(self, routing: Routing, owner: np.ndarray) -> int:
        if not isinstance(self.dimension, PlannerModel):
            return self.dimension
        wire, counts = self.wire, count(routing, owner, self.topology)
        return self.dimension.best(counts, wire.row_bytes, padded=wire.padded, chunks=wire.num_chunks)
