"""Device models: what turns multiply-adds into seconds.

    Fitted     alpha + beta n, as published or profiled
    Roofline   a stated share of the peak, or reading once from memory, whichever lasts longer
    Tiled      a roofline whose share depends on the rows that each expert gets
    Shared     any of these, where the ranks of one machine compute on its cores in turns

``Tiled`` counts what a kernel of tiles does. Rows of an expert are rounded up to whole tiles. A product of depth K
costs as much as one of depth K + ``depth`` would if filling and emptying a tile were free. Each product is launched;
while it computes, it reads its rows and the weights of the experts in use, and writes rows. The four numbers are fitted
to public measurements of H100 and H200 and serve other devices too; ``harness.plan.points`` shows how far off they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from harness.plan.cost import Compute
from harness.specs import Cluster

TILE = 64  # rows


class Device(Protocol):
    def seconds(self, cost: Compute) -> Any:
        """Of one task, shaped as its amounts; nothing to do costs nothing."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """By the gemm costs of ``cluster``; ``UserError`` where it has none."""

    cluster: Cluster

    def seconds(self, cost: Compute) -> Any:
        macs = np.asarray(cost.macs, dtype=np.float64)
        if not macs.any():  # nor are costs asked for
            return np.zeros(macs.shape)
        alpha, beta = self.cluster.linear("gemm")
        return np.where(macs > 0, cost.launches * alpha + beta * macs, 0.0)


@dataclasses.dataclass(frozen=True)
class Roofline:
    flops_per_s: float
    bytes_per_s: float | None  # None: reading is as good as free
    efficiency: float

    def seconds(self, cost: Compute) -> Any:
        computing = 2 * np.asarray(cost.macs, dtype=np.float64) / (self.efficiency * self.flops_per_s)
        if self.bytes_per_s is None:
            return computing
        return np.maximum(computing, np.asarray(cost.read_bytes, dtype=np.float64) / self.bytes_per_s)


@dataclasses.dataclass(frozen=True)
class Curve:
    """``share``: of the peak, that deep products of whole tiles reach; ``depth`` in columns of K; ``memory``: share of
    the memory's rate; ``launch_s`` of a product."""

    share: float
    depth: float
    memory: float
    launch_s: float


@dataclasses.dataclass(frozen=True)
class Tiled:
    flops_per_s: float
    bytes_per_s: float | None  # None: memory is as good as free
    curve: Curve

    def seconds(self, cost: Compute) -> Any:
        """Of experts by their rows; of anything else at the share of the peak that whole, deep tiles reach."""
        curve = self.curve
        if cost.experts is None:
            return Roofline(self.flops_per_s, self.bytes_per_s, curve.share).seconds(cost)
        rows, width = np.asarray(cost.experts.rows, dtype=np.float64), cost.experts.element_bytes
        in_use, whole = (rows > 0).sum(-1), rows.sum(-1)
        tiles = (np.ceil(rows / TILE) * TILE).sum(-1)
        total = np.zeros(whole.shape)
        for depth, columns in cost.experts.products:
            flops = 2 * tiles * columns * (depth + curve.depth)
            moved = in_use * depth * columns * width + whole * (depth * width + columns * max(2, width))
            computing = flops / (curve.share * self.flops_per_s)
            moving = 0.0 if self.bytes_per_s is None else moved / (curve.memory * self.bytes_per_s)
            total += np.hypot(computing, moving) + np.where(whole > 0, curve.launch_s, 0.0)
        return total


@dataclasses.dataclass(frozen=True)
class Shared:
    """``device`` of each of ``num_ranks`` that share ``cores``, one a rank at most, evenly among those that still
    compute. All begin at once, as they do behind an exchange."""

    device: Device
    num_ranks: int
    cores: int

    def seconds(self, cost: Compute) -> Any:
        alone = np.asarray(self.device.seconds(cost))
        if self.num_ranks <= self.cores or not alone.any():
            return alone
        if alone.shape[-1:] != (self.num_ranks,):  # all alike
            return alone * self.num_ranks / self.cores
        order = alone.argsort(-1)
        more = np.diff(np.take_along_axis(alone, order, -1), prepend=0.0)  # than the rank that is done just before
        at_work = self.num_ranks - np.arange(self.num_ranks)
        ends = np.cumsum(more * np.maximum(1.0, at_work / self.cores), -1)
        found = np.empty_like(alone)
        np.put_along_axis(found, order, ends, -1)
        return found


#: as ``harness.plan.points`` fits it; a test compares
CURVE = Curve(share=0.707, depth=625.0, memory=0.849, launch_s=1.56e-6)
