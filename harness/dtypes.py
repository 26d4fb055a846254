"""Number formats: torch's own of each name, and what rounding to them may do to a layer."""

from __future__ import annotations

import torch

from harness.specs import Dtype

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
#: formats of 16 bits, of which sums and what is compared with them are kept in float32
SHORT = ("bfloat16", "float16")
