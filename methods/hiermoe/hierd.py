"""HierD-AlltoAll (HierMoE, arXiv 2508.09591, section III): tokens cross each link level once per destination group.

The exchange is a list of stages, outermost link level first. At a stage every item (a token, or a copy of one)
goes once to each group in which it has an expert (the OR of eq. 7); which experts it needs there travels beside it as
metadata. The last stage ends on the experts' ranks. HD1 is one stage over all ranks, HD2 (Inter-level-1, Intra-level-1)
two stages: across nodes among ranks with equal local index, then inside the node.

Combine is the transpose: each stage sums the copies of an item in float32 before it sends one row on, so a node
returns one partial weighted sum per token. Backward of dispatch is combine's walk, backward of combine is dispatch's.

Every stage is a hop, on communicators of its own, so that a schedule that cuts the tokens into chunks may hide the fast
levels under the slow one: chunk c + 1 crosses the outer link while chunk c moves on inside.

Where an expert has several hosts, what a token needs is decided first (``harness.comm.assign``); copies in one unit are
then reached by one row.

Interpretation: the paper leaves the wire format of the metadata open. Here each row carries the number of its experts
(1 byte), and each (row, expert) pair the expert's index among those of the destination group (1 or 2 bytes) and its
gate weight (4 bytes; 8 in float64). Sizes are exact (all-to-all-v), or padded to max(p) as the paper's are."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from harness.comm.assign import Hosting
from harness.comm.exchange import Exchange
from harness.comm.job import Job
from harness.comm.journey import Cut, all_to_all
from harness.placement import Placement
from harness.topology import Topology
from methods.hiermoe.counts import Counts, needed, stages
from methods.hiermoe.plan import HierJourney, Hop
from methods.hiermoe.planner import PlannerModel

MOST_CHAINS = 8  # that are kept: for placements that come again


class HierExchange(Exchange):
    """HierD-AlltoAll. ``dimension``: d of HDd, 1 (all ranks at once) to the number of link levels; or by what every
    routing chooses its own, of a batch in ``num_chunks``. ``deduplicate``: no for the paper's Hd, which send every
    (token, expert) pair. ``padded``: as the paper's sizes, all messages of a stage as long as its longest; else as they
    are. ``everyone``: every member of a hop gets every item, whether it needs it or not."""

    everyone: ClassVar[bool] = False
    weights_travel: ClassVar[bool] = True

    def __init__(
        self,
        job: Job,
        placement: Placement,
        dimension: int | PlannerModel = 2,
        *,
        num_chunks: int = 1,
        deduplicate: bool = True,
        padded: bool = False,
        row_bytes: float = 1.0,
    ):
        super().__init__(job, placement)
        self.deduplicate, self.padded, self.row_bytes, self.num_chunks = deduplicate, padded, row_bytes, num_chunks
        self.dimension = dimension
        self.used = dimension if isinstance(dimension, int) else 1  # of the last routing
        self._chains: dict[tuple[int, bytes], list[Hop | None]] = {}

    @property
    def num_hops(self) -> int:
        return self.dimension if isinstance(self.dimension, int) else self.job.topology.num_levels

    def journey(
        self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None, hosting: Hosting, cut: Cut
    ) -> HierJourney:
        return HierJourney(self, ids, weights, kept, hosting, cut)

    def chain(self, hosting: Hosting, held: torch.Tensor, choice: torch.Tensor, top_k: int) -> list[Hop | None]:
        """Stages by link level, of a batch that needs the holdings ``held`` for its assignments ``choice`` (flat, into
        [T, k]); None: no stage, or one without peers. Collective where the dimension is chosen: every rank tells all
        how many of its tokens go where."""
        if isinstance(self.dimension, PlannerModel):
            self.used = self._choose(self.dimension, hosting, held, choice, top_k)
        key = self.used, np.packbits(hosting.hosts).tobytes()
        if key not in self._chains:
            while len(self._chains) >= MOST_CHAINS:
                del self._chains[next(iter(self._chains))]
            self._chains[key] = self._chain(hosting, self.used)
        return self._chains[key]

    def _choose(
        self, model: PlannerModel, hosting: Hosting, held: torch.Tensor, choice: torch.Tensor, top_k: int
    ) -> int:
        topology, num_ranks = self.job.topology, self.job.num_ranks
        rank = np.full((int(choice.max()) // top_k + 1 if len(choice) else 0) * top_k, -1)
        rank[choice.cpu().numpy()] = hosting.holder[held.cpu().numpy()]
        own = _own_counts(rank.reshape(-1, top_k), topology)
        mine = torch.as_tensor(own.astype(np.int32), device=self.job.device).expand(num_ranks, -1)
        every = all_to_all(mine, [1] * num_ranks, [1] * num_ranks, self.job.world if num_ranks > 1 else None)
        edges = np.cumsum([topology.num_units(level) for level in range(topology.num_levels)])
        tables = tuple(np.split(every.cpu().numpy().astype(np.int64), edges[:-1], axis=1))
        counts = Counts(topology, tables, tables)
        return model.best(counts, self.row_bytes, padded=self.padded, chunks=self.num_chunks)

    def _chain(self, hosting: Hosting, dimension: int) -> list[Hop | None]:
        job, topology = self.job, self.job.topology
        found: list[Hop | None] = [None] * self.num_hops
        holder = torch.as_tensor(hosting.holder)
        for hop, stage in enumerate(stages(dimension, topology.num_levels)):
            level = stage.b - 1
            if stage.b < topology.num_levels:
                group, ranks = job.rail(level), topology.rail(job.rank, level)
            elif stage.a:
                group, ranks = job.inner(stage.a - 1), topology.inner_group(job.rank, stage.a - 1)
            else:
                group, ranks = (job.world if job.num_ranks > 1 else None), list(range(job.num_ranks))
            if group is None:
                continue
            if stage.a > 1:  # it has a lane of its own
                group = job.deep(ranks)
                assert group is not None
            unit_of_rank = torch.as_tensor(topology.unit_of(level))
            position = torch.full((topology.num_units(level),), -1)
            position[unit_of_rank[ranks]] = torch.arange(len(ranks))
            unit = position[unit_of_rank[holder]]  # [n], -1: not below this stage's units
            found[hop] = Hop(group, unit, *index_inside(unit_of_rank[holder], int(unit_of_rank[job.rank])))
        return found


def _own_counts(rank: np.ndarray, topology: Topology) -> np.ndarray:
    """``rank`` int [T, k]: that computes each of this rank's rows, -1: none. How many tokens need each unit of each
    level, int64 [sum of U_i]."""
    parts = []
    for level in range(topology.num_levels):
        unit = np.where(rank >= 0, topology.unit_of(level)[rank], -1)
        parts.append(needed(unit, topology.num_units(level)).sum(0))
    return np.concatenate(parts)


def index_inside(unit: torch.Tensor, own_unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of every holding among those of its unit, int64 [n]; and this unit's holdings."""
    index = torch.empty_like(unit)
    for each in unit.unique():
        members = (unit == each).nonzero().flatten()
        index[members] = torch.arange(len(members))
    return index, (unit == own_unit).nonzero().flatten()
