"""Where the gradients go: FSMoE's adaptive gradient partitioning (arXiv 2501.10714, section 5).

Layers are counted in backward order: layer 0 is the model's last, whose backward runs first. The backward of a layer
is its MoE part, then its dense part, whose end produces the layer's gradient; so a slice sent in layer i, in either
part, holds gradients of layers before i. What no layer sends is reduced after the backward (the tail).

Step 1 fills, layer by layer, the time for which the inter-node lane idles anyway. Step 2 shares out what is left: a
slice longer than that time makes its layer longer, but a layer so lengthened wants fewer chunks and gains by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import Bounds, differential_evolution

from harness.errors import bad
from methods.fsmoe.costs import Array, LayerCosts, Reduce
from methods.fsmoe.degree import DEGREES, degree_terms, scan_degree

POPULATION = 48  # candidates of a generation
MAX_GENERATIONS = 1000


@dataclass(frozen=True, eq=False)
class Partition:
    """Bytes of gradient sent in each layer [n] (backward order) and the degree that its MoE part then wants.

    ``UserError`` naming the layer if a slice is negative, or larger than the gradient produced and not sent before it.
    """

    gradient_bytes: Array  # [n] int64, produced at the end of each layer
    moe_bytes: Array  # [n] int64, the slice between the dispatches and the combines
    dense_bytes: Array  # [n] int64, the slice beside the dense part
    degree: Array  # [n]
    moe_s: Array  # [n] seconds of the MoE part with its slice
    tail_s: float  # seconds of the reduction after the backward

    def __post_init__(self) -> None:
        ready = 0
        for layer, (moe, dense, new) in enumerate(
            zip(self.moe_bytes.tolist(), self.dense_bytes.tolist(), self.gradient_bytes.tolist(), strict=True)
        ):
            for part, slice_bytes in (("moe_bytes", moe), ("dense_bytes", dense)):
                if not 0 <= slice_bytes <= ready:
                    raise bad(
                        f"layer {layer} (backward order).{part}",
                        slice_bytes,
                        f"must be 0 to {ready}, the bytes of gradient that are produced and not yet sent",
                    )
                ready -= slice_bytes
            ready += new
        assert ready == self.tail_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes reduced after the backward: the slices and this are all of the gradient."""
        return int(self.gradient_bytes.sum() - self.moe_bytes.sum() - self.dense_bytes.sum())

    @property
    def exposed_s(self) -> float:
        """What the partition is judged by: seconds of all MoE parts and of the tail."""
        return float(self.moe_s.sum() + self.tail_s)


def adaptive_partition(
    costs: LayerCosts,
    reduce: Reduce,
    gradient_bytes: ArrayLike,
    dense_s: ArrayLike,
    *,
    degrees: Sequence[int] = DEGREES,
    element_bytes: int = 4,
    seed: int = 0,
) -> Partition:
    """Both steps, for backward ``costs`` [n], ``gradient_bytes`` [n] and seconds of the dense parts ``dense_s`` [n].

    Never worse than step 1 with every remainder sent where it arises, nor than with all of it in the tail.
    ``UserError`` if the gradient is negative or not of whole elements. The same seed gives the same result.
    """
    gradient = _whole(gradient_bytes, element_bytes)
    num_layers = len(gradient)
    costs = _stretched(costs, num_layers)
    link, olp = degree_terms(costs, degrees)  # [R, n]
    first = np.argmin(link + olp, axis=0)  # [n] degrees without a gradient slice
    olp_moe_s = np.take_along_axis(olp, first[None], axis=0)[0]
    moe, dense = greedy_fill(gradient, olp_moe_s, np.broadcast_to(dense_s, num_layers), reduce, element_bytes)

    room = remaining_room(gradient, moe + dense)
    choices = [np.zeros_like(room), np.diff(room, prepend=0)]  # all in the tail; each remainder in its own layer
    # Skipped as in the authors' code: fewer than two remainders, or degrees that cannot fall any further.
    if np.count_nonzero(choices[1]) > 1 and (first > 0).any():
        choices.append(_evolve(link, olp, reduce, gradient, moe, dense, room, element_bytes, seed))

    def finished(extra: Array) -> Partition:
        degree, moe_s = scan_degree(costs, reduce.time_s(moe + extra), degrees)
        tail = gradient.sum() - (moe + dense + extra).sum()
        return Partition(gradient, moe + extra, dense, degree, moe_s, float(reduce.time_s(tail)))

    return min((finished(extra) for extra in choices), key=lambda partition: partition.exposed_s)


