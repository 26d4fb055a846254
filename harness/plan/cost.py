"""What a task asks of its lane; a machine (``harness.plan.machine``) turns it into seconds.

Amounts are numbers, or arrays over whatever a plan is simulated for at once: configurations, and ranks W on the last
axis (``Transfer``: on the last two).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

Operation = Literal["a2a", "ag", "rs", "ar", "sr"]


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """One of the classes below."""


@dataclasses.dataclass(frozen=True, eq=False)
class OnLinks(Cost):
    """A collective. ``messages``: how often its start-up time is paid."""

    operation: Operation
    scope: str  # inter, intra, flat, or a stage as the cluster's costs name it

    @property
    def key(self) -> str:
        """As in ``Cluster.collectives``: operation.scope."""
        return f"{self.operation}.{self.scope}"


@dataclasses.dataclass(frozen=True, eq=False)
class Even(OnLinks):
    """A collective whose buffer is of ``num_bytes`` on every rank, counted as in ``harness.comm.profile``: a gather, a
    reduction, an all-to-all of equal slots."""

    num_bytes: Any
    messages: Any = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer(OnLinks):
    """An all-to-all of any sizes: ``matrix`` [.., W, W], bytes from each rank to each, of all ranks of the machine."""

    matrix: np.ndarray
    messages: Any = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """``rows`` [.., W, local experts] that go through ``products`` [K, N], of ``element_bytes`` each number."""

    rows: np.ndarray
    products: tuple[tuple[int, int], ...]
    element_bytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Compute(Cost):
    """``macs`` multiply-adds in ``launches`` kernels, which read ``read_bytes`` from memory once. ``experts``: whose
    they are, for devices that are the faster the more rows each gets."""

    macs: Any
    launches: Any = 1.0
    read_bytes: Any = 0.0
    experts: Experts | None = None

    @classmethod
    def of(cls, experts: Experts) -> Compute:
        """Reads the weights of the experts in use."""
        weights = sum(depth * columns for depth, columns in experts.products)
        used = (experts.rows > 0).sum(-1)
        read_bytes = weights * experts.element_bytes * used
        return cls(weights * experts.rows.sum(-1), len(experts.products), read_bytes, experts)


@dataclasses.dataclass(frozen=True, eq=False)
class Hold(Cost):
    """``seconds`` whatever the machine: a timed wait, or what was found out elsewhere."""

    seconds: Any


__all__ = ["Compute", "Cost", "Even", "Experts", "Hold", "OnLinks", "Operation", "Transfer"]
