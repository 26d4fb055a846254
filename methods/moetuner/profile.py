"""Stage 1 of MoETuner (arXiv 2502.06643): how often tokens use each expert, and each pair of successive experts.

Interpretations: with k experts a token counts once for every pair (one of its k at layer l, one of its k at layer
l + 1); the paper does not say how top-2 is counted. It does not say how many tokens it profiles either.

A profile is a sample: part of what sets its counts apart is chance and will not come back. How much is told by its two
halves (blocks of tokens in turn): what both have in common is no chance. ``expected`` shrinks counts accordingly.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

BLOCK, MIN_BLOCKS = 128, 32  # tokens that follow one another stay together, if that leaves so many blocks


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """``load``: P[l, e], tokens of layer l to expert e, [L, E]. ``flow``: R[l, e1, e2], tokens that go to e1 in layer l
    and to e2 in layer l + 1, [L - 1, E, E]. int64, or float64 where they are expectations. ``repeats``: the share of
    the differences in each of the two, between 0 and 1, that other tokens will show too."""

    load: np.ndarray
    flow: np.ndarray
    num_tokens: int
    repeats: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of_ids(cls, ids: np.ndarray, num_experts: int) -> Profile:
        """``ids`` int [L, T, k]: the experts of the same T tokens at every layer."""
        num_tokens = ids.shape[1]
        block = max(1, min(BLOCK, num_tokens // MIN_BLOCKS))
        first = np.arange(num_tokens) // block % 2 == 0
        halves = [_counts(ids[:, which], num_experts) for which in (first, ~first)]
        load, flow = (half + other for half, other in zip(*halves, strict=True))
        if num_tokens < 2:
            return cls(load, flow, num_tokens)
        uneven = [half - half.mean(1, keepdims=True) for half, _ in halves]
        tied = [links - _independent(half, links) for half, links in halves]
        return cls(load, flow, num_tokens, (_repeats(*uneven), _repeats(*tied)))

    @functools.cached_property
    def expected(self) -> Profile:
        """What as many other tokens will do: loads drawn to their mean, flows to those of independent layers."""
        of_load, of_flow = self.repeats
        mean = self.load.mean(1, keepdims=True)
        load = mean + of_load * (self.load - mean)
        flow = _independent(load, self.flow) + of_flow * (self.flow - _independent(self.load, self.flow))
        return dataclasses.replace(self, load=load, flow=np.maximum(flow, 0.0))

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


def _counts(ids: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """P [L, E] and R [L - 1, E, E] of ``ids`` int [L, T, k]."""
    load = np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in ids])
    flow = np.zeros((len(ids) - 1, num_experts, num_experts), dtype=np.int64)
    for layer in range(len(flow)):
        pairs = ids[layer][:, :, None].astype(np.int64) * num_experts + ids[layer + 1][:, None, :]  # [T, k, k]
        flow[layer] = np.bincount(pairs.ravel(), minlength=num_experts**2).reshape(num_experts, -1)
    return load, flow


def _independent(load: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """R if a token's expert in one layer told nothing of its expert in the next."""
    whole = load.sum(1, dtype=np.float64)
    share = load / np.maximum(whole, 1.0)[:, None]
    return flow.sum((1, 2))[:, None, None] * share[:-1, :, None] * share[1:, None, :]


def _repeats(a: np.ndarray, b: np.ndarray) -> float:
    """Of the differences in the sum of two halves, the share that comes back: the reliability of a test of twice the
    length, by Spearman and Brown, from the correlation of its halves."""
    size = float((a**2).sum() + (b**2).sum()) / 2
    together = float((a * b).sum()) / size if size else 0.0
    return max(0.0, 2 * together / (1 + together)) if together > -1 else 0.0


__all__ = ["Profile"]
