"""From what a task asks for to seconds: linear costs, as published with a cluster or fitted by ``moebench profile``."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from harness.errors import bad
from harness.plan.graph import COMPUTE, Cost, Plan
from harness.specs import Cluster

#: how much a busy lane (inner key) slows another (outer key): at rate 1 / (1 + c) while both are busy
Contention = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Prices:
    """alpha + beta n of every operation of ``cluster``. ``num_ranks``: where constants of several sizes are given
    (``a2a.inter@16``), those of this size; by default the cluster's own."""

    cluster: Cluster
    num_ranks: int | None = None
    contention: Contention = dataclasses.field(default_factory=dict)

    def linear(self, key: str) -> tuple[float, float]:
        """alpha in seconds, beta in seconds per byte (``gemm``: per multiply-add)."""
        if key == "gemm":
            if self.cluster.gemm is None:
                raise bad(
                    f"cluster {self.cluster.name}.gemm", None, f"is not known; moebench profile {self.cluster.name}"
                )
            return self.cluster.gemm.alpha_s, self.cluster.gemm.beta_s_per_mac
        at_size = f"{key}@{self.num_ranks or self.cluster.num_ranks}"
        found = self.cluster.collectives.get(at_size) or self.cluster.collectives.get(key)
        if found is None:
            known = ", ".join(sorted(self.cluster.collectives)) or "none"
            raise bad(
                f"cluster {self.cluster.name}.collectives",
                key,
                f"has no cost; known are {known}; moebench profile {self.cluster.name} measures them",
            )
        return found.alpha_s, found.beta_s_per_byte

    def seconds(self, cost: Cost | None) -> Any:
        """Of one task, alone on its lane; shaped as the cost's amount. Nothing to do costs nothing."""
        if cost is None:
            return 0.0
        amount = np.asarray(cost.amount, dtype=np.float64)
        if cost.operation == "wait":
            return amount
        alpha, beta = self.linear(cost.key)
        return np.where(amount > 0, cost.count * alpha + beta * amount, 0.0)

    def durations(self, plan: Plan) -> np.ndarray:
        """Seconds of every task alone on its lane, float64 [num_tasks, ...] broadcast over all costs."""
        each = [np.asarray(self.seconds(task.cost)) for task in plan.tasks]
        shape = np.broadcast_shapes(*(one.shape for one in each)) if each else ()
        return np.array([np.broadcast_to(one, shape) for one in each]).reshape(len(each), *shape)


__all__ = ["COMPUTE", "Contention", "Prices"]
