"""HierD-AlltoAll as a slot of systems: how it runs on a rank, and what each of its hops sends and costs.

The numbers of the first stage's rows go before them; the rest of the metadata while the first stage's rows are on the
wire, so that a row cannot enter the second stage before it. On the way home gradients of gate weights follow the
metadata's hops.

Interpretation: the one number a chunk that ranks agree on before they pad counts as one more message of its stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from harness import ledger
from harness.comm.job import Job
from harness.comm.journey import Cut
from harness.dtypes import row_bytes
from harness.options import whole, yes
from harness.plan.cost import Cost, InTurn, Transfer
from harness.plan.slots import ExchangeSlot, Fares, Options
from harness.routing.types import Routing
from harness.specs import DTYPE_BYTES, Cluster
from harness.system import Case
from methods.hiermoe.counts import Array, Stage, count
from methods.hiermoe.hierd import HierExchange
from methods.hiermoe.planner import PlannerModel, calibrated_costs, stage_costs
from methods.hiermoe.traffic import HierTravel, Wire

MAX_CHUNKS = 12
MIN_CHUNK_BYTES = 128 * 1024  # of one rank's tokens: smaller messages cost more in start-up than overlap saves


@dataclasses.dataclass(frozen=True, eq=False)
class HierFares(Fares):
    """``told``: bytes of the counts of all ranks, where they are told these whatever the exchange needs."""

    travel: HierTravel
    num_hops: int  # type: ignore[assignment]
    weights_travel: ClassVar[bool] = True
    told: Array | None = None

    @property
    def sums(self) -> bool:
        return self.travel.wire.deduplicate

    def bytes(self, part: str) -> Array | None:
        if part == "metadata_grad" and not self.travel.wire.weights_learn:
            return None
        found = self.travel.bytes(part)
        return found + self.told if part == "metadata" and self.told is not None else found

    def cost(self, part: str, hop: int, degree: int) -> Cost | None:
        stages = self.travel.stages
        before = self._before() if part == "metadata" and not hop else []
        if hop >= len(stages) or (part == "metadata_grad" and not self.travel.wire.weights_learn):
            return InTurn(tuple(before)) if before else None
        messages = 1
        if part == "metadata":  # a table of sizes, and the columns where no stage follows that awaits them
            messages += self.travel.wire.padded + (hop == len(stages) - 1)
        if part == "metadata_grad" and not hop:
            messages = 0  # the rows behind it set off at once
        sent = self._transfer(part, stages[hop], messages, degree)
        return InTurn((*before, sent)) if before else sent

    def _before(self) -> list[Cost]:
        told = [] if self.told is None else [self.told]
        told += [self.travel.choice_bytes()] if self.travel.chosen else []
        return [Transfer("a2a", "flat", matrix) for matrix in told]

    def _transfer(self, part: str, stage: Stage, messages: int, degree: int) -> Transfer:
        scope = stage.key(self.travel.counts.topology.num_levels).partition(".")[2]
        matrix = self.travel.stage_bytes(part, stage) / degree
        np.fill_diagonal(matrix, 0)
        return Transfer("a2a", scope, matrix, messages)


@dataclasses.dataclass(frozen=True)
class Hier(ExchangeSlot):
    """``fixed``: a dimension that is not an option; None: it is, or is chosen for every routing."""

    name: str  # type: ignore[misc]
    fixed: int | None = None
    packs: ClassVar[bool] = True
    title: ClassVar[str] = "HierMoE's deduplicated all-to-all of the dimension that pays"
    source: ClassVar[str] = "arXiv 2508.09591, section III (HierD-AlltoAll)"
    options: ClassVar[Options] = {  # type: ignore[misc]
        "dimension": "d of HDd, 1 (all ranks at once) to the number of link levels "
        "(default: the best for each routing by the cluster's costs; 2 where none are known)",
        "deduplicate": "false: every (token, expert) pair travels, the paper's Hd (default true)",
        "padded": "true: all messages of a stage as long as its longest, as the paper's sizes are (default false)",
    }
    CHUNKS: ClassVar[str] = (
        "pieces of the batch that overlap the stages "
        f"(default: as many as hold {MIN_CHUNK_BYTES // 1024} KiB of tokens each, at most {MAX_CHUNKS})"
    )

    def refuse(self, case: Case) -> str | None:
        dimension = self.fixed or case.options.get("dimension")
        if isinstance(dimension, int) and dimension > case.topology.num_levels:
            shape = " x ".join(map(str, case.topology.shape))
            return f"dimension {dimension} needs as many link levels; {shape} ranks have {case.topology.num_levels}"
        return None

    def num_hops(self, case: Case) -> int:
        dimension = self.dimension(case)
        return dimension if isinstance(dimension, int) else case.topology.num_levels

    def make(self, case: Case, job: Job) -> HierExchange:
        wire = self.wire(case)
        return HierExchange(
            job,
            case.placement,
            self.dimension(case),
            num_chunks=wire.num_chunks,
            deduplicate=wire.deduplicate,
            padded=wire.padded,
            row_bytes=wire.row_bytes,
        )

    def fares(self, case: Case, routing: Routing, hosts: Array, cut: Cut, counted: bool = False) -> HierFares:
        wire, dimension = self.wire(case, cut), self.dimension(case)
        where = hosts if (hosts.sum(1) > 1).any() else hosts.argmax(1)
        counts = count(routing, where, case.topology)
        if chosen := isinstance(dimension, PlannerModel):
            dimension = dimension.best(counts, wire.row_bytes, padded=wire.padded, chunks=wire.num_chunks)
        travel = HierTravel.of(routing, where, case.topology, dimension, wire, counts=counts, chosen=chosen)
        told = None
        if counted:
            told = np.full((case.topology.num_ranks,) * 2, 8.0 * case.model.num_experts * cut.pieces)
            np.fill_diagonal(told, 0)
        return HierFares(travel, self.num_hops(case), told)

    def chunks(self, case: Case) -> int:
        """The same on every rank, so the rank with the most tokens decides."""
        if "chunks" in case.options:
            return whole(case, "chunks", 0, 1024)
        most = max(case.routing.tokens) * case.model.hidden * DTYPE_BYTES[case.dtype]
        return min(MAX_CHUNKS, max(1, most // MIN_CHUNK_BYTES))

    def dimension(self, case: Case) -> int | PlannerModel:
        """d, or by what every routing chooses its own."""
        if self.fixed is not None:
            return min(self.fixed, case.topology.num_levels)
        if "dimension" in case.options:
            return whole(case, "dimension", 0, case.topology.num_levels)
        costs = known_costs(case.cluster)
        return min(2, case.topology.num_levels) if costs is None else PlannerModel(costs)

    def wire(self, case: Case, cut: Cut | None = None) -> Wire:
        """How it sends."""
        deduplicate, padded = (yes(case, key, default) for key, default in (("deduplicate", True), ("padded", False)))
        return Wire(
            row_bytes=row_bytes(case, "combine"),
            dispatch_bytes=row_bytes(case, "dispatch"),
            weight_bytes=8 if case.dtype == "float64" else 4,
            num_chunks=self.chunks(case) if cut is None else cut.pieces,
            deduplicate=deduplicate,
            padded=padded,
            weights_learn=case.model.gate != "softmoe",  # its slots weigh 1
        )


class HD2(Hier):
    """Two dimensions, whatever pays."""

    title: ClassVar[str] = "HierMoE's deduplicated all-to-all: across nodes, then inside them"
    source: ClassVar[str] = "arXiv 2508.09591, section III (HD2)"
    options: ClassVar[Options] = {key: text for key, text in Hier.options.items() if key != "dimension"}  # type: ignore[misc]


def known_costs(cluster: Cluster | None) -> Cluster | None:
    """The cluster with the costs of all stages: of its latest calibration, or its own; None where some are missing."""
    if cluster is None:
        return None
    found = ledger.told(cluster)
    if found is None:
        return stage_costs(cluster)
    return calibrated_costs(found)


#: brought to recipes, by name
EXCHANGES: Mapping[str, Hier] = {"hiermoe-hd": Hier("hiermoe-hd"), "hiermoe-hd2": HD2("hiermoe-hd2", 2)}

__all__ = ["EXCHANGES", "HD2", "Hier", "HierFares", "known_costs"]
