"""FSMoE (arXiv 2501.10714): co-scheduled links, adaptive degrees and gradient partitioning over sharded experts, and
the rivals that the paper measures it against, as schedules of the same layer."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from harness.comm.job import Job
from harness.errors import bad
from harness.layer.moe import UnifiedSystem
from harness.layer.weights import Weights
from harness.system import Case
from methods.fsmoe.cut import choose_cut
from methods.fsmoe.layer import FSMoELayer
from methods.fsmoe.step import POLICIES, Policy
from methods.fsmoe.traffic import sharded_bytes

ORDER = "tutel"


class FSMoE(UnifiedSystem):
    """All-to-all between nodes beside all-gather and reduce-scatter inside; both degrees and the gradients adaptive."""

    name = "fsmoe"
    title = "FSMoE: links side by side, adaptive degrees, gradients cut to measure"
    source = "arXiv 2501.10714, sections 3 to 5"
    policy: ClassVar[Policy] = POLICIES["fsmoe"]
    options: ClassVar[dict[str, str]] = {
        "degree_forward": "chunks of the capacity in forward, 1, 2, 4 or 8 (default: planned from the cluster's costs)",
        "degree_backward": "likewise in backward",
        "order": f"gshard (matrix products) or tutel (copied rows); default {ORDER}",
        "gradient_bytes": "gradients to all-reduce between nodes in backward (default: 0; with stand-in compute, where "
        "a layer has an attention too, those of one attention)",
    }
    stands_in = True

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        nodes = case.topology.shape[0]
        ranks = case.topology.num_ranks // nodes
        if case.model.num_experts % nodes:
            return f"num_experts = {case.model.num_experts} does not divide over {nodes} nodes"
        if case.model.ffn % ranks:
            return f"ffn = {case.model.ffn} does not divide over the {ranks} ranks of a node that share an expert"
        if case.stand_in:
            if case.device != "cpu":
                return "stand-in compute is for ranks that share a CPU"
            if case.cluster is None or case.cluster.gemm is None:
                return "stand-in compute needs the gemm constants of the cluster"
        return None

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> FSMoELayer:
        order = str(case.options.get("order", ORDER))
        if order not in ("gshard", "tutel"):
            raise bad("options.order", order, "must be gshard or tutel")
        return FSMoELayer(case, job, weights, cls.policy, choose_cut(case, cls.policy), order)

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        routing = cls.planned_routing(case)
        return None if routing is None else sharded_bytes(case, routing, choose_cut(case, cls.policy))


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