def greedy_fill(
    gradient_bytes: ArrayLike, olp_moe_s: ArrayLike, olp_dense_s: ArrayLike, reduce: Reduce, element_bytes: int = 4
) -> tuple[Array, Array]:
    """Step 1: bytes [n] that each MoE part and each dense part can hide, taken as early as they exist.

    A part hides g_inv(t_olp) bytes: none if the reduction's start-up alone fills it. Interpretation: the paper adds the
    two times of a layer up; they are two reductions with a start-up each, so here each is filled by itself.
    """
    gradient = _whole(gradient_bytes, element_bytes)
    slices = np.zeros((2, len(gradient)), dtype=np.int64)
    slots = np.stack([reduce.bytes_in(np.broadcast_to(t, len(gradient))) for t in (olp_moe_s, olp_dense_s)])
    ready = 0
    for layer, new in enumerate(gradient.tolist()):
        for part in (0, 1):
            take = min(float(ready), float(slots[part, layer]))
            slices[part, layer] = int(take) // element_bytes * element_bytes
            ready -= int(slices[part, layer])
        ready += new
    return slices[0], slices[1]


def remaining_room(gradient_bytes: Array, sent_bytes: Array) -> Array:
    """Step 2's constraint: the most bytes that layers 0 to i may send in all beside ``sent_bytes`` [n], for each i.

    Gradient must exist before layer i, and must not be what a later layer sends already.
    """
    produced = np.cumsum(gradient_bytes) - gradient_bytes
    left = produced - np.cumsum(sent_bytes)  # [n]
    return np.minimum.accumulate(left[::-1])[::-1]


def within_room(extra: Array, room: Array) -> Array:
    """Candidates [n, S] cut so that no prefix sum exceeds ``room`` [n]: each layer sends what is left, at most."""
    total = np.cumsum(extra, axis=0)
    over = np.minimum(np.minimum.accumulate(room[:, None] - total, axis=0), 0)
    return np.diff(total + over, axis=0, prepend=0)


def _evolve(
    link: Array,
    olp: Array,
    reduce: Reduce,
    gradient: Array,
    moe: Array,
    dense: Array,
    room: Array,
    element_bytes: int,
    seed: int,
) -> Array:
    """Step 2: extra bytes [n] of each MoE part by differential evolution.

    Interpretation: the constraint on prefix sums is kept by cutting every candidate (``within_room``), not by a
    penalty, so that all of a population counts. The shares of the bounds that evolve may lie outside 0 to 1 and count
    as the nearer end: the best slices are often none or all, which a population inside the bounds rarely hits.
    """
    free = np.flatnonzero(room > 0)
    rest = float(gradient.sum() - (moe + dense).sum())
    link, olp, base, limit = link[:, free, None], olp[:, free, None], moe[free, None], room[free].astype(np.float64)

    def extra_bytes(shares: Array) -> Array:
        return within_room(np.clip(shares, 0, 1) * limit[:, None], limit)  # [n, S]

    def objective(shares: Array, /) -> Any:
        """Seconds [S] of the MoE parts and the tail, for shares [n, S] of the most that a layer may send."""
        extra = extra_bytes(shares.reshape(len(free), -1))
        slices = base + extra
        moe_s = np.min(link + np.maximum(reduce.time_s(slices), olp), axis=0).sum(axis=0)
        return moe_s + reduce.time_s(rest - extra.sum(axis=0))

    rng = np.random.default_rng(seed)
    start = rng.random((POPULATION, len(free))) * (rng.random((POPULATION, len(free))) < rng.random((POPULATION, 1)))
    start[0] = 0
    start[1] = np.diff(limit, prepend=0) / limit
    found = differential_evolution(
        objective,
        Bounds(np.full(len(free), -0.25), np.full(len(free), 1.25)),
        init=start,
        maxiter=MAX_GENERATIONS,
        tol=1e-6,
        rng=rng,
        vectorized=True,
        updating="deferred",
        polish=False,
    )
    extra = np.zeros(len(room), dtype=np.int64)
    total = np.cumsum(extra_bytes(found.x[:, None])[:, 0])
    total = np.minimum(np.round(total / element_bytes) * element_bytes, limit)
    extra[free] = np.diff(total, prepend=0).astype(np.int64)
    return extra


def _whole(gradient_bytes: ArrayLike, element_bytes: int) -> Array:
    """[n] int64; ``UserError`` unless every layer's gradient is a whole number of elements."""
    gradient = np.atleast_1d(np.asarray(gradient_bytes))
    wrong = np.flatnonzero((gradient < 0) | (gradient % element_bytes != 0))
    if len(wrong):
        layer = int(wrong[0])
        remedy = f"must be a whole number of {element_bytes}-byte elements"
        raise bad(f"layer {layer} (backward order).gradient_bytes", gradient[layer].item(), remedy)
    return gradient.astype(np.int64)


def _stretched(costs: LayerCosts, num_layers: int) -> LayerCosts:
    """Costs of equal layers given once, or of all: [n] either way."""
    if costs.shape in ((), (1,)):
        return (costs[None] if costs.shape == () else costs)[np.zeros(num_layers, dtype=np.int64)]
    if costs.shape != (num_layers,):
        raise bad("costs", costs.shape, f"must be of one layer or of all {num_layers} that have a gradient")
    return costs
