"""HierMoE (arXiv 2508.09591): hierarchical token deduplication."""

from __future__ import annotations

import numpy as np

from harness.comm.job import Job
from harness.layer.moe import NativeSystem
from harness.specs import DTYPE_BYTES
from harness.system import Case
from methods.hiermoe.hierd import HierExchange, hier_bytes

DEFAULT_CHUNKS = 4


class HierMoEHD2(NativeSystem):
    """HD2: a token crosses a node link once per destination node; one partial weighted sum per node returns."""

    name = "hiermoe-hd2"
    title = "HierMoE's two-dimensional deduplicated all-to-all, pipelined"
    source = "arXiv 2508.09591, section III (HD2)"
    options = {"chunks": f"pieces of the batch that overlap inter- and intra-node hops (default {DEFAULT_CHUNKS})"}

    @classmethod
    def exchange(cls, case: Case, job: Job) -> HierExchange:
        return HierExchange(job, case.placement, num_chunks=_chunks(case))

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        if case.model.capacity_factor is not None:
            return None  # which rows are dropped is known to the gate alone
        return hier_bytes(
            case.routing,
            case.placement,
            case.topology,
            row_bytes=case.model.hidden * DTYPE_BYTES[case.dtype],
            weight_bytes=8 if case.dtype == "float64" else 4,
            num_chunks=_chunks(case),
        )


def _chunks(case: Case) -> int:
    return int(case.options.get("chunks", DEFAULT_CHUNKS))
