"""Devices: what turns multiply-adds into seconds."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np

from harness.plan.cost import Compute
from harness.specs import Cluster


class Device(Protocol):
    def seconds(self, cost: Compute) -> Any:
        """Of one task, shaped as its amounts; nothing to do costs nothing."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """By the gemm costs of ``cluster``; ``UserError`` where it has none."""

    cluster: Cluster

    def seconds(self, cost: Compute) -> Any:
        macs = np.asarray(cost.macs, dtype=np.float64)
        alpha, beta = self.cluster.linear("gemm")
        return np.where(macs > 0, cost.launches * alpha + beta * macs, 0.0)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The longer of computing at ``efficiency`` of the peak and reading once from memory."""

    flops_per_s: float
    bytes_per_s: float | None  # None: reading is as good as free
    efficiency: float

    def seconds(self, cost: Compute) -> Any:
        computing = 2 * np.asarray(cost.macs, dtype=np.float64) / (self.efficiency * self.flops_per_s)
        if self.bytes_per_s is None:
            return computing
        return np.maximum(computing, np.asarray(cost.read_bytes, dtype=np.float64) / self.bytes_per_s)
