"""HierMoE (arXiv 2508.09591): hierarchical token deduplication, the dimension that pays, and expert swap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from baselines import smartmoe
from harness import ledger
from harness.comm.job import Job
from harness.options import whole, yes
from harness.plan.native import NativeSystem
from harness.plan.passage import Passage
from harness.specs import DTYPE_BYTES, Cluster
from harness.system import AfterStep, Case, MoELayer
from methods.hiermoe.between import MAX_SHARE, SwapOptions, Swaps
from methods.hiermoe.counts import count
from methods.hiermoe.hierd import HierExchange
from methods.hiermoe.layout import PricedHier
from methods.hiermoe.planner import PlannerModel, calibrated_costs, stage_costs
from methods.hiermoe.swap import GAMMA
from methods.hiermoe.traffic import HierTravel, Wire
from methods.hiermoe.training import Swapper

MAX_CHUNKS = 12
MIN_CHUNK_BYTES = 128 * 1024  # of one rank's tokens: smaller messages cost more in start-up than overlap saves
_CHUNKS = (
    "pieces of the batch that overlap the stages "
    f"(default: as many as hold {MIN_CHUNK_BYTES // 1024} KiB of tokens each, at most {MAX_CHUNKS})"
)


class HierD(NativeSystem):
    """The all-to-all of the dimension that the time model finds best for each routing."""

    name = "hiermoe-hd"
    title = "HierMoE without expert swap: deduplicated all-to-all of the dimension that pays, pipelined"
    source = "arXiv 2508.09591, section III (HierD-AlltoAll)"
    chunked: ClassVar[dict[str, bool | int | float | str]] = {"chunks": 3}
    options: ClassVar[dict[str, str]] = {
        "chunks": _CHUNKS,
        "dimension": "d of HDd, 1 (all ranks at once) to the number of link levels "
        "(default: the best for each routing by the cluster's costs; 2 where none are known)",
        "deduplicate": "false: every (token, expert) pair travels, the paper's Hd (default true)",
        "padded": "true: all messages of a stage as long as its longest, as the paper's sizes are (default false)",
    }
    fixed: ClassVar[int | None] = None  # a dimension that is not an option

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        dimension = cls.fixed or case.options.get("dimension")
        if isinstance(dimension, int) and dimension > case.topology.num_levels:
            shape = " x ".join(map(str, case.topology.shape))
            return f"dimension {dimension} needs as many link levels; {shape} ranks have {case.topology.num_levels}"
        return None

    @classmethod
    def exchange(cls, case: Case, job: Job) -> HierExchange:
        wire = cls.wire(case)
        return HierExchange(
            job,
            case.placement,
            cls.dimension(case),
            num_chunks=wire.num_chunks,
            deduplicate=wire.deduplicate,
            padded=wire.padded,
            row_bytes=wire.row_bytes,
        )

    @classmethod
    def travel(cls, case: Case) -> HierTravel | None:
        """How the case's tokens will go; None where the gate alone knows."""
        routing = cls.planned_routing(case)
        if routing is None:
            return None
        owner, wire, dimension = case.placement.owner, cls.wire(case), cls.dimension(case)
        counts = count(routing, owner, case.topology)
        if chosen := isinstance(dimension, PlannerModel):
            dimension = dimension.best(counts, wire.row_bytes, padded=wire.padded, chunks=wire.num_chunks)
        return HierTravel.of(routing, owner, case.topology, dimension, wire, counts=counts, chosen=chosen)

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        if (travel := cls.travel(case)) is None:
            return None
        parts = ["metadata", "dispatch", "combine", "combine_grad", "dispatch_grad"]
        parts += ["metadata_grad"] if travel.wire.weights_learn else []
        return {part: travel.bytes(part) for part in parts}

    @classmethod
    def layout(cls, case: Case) -> Passage | None:
        travel = cls.travel(case)
        return None if travel is None else PricedHier(case, travel, cls.planned_rows(case))

    @classmethod
    def dimension(cls, case: Case) -> int | PlannerModel:
        """d, or by what every routing chooses its own."""
        if cls.fixed is not None:
            return min(cls.fixed, case.topology.num_levels)
        if "dimension" in case.options:
            return whole(case, "dimension", 0, case.topology.num_levels)
        costs = known_costs(case.cluster)
        return min(2, case.topology.num_levels) if costs is None else PlannerModel(costs)

    @classmethod
    def wire(cls, case: Case) -> Wire:
        """How its exchange sends."""
        deduplicate, padded = (yes(case, key, default) for key, default in (("deduplicate", True), ("padded", False)))
        return Wire(
            row_bytes=case.model.hidden * DTYPE_BYTES[case.dtype],
            weight_bytes=8 if case.dtype == "float64" else 4,
            num_chunks=_chunks(case),
            deduplicate=deduplicate,
            padded=padded,
            weights_learn=case.model.gate != "softmoe",  # its slots weigh 1
        )


