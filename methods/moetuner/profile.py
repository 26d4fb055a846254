"""Stage 1 of MoETuner (arXiv 2502.06643): how often tokens use each expert, and each pair of successive experts.

Interpretations: with k experts a token counts once for every pair (one of its k at layer l, one of its k at layer
l + 1); the paper does not say how top-2 is counted. It does not say how many tokens it profiles either.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """``load``: P[l, e], tokens of layer l to expert e, int64 [L, E]. ``flow``: R[l, e1, e2], tokens that go to e1 in
    layer l and to e2 in layer l + 1, int64 [L - 1, E, E]."""

    load: np.ndarray
    flow: np.ndarray
    num_tokens: int

    @classmethod
    def of_ids(cls, ids: np.ndarray, num_experts: int) -> Profile:
        """``ids`` int [L, T, k]: the experts of the same T tokens at every layer."""
        num_layers, num_tokens, _ = ids.shape
        load = np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in ids])
        flow = np.zeros((num_layers - 1, num_experts, num_experts), dtype=np.int64)
        for layer in range(num_layers - 1):
            pairs = ids[layer][:, :, None].astype(np.int64) * num_experts + ids[layer + 1][:, None, :]  # [T, k, k]
            flow[layer] = np.bincount(pairs.ravel(), minlength=num_experts**2).reshape(num_experts, -1)
        return cls(load, flow, num_tokens)

    @property
    def num_layers(self) -> int:
        return int(self.load.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[1])

    @property
    def unused(self) -> dict[int, list[int]]:
        """By layer, experts that no profiled token uses."""
        return {layer: np.flatnonzero(row == 0).tolist() for layer, row in enumerate(self.load) if (row == 0).any()}
