"""FSMoE (arXiv 2501.10714): co-scheduled links, adaptive degrees and gradient partitioning over sharded experts, and
the rivals that the paper measures it against, as schedules of the same layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from harness.comm.job import Job
from harness.errors import bad
from harness.layer.moe import UnifiedSystem
from harness.layer.order import ORDERS
from harness.layer.weights import Weights
from harness.plan.passage import Passage
from harness.routing.types import Routing
from harness.system import Case, GradientSlices, MoELayer
from methods.fsmoe.chunks import SCHEDULES
from methods.fsmoe.cut import Cut, LayerSizes, choose_cut, layer_sizes, padded_capacity, settle, sharded, with_degrees
from methods.fsmoe.layer import FSMoELayer
from methods.fsmoe.layout import PricedFSMoE
from methods.fsmoe.mesh import node_mesh, rank_mesh
from methods.fsmoe.step import POLICIES, Policy
from methods.fsmoe.traffic import planned

ORDER = "tutel"


class FSMoE(UnifiedSystem):
    """All-to-all between nodes beside all-gather and reduce-scatter inside; both degrees and the gradients adaptive."""

    name = "fsmoe"
    title = "FSMoE: links side by side, adaptive degrees, gradients cut to measure"
    source = "arXiv 2501.10714, sections 3 to 5"
    policy: ClassVar[Policy] = POLICIES["fsmoe"]
    chunked: ClassVar[dict[str, bool | int | float | str]] = {"degree_forward": 4, "degree_backward": 4}
    options: ClassVar[dict[str, str]] = {
        "degree_forward": "chunks of the capacity in forward, 1, 2, 4 or 8 (default: planned from the cluster's costs)",
        "degree_backward": "likewise in backward",
        "experts": "sharded (over the ranks of a node, as the paper assumes) or whole (one rank each); default sharded",
        "all_to_all": "of whole experts: flat, 1dh (through one rank a node) or 2dh (inside nodes, then between them); "
        "default flat",
        "order": f"gshard (matrix products) or tutel (copied rows); default {ORDER}",
        "gradient_bytes": "gradients to all-reduce between nodes in backward (default: 0; with stand-in compute, where "
        "a layer has an attention too, those of one attention)",
    }
    stands_in = True

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        nodes = case.topology.shape[0]
        ranks = case.topology.num_ranks // nodes
        groups = nodes if sharded(case) else nodes * ranks
        if case.model.num_experts % groups:
            return f"num_experts = {case.model.num_experts} does not divide over {groups} groups of ranks"
        if sharded(case) and case.model.ffn % ranks:
            return f"ffn = {case.model.ffn} does not divide over the {ranks} ranks of a node that share an expert"
        return None

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> FSMoELayer:
        order = _one_of(case, "order", ORDER, tuple(ORDERS))
        _one_of(case, "experts", "sharded", ("sharded", "whole"))
        algorithm = _one_of(case, "all_to_all", "flat", ("flat", "1dh", "2dh"))
        if sharded(case) and algorithm != "flat":
            raise bad("options.all_to_all", algorithm, "is a choice for whole experts; add experts: whole")
        mesh = node_mesh(job) if sharded(case) else rank_mesh(job, algorithm)  # type: ignore[arg-type]
        cut = choose_cut(case, cls.policy)
        return FSMoELayer(case, job, weights, policy=cls.policy, cut=cut, mesh=mesh, order=order)

    @classmethod
    def place_gradients(
        cls, layers: Sequence[MoELayer], case: Case, gradient_bytes: Sequence[int], scope: str
    ) -> list[GradientSlices]:
        degrees, slices = settle(case, cls.policy, gradient_bytes, scope)
        for layer, degree in zip(layers, degrees, strict=False):
            assert isinstance(layer, FSMoELayer)
            layer.recut(dataclasses.replace(layer.cut, degree_backward=degree))
        return slices

    @classmethod
    def settle(
        cls, cases: Sequence[Case], gradient_bytes: Sequence[int], scope: str
    ) -> tuple[list[Case], list[GradientSlices]]:
        degrees, slices = settle(cases[0], cls.policy, gradient_bytes, scope)
        cuts = [choose_cut(case, cls.policy) for case in cases]
        for i, degree in enumerate(reversed(degrees)):
            cuts[i] = dataclasses.replace(cuts[i], degree_backward=degree)
        return [with_degrees(case, cut) for case, cut in zip(cases, cuts, strict=True)], slices

    @classmethod
    def layout(cls, case: Case) -> Passage:
        return PricedFSMoE(case, cls.policy, *cls._planned(case, cls.planned_routing(case) or case.routing))

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        routing = cls.planned_routing(case)
        return None if routing is None else planned(case, *cls._planned(case, routing))

    @classmethod
    def _planned(cls, case: Case, routing: Routing) -> tuple[LayerSizes, Cut]:
        cut = choose_cut(case, cls.policy)
        return layer_sizes(case, padded_capacity(case, routing, cut)), cut


class NoOverlap(FSMoE):
    name = "fsmoe-no-overlap"
    title = "sharded experts, no overlap at all"
    source = "arXiv 2501.10714, section 6: the schedule that overlaps nothing"
    policy = POLICIES["no-overlap"]


class Tutel(FSMoE):
    name = "fsmoe-tutel"
    title = "Tutel's schedule with PipeMoE's degree, on FSMoE's layer"
    source = "arXiv 2501.10714, section 6: Tutel (with PipeMoE)"
    policy = POLICIES["tutel"]


class TutelImproved(FSMoE):
    name = "fsmoe-tutel-improved"
    title = "Tutel's schedule with gradients beside the dense part, on FSMoE's layer"
    source = "arXiv 2501.10714, section 6: Tutel-Improved"
    policy = POLICIES["tutel-improved"]


class Lina(FSMoE):
    name = "fsmoe-lina"
    title = "PipeMoE's degree and Lina's fixed gradient chunks, on FSMoE's layer"
    source = "arXiv 2501.10714, section 6: PipeMoE + Lina"
    policy = POLICIES["lina"]


class NoIIO(FSMoE):
    name = "fsmoe-no-iio"
    title = "FSMoE without the overlap of inter- and intra-node links"
    source = "arXiv 2501.10714, section 6: FSMoE-No-IIO"
    policy = POLICIES["no-iio"]


def _one_of(case: Case, option: str, default: str, known: tuple[str, ...]) -> str:
    value = case.options.get(option, default)
    if value not in known:
        raise bad(f"options.{option}", value, f"must be one of {', '.join(known)}")
    return str(value)


__all__ = ["SCHEDULES", "FSMoE", "Lina", "NoIIO", "NoOverlap", "Tutel", "TutelImproved"]
