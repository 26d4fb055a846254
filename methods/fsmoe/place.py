"""Where the gradients of a whole step go under each schedule (arXiv 2501.10714, sections 5 and 6).

Layers are counted in backward order, as in ``methods.fsmoe.partition``: a slice holds gradients of layers whose
backward is done.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from harness.system import GradientSlices
from methods.fsmoe.costs import Array, LayerCosts, Reduce
from methods.fsmoe.degree import DEGREES, overlappable
from methods.fsmoe.partition import adaptive_partition
from methods.fsmoe.step import LINA_CHUNK_BYTES, Decision, Policy


@dataclasses.dataclass(frozen=True, eq=False)
class Slices:
    """Where a schedule sends the gradients of a step: bytes and messages [n] in backward order, and what remains."""

    degree_forward: int
    degree_plain: int  # backward without a slice: micro-batches whose gradients are only accumulated
    degree_backward: Array
    moe_bytes: Array
    dense_bytes: Array
    after_bytes: Array
    tail_bytes: float
    moe_chunks: Array
    dense_chunks: Array
    tail_chunks: float = 1

    def as_slices(self, element_bytes: int) -> list[GradientSlices]:
        """For execution: whole elements and messages; what is lost to rounding is reduced with the tail."""
        return [
            GradientSlices(
                tuple(int(part) // element_bytes * element_bytes for part in (in_moe, beside, after)),  # type: ignore[arg-type]
                (max(1, round(moe_chunks)), max(1, round(dense_chunks)), 1),
            )
            for in_moe, beside, after, moe_chunks, dense_chunks in zip(
                self.moe_bytes.tolist(),
                self.dense_bytes.tolist(),
                self.after_bytes.tolist(),
                self.moe_chunks.tolist(),
                self.dense_chunks.tolist(),
                strict=True,
            )
        ]


def unweighed_slices(policy: Policy, gradient_bytes: Sequence[int]) -> list[GradientSlices]:
    """Without costs: a layer's gradients in the next one's MoE part, where the policy puts any there; else beside its
    dense part, or after the layer itself."""
    earlier = (0, *gradient_bytes[:-1])
    if policy.gradients == "after":
        return [GradientSlices((0, 0, own)) for own in gradient_bytes]
    if policy.gradients == "dense":
        return [GradientSlices((0, ready, 0)) for ready in earlier]
    return [GradientSlices((ready, 0, 0)) for ready in earlier]


def place(
    policy: Policy,
    forward: LayerCosts,
    backward: LayerCosts,
    reduce: Reduce,
    gradient_bytes: Sequence[int],
    dense_s: float,
    *,
    chunk_bytes: float = LINA_CHUNK_BYTES,
    degrees: Sequence[int] = DEGREES,
    element_bytes: int = 4,
    seed: int = 0,
) -> Slices:
    """What ``policy`` does with equal layers of ``gradient_bytes`` [n] each, at ideal lanes; ``dense_s``: seconds of
    the backward of a dense part."""
    gradient, num_layers = np.asarray(gradient_bytes, dtype=np.int64), len(gradient_bytes)
    decided = Decision(policy, forward, backward, reduce, 0.0, dense_s, degrees=degrees)
    none, one = np.zeros(num_layers), np.ones(num_layers)
    plain = int(decided.backward)
    slices = Slices(int(decided.forward), plain, np.full(num_layers, plain), none, none, none, 0.0, one, one)
    if policy.gradients == "after":
        return dataclasses.replace(slices, after_bytes=gradient)
    if policy.gradients == "dense":  # of layer i beside the dense part of layer i + 1, all of it
        earlier = np.concatenate([[0], gradient[:-1]])
        return dataclasses.replace(slices, dense_bytes=earlier, tail_bytes=float(gradient[-1]))
    costs = backward if policy.overlap else backward.folded()
    if policy.gradients == "fixed":
        idle_s = float(np.maximum(overlappable(costs, decided.backward), 0.0))
        return _fixed_chunks(slices, gradient, chunk_bytes, idle_s, dense_s, reduce.time_s)
    found = adaptive_partition(
        costs,
        reduce,
        gradient,
        np.full(num_layers, dense_s),
        degrees=degrees,
        element_bytes=element_bytes,
        seed=seed,
    )
    return dataclasses.replace(
        slices,
        degree_backward=found.degree,
        moe_bytes=found.moe_bytes,
        dense_bytes=found.dense_bytes,
        tail_bytes=float(found.tail_bytes),
    )


def _fixed_chunks(
    slices: Slices, gradient: Array, chunk_bytes: float, idle_s: float, dense_s: float, time_s: Any
) -> Slices:
    """Lina: a layer's gradient in equal chunks of at most 30 MB, in the order of their making; one is started whenever
    the link between nodes has nothing else to do, and may overrun."""
    num_bytes, num_chunks = np.zeros((2, len(gradient))), np.zeros((2, len(gradient)))
    waiting: collections.deque[float] = collections.deque()
    for layer, new in enumerate(gradient.tolist()):
        for place, room_s in enumerate((idle_s, dense_s)):
            used_s = 0.0
            while waiting and used_s < room_s:
                chunk = waiting.popleft()
                used_s += float(time_s(chunk))
                num_bytes[place, layer] += chunk
                num_chunks[place, layer] += 1
        pieces = int(max(np.ceil(new / chunk_bytes), 1))
        waiting.extend([new / pieces] * pieces)
    return dataclasses.replace(
        slices,
        moe_bytes=num_bytes[0],
        dense_bytes=num_bytes[1],
        moe_chunks=num_chunks[0],
        dense_chunks=num_chunks[1],
        tail_bytes=sum(waiting),
        tail_chunks=len(waiting),
    )
