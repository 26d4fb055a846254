"""Number formats: torch's own of each name, how long a row in them is, and what rounding to them may do to a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness.specs import DTYPE_BYTES, Dtype, ExchangeDtype, Experiment

if TYPE_CHECKING:
    from harness.system import Case

TORCH_DTYPE: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: largest relative error (max norm) of a layer against the float64 oracle. float64 and float32: 1e-10 and 1e-5 are
#: promised. Of 16 bits: five roundings in a row, of 2^-8 each in bfloat16 and of 2^-11 in float16
EXACT: dict[Dtype, float] = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2.5e-3}
#: what no arithmetic may claim for itself: the most that a real package needs, whose gate computes in float32
MOST: dict[Dtype, float] = {"float64": 2e-6, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
#: of outputs against an oracle whose rows have not been rounded on their way: as for bfloat16; two roundings of 2^-4,
#: that of float8_e4m3, as swiglu multiplies two things made of a row
UNROUNDED: dict[ExchangeDtype, float] = {"bfloat16": 3e-2, "float8_e4m3": 1.25e-1}
#: formats of 16 bits, of which sums and what is compared with them are kept in float32
SHORT = ("bfloat16", "float16")
#: of a row that share a scale in float8_e4m3, and how long the scale is (float32)
COLUMNS, SCALE_BYTES = 128, 4


def roughest(dtype: Dtype, exchange_dtype: ExchangeDtype | None) -> Dtype:
    """What a layer that computes in ``dtype`` is compared by: its sums come home in bfloat16 where rows travel in
    another format, and the oracle rounds rows on their way there itself."""
    return dtype if exchange_dtype is None else "bfloat16"


def row_bytes(of: Case | Experiment, part: str) -> int:
    """Of a row in ``part`` of an exchange (``System.planned_bytes``), with its scales (``harness.comm.packing``)."""
    hidden = of.model.hidden
    if of.exchange_dtype is None:
        return hidden * DTYPE_BYTES[of.dtype]
    if of.exchange_dtype == "float8_e4m3" and part == "dispatch":
        return hidden + SCALE_BYTES * -(-hidden // COLUMNS)
    return hidden * DTYPE_BYTES["bfloat16"]
