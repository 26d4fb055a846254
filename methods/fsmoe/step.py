"""What FSMoE's schedule and each of its rivals' decide for a generalized layer (arXiv 2501.10714, section 5: an MoE
layer and the dense part before it).

What a rival changes is its ``Policy``: whether links work side by side, who chooses the degree, and where the gradient
all-reduce goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from harness.plan.cost import Even
from harness.plan.graph import Work
from methods.fsmoe.costs import LayerCosts, Reduce
from methods.fsmoe.degree import DEGREES, overlappable, scan_degree


@dataclasses.dataclass(frozen=True)
class Policy:
    """``overlap``: inter- and intra-node links work side by side. ``degree``: 1, one for both directions (the best for
    their sum), or one each. ``gradients``: reduced after the layer; beside its dense part; in fixed chunks wherever
    the link idles; or cut to measure (adaptive)."""

    title: str
    overlap: bool
    degree: Literal["one", "shared", "adaptive"]
    gradients: Literal["after", "dense", "fixed", "adaptive"]


POLICIES = {
    "no-overlap": Policy("no overlap: one chunk, gradients after the layer", False, "one", "after"),
    "tutel": Policy("Tutel's schedule with PipeMoE's adaptive degree", False, "shared", "after"),
    "tutel-improved": Policy("Tutel-Improved: and gradients beside the dense part", False, "shared", "dense"),
    "lina": Policy("PipeMoE and Lina: gradients in fixed chunks where the link idles", False, "shared", "fixed"),
    "no-iio": Policy("FSMoE without inter/intra overlap", False, "adaptive", "adaptive"),
    "fsmoe": Policy("FSMoE", True, "adaptive", "adaptive"),
}
LINA_CHUNK_BYTES = 30e6  # Lina's fixed chunk, as the paper sets it


class Decision:
    """What a policy does with layers [N]: degrees [N] forward and backward, and bytes of the gradient all-reduce [N]
    in the MoE part, beside the dense part, and after the layer; each in so many ``chunks`` [N] (equal ones).
    Layers whose whole all-to-all takes less than ``least_a2a_s`` are not cut. ``forced``: degrees forward and backward
    that are given and not chosen."""

    def __init__(
        self,
        policy: Policy,
        forward: LayerCosts,
        backward: LayerCosts,
        reduce: Reduce,
        gradient_bytes: Any,
        dense_backward_s: Any,
        *,
        chunk_bytes: float = LINA_CHUNK_BYTES,
        degrees: Sequence[int] = DEGREES,
        least_a2a_s: float = 0.0,
        forced: tuple[int, int] | None = None,
    ):
        if not policy.overlap:
            forward, backward = forward.folded(), backward.folded()
        shape = np.broadcast_shapes(forward.shape, np.shape(gradient_bytes), np.shape(dense_backward_s))
        total = np.broadcast_to(np.asarray(gradient_bytes, dtype=np.float64), shape)
        self.forward, self.backward = _degrees(policy, forward, backward, shape, degrees)
        worth = np.broadcast_to(forward.a2a.chunk_s(1) >= least_a2a_s, shape) & (forced is None)
        self.forward, self.backward = np.where(worth, self.forward, 1), np.where(worth, self.backward, 1)
        if forced is not None:
            self.forward, self.backward = (np.full(shape, degree) for degree in forced)
        none, one = np.zeros(shape), np.ones(shape)
        self.moe_bytes, self.dense_bytes, self.moe_chunks, self.dense_chunks = none, none, one, one
        idle_s = np.maximum(overlappable(backward, self.backward), 0.0)
        if policy.gradients == "dense":
            self.dense_bytes = total
        elif policy.gradients == "fixed":
            num_chunks = np.maximum(np.ceil(total / chunk_bytes), 1)
            each = total / num_chunks
            # Lina starts a chunk whenever the link has nothing else to do; the last may overrun.
            started = np.where(idle_s > 0, np.ceil(idle_s / reduce.time_s(each).clip(1e-12)), 0)
            self.moe_chunks = np.minimum(started, num_chunks)
            self.dense_chunks = num_chunks - self.moe_chunks
            self.moe_bytes, self.dense_bytes = each * self.moe_chunks, each * self.dense_chunks
        elif policy.gradients == "adaptive":
            self.moe_bytes = np.minimum(total, reduce.bytes_in(idle_s))
            self.dense_bytes = np.minimum(total - self.moe_bytes, reduce.bytes_in(np.asarray(dense_backward_s)))
            # Step 2 with one layer: the remainder goes with its own MoE part, or after the layer, whichever is shorter.
            rest = total - self.moe_bytes - self.dense_bytes
            degree, with_rest = scan_degree(backward, reduce.time_s(self.moe_bytes + rest), degrees)
            _, without = scan_degree(backward, reduce.time_s(self.moe_bytes), degrees)
            inside = (rest > 0) & (with_rest < without + reduce.time_s(rest))
            self.moe_bytes = np.where(inside, self.moe_bytes + rest, self.moe_bytes)
            self.backward = np.where(inside & worth, degree, self.backward)
        self.after_bytes = total - self.moe_bytes - self.dense_bytes


def _degrees(
    policy: Policy, forward: LayerCosts, backward: LayerCosts, shape: tuple[int, ...], degrees: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    if policy.degree == "one":
        return np.ones(shape, dtype=int), np.ones(shape, dtype=int)
    if policy.degree == "adaptive":
        found = [np.broadcast_to(scan_degree(costs, degrees=degrees)[0], shape) for costs in (forward, backward)]
        return found[0], found[1]
    sums = [scan_degree(forward, degrees=[r])[1] + scan_degree(backward, degrees=[r])[1] for r in degrees]
    best = np.broadcast_to(np.asarray(degrees)[np.argmin(sums, axis=0)], shape)
    return best, best


def reduction(num_bytes: Any, chunks: Any = 1) -> Work:
    """A slice of the gradient all-reduce between nodes, sent in so many messages; priced only."""
    return Work(Even("ar", "inter", num_bytes, chunks))
