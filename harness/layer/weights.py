"""Weights of one MoE layer, drawn from (seed, layer, expert) alone, in the oracle's layout.

Every rank can draw any expert by itself, so no rank ever needs to hold or receive all of them.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from harness.dtypes import TORCH_DTYPE
from harness.specs import Dtype, Model


@dataclasses.dataclass(frozen=True)
class Weights:
    """Deterministic weights of layer ``layer``; values are rounded to ``dtype`` before anybody uses them, so that
    the oracle in float64 and a system in bfloat16 start from the same numbers."""

    model: Model
    dtype: Dtype
    seed: int = 0
    layer: int = 0

    def _draw(self, stream: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.layer) * 1_000_003 + stream)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(TORCH_DTYPE[self.dtype])

    @property
    def router(self) -> torch.Tensor:
        """W_g [M, E]."""
        return self._draw(0, (self.model.hidden, self.model.num_experts), 1 / math.sqrt(self.model.hidden))

    @property
    def bias(self) -> torch.Tensor:
        """Selection bias of the sigmoid gate [E] (DeepSeek-V3's e_score_correction_bias); small, never in weights."""
        return self._draw(1, (self.model.num_experts,), 0.01)

    def expert(self, index: int) -> dict[str, torch.Tensor]:
        """w1 [M, H], w2 [H, M]; for swiglu w1 is the gate projection and w3 [M, H] the up projection."""
        m, h = self.model.hidden, self.model.ffn
        weights = {
            "w1": self._draw(3 * index + 2, (m, h), 1 / math.sqrt(m)),
            "w2": self._draw(3 * index + 3, (h, m), 1 / math.sqrt(h)),
        }
        if self.model.ffn_type == "swiglu":
            weights["w3"] = self._draw(3 * index + 4, (m, h), 1 / math.sqrt(m))
        return weights
