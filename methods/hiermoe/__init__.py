"""HierMoE (arXiv 2508.09591): hierarchical token deduplication, the dimension that pays, and expert swap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from baselines import smartmoe
from harness.comm.job import Job
from harness.options import whole
from harness.plan.native import NativeLayer, NativeSystem
from harness.plan.placings import Placing
from harness.plan.slots import Pipelined
from harness.system import AfterStep, Case
from methods.hiermoe.between import MAX_SHARE, SwapOptions, Swaps
from methods.hiermoe.layout import EXCHANGES, Hier
from methods.hiermoe.planner import PlannerModel
from methods.hiermoe.swap import GAMMA
from methods.hiermoe.training import Swapper


class HierD(NativeSystem):
    """The all-to-all of the dimension that the time model finds best for each routing."""

    name = "hiermoe-hd"
    title = "HierMoE without expert swap: deduplicated all-to-all of the dimension that pays, pipelined"
    source = "arXiv 2508.09591, section III (HierD-AlltoAll)"
    exchange: ClassVar[Hier] = EXCHANGES["hiermoe-hd"]
    schedule = Pipelined()
    chunked: ClassVar[dict[str, bool | int | float | str]] = {"chunks": 3}
    options: ClassVar[dict[str, str]] = {"chunks": Hier.CHUNKS, **Hier.options}
    recipe: ClassVar[dict[str, str]] = {"exchange": "hiermoe-hd", "schedule": "pipelined"}


class Swap(Placing):
    """In training two experts of each layer change places where the time model finds that it pays."""

    title = "HierMoE's expert swap: two experts of each layer change places where its time model finds that it pays"
    source = "arXiv 2508.09591, section IV (HierD-ES)"
    exchange: ClassVar[Hier]
    slot_options: ClassVar[dict[str, str]] = {
        "swap_every": "training steps between updates, at least (default 1); more where the cluster's costs are known "
        f"and an update would take over {MAX_SHARE:.0%} of them",
        "swap_pairs": "swaps of each layer in one update (default 1)",
        "max": "of the objective: smooth, plain or log-sum-exp (default smooth)",
        "gamma": f"of the objective's smooth maximum (default {GAMMA:g})",
    }

    @classmethod
    def clashes(cls, parts: Mapping[str, Any]) -> str | None:
        if not isinstance(parts["exchange"], Hier):
            return f"it weighs the stages of HierMoE's exchanges, and {parts['exchange'].name} has none"
        if parts["state"].copies:
            return "its objective counts tokens where experts' owners are, and copies take them elsewhere"
        return None

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        pairs = case.options.get("swap_pairs", 1)
        if isinstance(pairs, int) and pairs > case.model.num_experts // 2:
            return f"{pairs} pairs of experts to swap are more than {case.model.num_experts} experts have"
        return super().refuse(case)

    @classmethod
    def mover(cls, layers: Sequence[NativeLayer], case: Case, job: Job) -> AfterStep:
        dimension = cls.exchange.dimension(case)
        model = dimension if isinstance(dimension, PlannerModel) else None
        return Swapper(job, layers, cls.swaps(case), model, cls.exchange.wire(case).row_bytes)

    @classmethod
    def moves(cls, cases: Sequence[Case]) -> Swaps:
        case = cases[0]
        return Swaps(cls, cases, cls.swaps(case), cls.exchange.dimension(case), cls.exchange.wire(case))

    @classmethod
    def swaps(cls, case: Case) -> SwapOptions:
        return SwapOptions(
            every=whole(case, "swap_every", 1, 10**6),
            pairs=whole(case, "swap_pairs", 1, case.model.num_experts // 2),
            max=case.options.get("max", "smooth"),  # type: ignore[arg-type]
            gamma=float(case.options.get("gamma", GAMMA)),
        )


class HierMoE(Swap, HierD):  # type: ignore[misc]
    """And, in training, two experts of each layer change places."""

    name = "hiermoe"
    title = "HierMoE: the all-to-all of the dimension that pays, and expert swap in training"
    source = "arXiv 2508.09591, sections III and IV (HierD-ES)"
    options: ClassVar[dict[str, str]] = HierD.options | Swap.slot_options
    recipe: ClassVar[dict[str, str]] = HierD.recipe | {"placement": "hiermoe"}


class HierMoEHD2(HierD):
    """HD2: a token crosses a node link once per destination node; one partial weighted sum per node returns."""

    name = "hiermoe-hd2"
    title = "HierMoE's two-dimensional deduplicated all-to-all, pipelined"
    source = "arXiv 2508.09591, section III (HD2)"
    options: ClassVar[dict[str, str]] = {key: HierD.options[key] for key in ("chunks", "deduplicate", "padded")}
    exchange = EXCHANGES["hiermoe-hd2"]
    recipe: ClassVar[dict[str, str]] = {"exchange": "hiermoe-hd2", "schedule": "pipelined"}


class HierMoEHD2Smart(smartmoe.Follows, HierMoEHD2):
    """HD2 with SmartMoE's dynamic placement in training."""

    name = "hiermoe-hd2-smart"
    title = "HierMoE's two-dimensional all-to-all with SmartMoE's dynamic placement"
    source = "arXiv 2508.09591, section VI (HD2-MoE-Smart)"
    options: ClassVar[dict[str, str]] = HierMoEHD2.options | smartmoe.OPTIONS
    recipe: ClassVar[dict[str, str]] = HierMoEHD2.recipe | {"placement": "smartmoe"}


#: brought to recipes, by name
PLACINGS = {"hiermoe": Swap}
