"""torchtitan's expert parallelism, priced and not run: its experts compute by CUDA kernels alone.

Its ``AllToAllTokenDispatcher`` sends each (token, expert) pair's row by one all-to-all, after one that tells how many
rows each expert gets, and brings outputs back by a third; probabilities stay at the source, which weights there.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from baselines import _packages
from harness.comm.exchange import flat_bytes
from harness.comm.job import Job
from harness.errors import bad
from harness.layer.weights import Weights
from harness.specs import DTYPE_BYTES, Dtype
from harness.system import Case, MoELayer, System

UNTRIED = "is priced and not run, as its experts need CUDA's grouped GEMM and triton; moebench simulate prices it"


class TorchTitan(System):
    name: ClassVar[str] = "torchtitan"
    title: ClassVar[str] = "torchtitan's MoE layer, all-to-all dispatcher (real package, priced only)"
    kind = "package"
    source: ClassVar[str] = "torchtitan 0.3.0: torchtitan/models/common/token_dispatcher.py"

    @classmethod
    def missing(cls) -> str | None:
        return UNTRIED

    @classmethod
    def version(cls) -> str | None:
        return _packages.version("torchtitan")

    @classmethod
    def tolerance(cls, dtype: Dtype) -> float:
        """Its experts compute in bfloat16, whatever the rows are."""
        return 3e-2

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        model = case.model
        if reason := _packages.refuse_placement(case, "torchtitan") or _packages.refuse_rare_gate(case, "torchtitan"):
            return reason
        if model.ffn_type != "swiglu":
            return "torchtitan's experts are gated (swiglu)"
        if case.dtype != "bfloat16":
            return f"torchtitan's experts compute in bfloat16, not {case.dtype}"
        if model.capacity_factor is not None:
            return "torchtitan drops no tokens"
        if case.ragged:
            return "torchtitan pads every rank to as many tokens"
        return None

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray]:
        """As the flat exchange: counts (int64) of the experts of each rank, and rows there and back."""
        return flat_bytes(case.routing, case.placement, case.model.hidden * DTYPE_BYTES[case.dtype])

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        raise bad("system", cls.name, UNTRIED)


__all__ = ["TorchTitan"]
