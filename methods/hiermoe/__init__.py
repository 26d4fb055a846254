"""HierMoE (arXiv 2508.09591): hierarchical token deduplication."""

from __future__ import annotations

import numpy as np

from harness.comm.job import Job
from harness.errors import bad
from harness.plan.native import NativeSystem
from harness.specs import DTYPE_BYTES
from harness.system import Case
from methods.hiermoe.hierd import HierExchange
from methods.hiermoe.traffic import hier_bytes

MAX_CHUNKS = 12
MIN_CHUNK_BYTES = 128 * 1024  # of one rank's tokens: smaller messages cost more in start-up than overlap saves


class HierMoEHD2(NativeSystem):
    """HD2: a token crosses a node link once per destination node; one partial weighted sum per node returns."""

    name = "hiermoe-hd2"
    title = "HierMoE's two-dimensional deduplicated all-to-all, pipelined"
    source = "arXiv 2508.09591, section III (HD2)"
    options = {
        "chunks": "pieces of the batch that overlap inter- and intra-node hops "
        f"(default: as many as hold {MIN_CHUNK_BYTES // 1024} KiB of tokens each, at most {MAX_CHUNKS})"
    }

    @classmethod
    def exchange(cls, case: Case, job: Job) -> HierExchange:
        return HierExchange(job, case.placement, num_chunks=_chunks(case))

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        routing = cls.planned_routing(case)
        if routing is None:
            return None
        parts = hier_bytes(
            routing,
            case.placement,
            case.topology,
            row_bytes=case.model.hidden * DTYPE_BYTES[case.dtype],
            weight_bytes=8 if case.dtype == "float64" else 4,
            num_chunks=_chunks(case),
        )
        if case.model.gate == "softmoe":
            del parts["metadata_grad"]  # slots weigh 1, so no gradients of weights return
        return parts


def _chunks(case: Case) -> int:
    """The same on every rank, so the rank with the most tokens decides."""
    if "chunks" in case.options:
        chunks = case.options["chunks"]
        if not isinstance(chunks, int) or not 1 <= chunks <= 1024:
            raise bad("options.chunks", chunks, "must be a whole number from 1 to 1024")
        return chunks
    most = max(case.routing.tokens) * case.model.hidden * DTYPE_BYTES[case.dtype]
    return min(MAX_CHUNKS, max(1, most // MIN_CHUNK_BYTES))
