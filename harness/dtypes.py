"""Names of number formats, and torch's own."""

from __future__ import annotations

import torch

TORCH_DTYPE: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