class HierMoE(HierD):
    """And, in training, two experts of each layer change places where the time model finds that it pays."""

    name = "hiermoe"
    title = "HierMoE: the all-to-all of the dimension that pays, and expert swap in training"
    source = "arXiv 2508.09591, sections III and IV (HierD-ES)"
    options: ClassVar[dict[str, str]] = HierD.options | {
        "swap_every": "training steps between updates, at least (default 1); more where the cluster's costs are known "
        f"and an update would take over {MAX_SHARE:.0%} of them",
        "swap_pairs": "swaps of each layer in one update (default 1)",
        "max": "of the objective: smooth, plain or log-sum-exp (default smooth)",
        "gamma": f"of the objective's smooth maximum (default {GAMMA:g})",
    }

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        pairs = case.options.get("swap_pairs", 1)
        if isinstance(pairs, int) and pairs > case.model.num_experts // 2:
            return f"{pairs} pairs of experts to swap are more than {case.model.num_experts} experts have"
        return super().refuse(case)

    @classmethod
    def after_step(cls, layers: Sequence[MoELayer], case: Case, job: Job) -> AfterStep:
        dimension = cls.dimension(case)
        model = dimension if isinstance(dimension, PlannerModel) else None
        return Swapper(job, layers, cls.swaps(case), model, cls.wire(case).row_bytes)  # type: ignore[arg-type]

    @classmethod
    def course(cls, cases: Sequence[Case]) -> Swaps:
        case = cases[0]
        return Swaps(cls, cases, cls.swaps(case), cls.dimension(case), cls.wire(case))

    @classmethod
    def swaps(cls, case: Case) -> SwapOptions:
        return SwapOptions(
            every=whole(case, "swap_every", 1, 10**6),
            pairs=whole(case, "swap_pairs", 1, case.model.num_experts // 2),
            max=case.options.get("max", "smooth"),  # type: ignore[arg-type]
            gamma=float(case.options.get("gamma", GAMMA)),
        )


class HierMoEHD2(HierD):
    """HD2: a token crosses a node link once per destination node; one partial weighted sum per node returns."""

    name = "hiermoe-hd2"
    title = "HierMoE's two-dimensional deduplicated all-to-all, pipelined"
    source = "arXiv 2508.09591, section III (HD2)"
    options: ClassVar[dict[str, str]] = {key: HierD.options[key] for key in ("chunks", "deduplicate", "padded")}
    fixed = 2


class HierMoEHD2Smart(smartmoe.Follows, HierMoEHD2):
    """HD2 with SmartMoE's dynamic placement in training."""

    name = "hiermoe-hd2-smart"
    title = "HierMoE's two-dimensional all-to-all with SmartMoE's dynamic placement"
    source = "arXiv 2508.09591, section VI (HD2-MoE-Smart)"
    options: ClassVar[dict[str, str]] = HierMoEHD2.options | smartmoe.OPTIONS


def known_costs(cluster: Cluster | None) -> Cluster | None:
    """The cluster with the costs of all stages: of its latest calibration, or its own; None where some are missing."""
    if cluster is None:
        return None
    found = ledger.told(cluster)
    if found is None:
        return stage_costs(cluster)
    return calibrated_costs(found)


def _chunks(case: Case) -> int:
    """The same on every rank, so the rank with the most tokens decides."""
    if "chunks" in case.options:
        return whole(case, "chunks", 0, 1024)
    most = max(case.routing.tokens) * case.model.hidden * DTYPE_BYTES[case.dtype]
    return min(MAX_CHUNKS, max(1, most // MIN_CHUNK_BYTES))
