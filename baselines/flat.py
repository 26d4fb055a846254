"""Flat expert parallelism: one copy of a token per chosen expert, one all-to-all-v over all ranks.

The control: what any framework's all-to-all dispatcher does, without a framework.
"""

from __future__ import annotations

import numpy as np

from harness.comm.exchange import FlatExchange, flat_bytes
from harness.comm.job import Job
from harness.plan.native import NativeSystem
from harness.specs import DTYPE_BYTES
from harness.system import Case


class Flat(NativeSystem):
    name = "flat"
    title = "all-to-all-v expert parallelism, the control"
    source = "expert parallelism of GShard (arXiv 2006.16668) with exact sizes"

    @classmethod
    def exchange(cls, case: Case, job: Job) -> FlatExchange:
        return FlatExchange(job, case.placement)

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        routing = cls.planned_routing(case)
        if routing is None:
            return None
        return flat_bytes(routing, case.placement, case.model.hidden * DTYPE_BYTES[case.dtype])
