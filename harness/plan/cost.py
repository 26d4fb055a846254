"""What a task asks of its lane; a machine (``harness.plan.machine``) turns it into seconds.

Amounts are numbers, or arrays over whatever a plan is simulated for at once: configurations, and ranks W on the last
axis (``Transfer``: on the last two).

A compound cost says what goes on inside one task, part after part (``InTurn``). ``Machine.priced`` turns any cost into
seconds of each rank, ``Hold`` and ``Timed``, so that no byte matrix need outlive its layer.

Scopes name groups of ranks by the link levels that they extend over, counted from 1 for the outermost of D: ``inter1``
joins the nodes, ``inter2`` the units of level 2 inside a node, ``intra1`` all ranks of a node, ``flat`` all ranks;
``inter`` and ``intra`` are ``inter1`` and ``intra1``. Ranks of a group are alike at all other levels. ``4by2.flat``: of
such groups every 4 ranks that are 2 apart; their collectives cost what those of the whole group do for as many bytes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from harness.errors import bad

Operation = Literal["a2a", "ag", "rs", "ar", "sr"]


@dataclasses.dataclass(frozen=True, eq=False)
class Cost:
    """One of the classes below."""


@dataclasses.dataclass(frozen=True, eq=False)
class OnLinks(Cost):
    """A collective. ``messages``: how often its start-up time is paid; ``summed_bytes`` [.., W]: that each rank reads
    and writes to add up rows or chunks, before these leave or when they have come."""

    operation: Operation
    scope: str  # see above
    summed_bytes: Any = dataclasses.field(default=0.0, kw_only=True)

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
class Timed(OnLinks):
    """A collective that is priced already: ``seconds`` [..], or [.., W] where ranks differ, of one whose ranks begin
    together."""

    seconds: Any


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
    """``seconds`` whatever the machine: a timed wait, or what was found out elsewhere. ``host``: what the processor's
    part beside is multiplied by (``harness.plan.host.amount``)."""

    seconds: Any
    host: Any = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class InTurn(Cost):
    """What one task does one after another, for instance a whole layer of a package. The ranks of each collective among
    ``parts`` meet where it stands, as if it were a task of its own. Its seconds [.., W] are those of each rank's parts,
    without waits for others; a simulation with ranks adds these."""

    parts: tuple[Cost, ...]


def leaves(*costs: Cost | None) -> Iterator[Cost]:
    """What they are made of, none of it a compound."""
    for cost in costs:
        if isinstance(cost, InTurn):
            yield from leaves(*cost.parts)
        elif cost is not None:
            yield cost


def transfers(costs: Iterable[Cost | None]) -> Iterator[Transfer]:
    """All of them, whatever they are parts of."""
    return (cost for cost in leaves(*costs) if isinstance(cost, Transfer))


def span(scope: str, num_levels: int) -> tuple[int, int]:
    """(a, b): groups of ``scope`` extend over the link levels a .. b - 1 of ``num_levels``, outermost first; a part of
    groups counts as these.

    >>> span("flat", 3), span("inter", 3), span("inter2", 3), span("intra", 3), span("intra2", 3), span("2by4.flat", 3)
    ((0, 3), (0, 1), (1, 2), (1, 3), (2, 3), (0, 3))
    """
    found = re.fullmatch(r"(?:[0-9]+by[0-9]+\.)?(?:(flat)|(inter|intra)([1-9][0-9]*)?)", scope)
    level = int(found[3] or 1) if found else 0
    if found is None or level > num_levels:
        raise bad(
            "scope", scope, f"is no group of ranks on {num_levels} link levels; known are flat, interN and intraN"
        )
    if found[1]:
        return 0, num_levels
    return (level - 1, level) if found[2] == "inter" else (level, num_levels)


def meeting(scope: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many ranks a group of ``scope`` has, and how far they are apart.

    >>> meeting("flat", (2, 4)), meeting("inter", (2, 4)), meeting("intra", (2, 4)), meeting("2by2.intra1", (2, 4))
    ((8, 1), (2, 4), (4, 1), (2, 2))
    """
    if part := re.match(r"([0-9]+)by([0-9]+)\.", scope):
        return int(part[1]), int(part[2])
    first, behind = span(scope, len(shape))
    return math.prod(shape[first:behind]), math.prod(shape[behind:])


def scope_of(members: int, apart: int, shape: tuple[int, ...]) -> str:
    """The groups of as many ranks so far apart; what ``meeting`` takes apart. Those that no scope names are a part of
    the smallest that contain them."""
    num_levels = len(shape)
    known = [
        f"{kind}{level}" for level in range(num_levels, 0, -1) for kind in ("inter", "intra") if level < num_levels
    ]
    for scope in (*known, "flat"):
        every, between = meeting(scope, shape)
        if (every, between) == (members, apart):
            return scope
        if apart % between == 0 and members * apart <= every * between:
            return f"{members}by{apart}.{scope}"
    raise AssertionError((members, apart, shape))


__all__ = [
    "Compute",
    "Cost",
    "Even",
    "Experts",
    "Hold",
    "InTurn",
    "OnLinks",
    "Operation",
    "Timed",
    "Transfer",
]
