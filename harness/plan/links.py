"""Link models: the only code that turns bytes into seconds.

    AlphaBeta    alpha + beta n of each collective, as published or profiled; the group meets
    Ports        what the busiest port of any link level carries, over its rate; the group meets
    SharedPorts  ports shared evenly among the flows at work; ranks wait for their own flows alone

A skewed all-to-all lasts as long as its busiest port. ``AlphaBeta`` prices it as the balanced one that loads every port
as much, because that is what costs are fitted to.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from harness.errors import bad
from harness.plan.cost import Even, OnLinks, Transfer, meeting, span
from harness.specs import Cluster
from harness.topology import Topology
from harness.traffic import blocks_of, inside_load, port_load, unequal_load

Array = np.ndarray
#: what a link model remembers of its ports between the transfers of a plan, for which it is asked in turn
Busy = dict[str, Array]


class LinkModel(abc.ABC):
    """``meets``: a collective begins with the last rank of its group and ends for all with the slowest."""

    meets: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Units per link level, outermost first; ranks W are their product."""

    @abc.abstractmethod
    def seconds(self, cost: OnLinks) -> Any:
        """Of one collective whose ranks begin together: [..], or [.., W] where ranks differ."""

    def finish(self, cost: Transfer, begins: Array, busy: Busy | None = None) -> Array:
        """When each rank is done, [.., W], that begins at ``begins`` [.., W]; of a model in which ranks do not meet.
        ``busy``: what earlier transfers have left there; None: nothing."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class AlphaBeta(LinkModel):
    """By the costs of ``cluster``; ``num_ranks``: where constants of several sizes are given (``a2a.inter@16``), those
    of this size, by default the cluster's own."""

    cluster: Cluster
    num_ranks: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cluster.shape

    def seconds(self, cost: OnLinks) -> Any:
        """Nothing to send costs nothing."""
        alpha, beta = self._linear(cost)
        if isinstance(cost, Transfer):
            amount = balanced_bytes(cost.matrix, Topology(self.cluster.shape), cost.scope)[..., None]
        else:
            assert isinstance(cost, Even)
            amount = np.asarray(cost.num_bytes, dtype=np.float64)
        return np.where(amount > 0, cost.messages * alpha + beta * amount, 0.0)

    def _linear(self, cost: OnLinks) -> tuple[float, float]:
        """By the key of the cost itself, else by another name of the same groups."""
        cluster, known = self.cluster, {key.partition("@")[0] for key in self.cluster.collectives}
        if cost.key not in known:
            for name in names(cluster, cost.scope):
                if f"{cost.operation}.{name}" in known:
                    return cluster.linear(f"{cost.operation}.{name}", self.num_ranks)
            remedy = f"has no cost; known are {', '.join(sorted(known)) or 'none'}; state it, take the rates of links "
            remedy += f"(--machine data-sheet), or measure it ({cluster.profile_command})"
            raise bad(f"cluster {cluster.name}.collectives", cost.key, remedy)
        return cluster.linear(cost.key, self.num_ranks)


def names(cluster: Cluster, scope: str) -> list[str]:
    """What costs of ``cluster`` may call the groups of ``scope``: by stage (``inter1``), by link level, by role."""
    num_levels = len(cluster.shape)
    first, behind = span(scope, num_levels)
    stage = f"intra{first}" if behind == num_levels and first else f"inter{behind}"
    found = ["flat" if (first, behind) == (0, num_levels) else stage]
    found += [cluster.levels[first].name] if behind == first + 1 else []
    found += ["inter"] if (first, behind) == (0, 1) else []
    return [*found, "intra"] if (first, behind) == (1, num_levels) else found


def balanced_bytes(matrix: Array, topology: Topology, scope: str) -> Array:
    """Buffer [..] of one rank in the balanced all-to-all of ``scope`` that loads the busiest port as ``matrix``
    [.., W, W] does: the port of a node where groups extend over nodes, else that of a rank. What stays on its rank
    loads none."""
    first, behind = span(scope, topology.num_levels)
    nodes, size = topology.shape[0], math.prod(topology.shape[first:behind])
    if nodes > 1 and first == 0:
        num_local = topology.num_ranks // nodes
        return port_load(matrix, topology, 0).max(-1) / num_local * nodes / (nodes - 1)
    own = blocks_of(matrix, math.prod(topology.shape[:first]))  # [.., units, ranks of a unit, ranks of a unit]
    kept = np.diagonal(own, axis1=-2, axis2=-1)
    busiest = (np.maximum(own.sum(-2), own.sum(-1)) - kept).max((-1, -2))
    return np.asarray(busiest, dtype=np.float64) * size / max(1, size - 1)


@dataclasses.dataclass(frozen=True)
class Line:
    """Bytes per second of a port of a unit of link level ``level``, one direction. ``ports``: of a unit, each of as
    many neighbouring ranks; ``sizes``: of ranks behind each port, where they are unequal numbers. ``shared``: no port,
    but what all ranks of a unit one level up send each other."""

    level: int
    bytes_per_s: float
    ports: int = 1
    shared: bool = False
    sizes: tuple[int, ...] = ()

    def units(self, topology: Topology) -> Array:
        """Whose traffic with others goes by its ports, of every rank, int [W]."""
        if self.sizes:
            return self.port_of(topology)
        return topology.unit_of(self.level - 1 if self.shared else self.level)

    def port_of(self, topology: Topology) -> Array:
        """By which of all its ports a rank goes, int [W]."""
        if self.shared:
            return self.units(topology)
        if self.sizes:
            return np.repeat(np.arange(len(self.sizes)), self.sizes)
        return np.arange(topology.num_ranks) * topology.num_units(self.level) * self.ports // topology.num_ranks


def lines_of(cluster: Cluster, *, pooled: bool = False) -> tuple[Line, ...]:
    """By the rates that ``cluster`` states; levels without one are as good as free. ``pooled``: the ports of a unit are
    one, as fast as all of them."""
    found = []
    for level, link in enumerate(cluster.levels):
        if link.bandwidth_bytes_per_s is not None:
            ports = 1 if pooled else link.ports
            rate = link.bandwidth_bytes_per_s * link.ports / ports
            found.append(Line(level, rate, ports, sizes=link.ranks_per_port))
    return tuple(found)


def most_through(sizes: Sequence[int]) -> float:
    """Of a rank's buffer in a balanced all-to-all how many go by the busiest port of ``sizes`` ranks each."""
    total = sum(sizes)
    return max(size * (total - size) for size in sizes) / total


@dataclasses.dataclass(frozen=True)
class Ports(LinkModel):
    """``start_s``: of each message."""

    topology: Topology
    lines: tuple[Line, ...]
    start_s: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.topology.shape

    def seconds(self, cost: OnLinks) -> Any:
        if isinstance(cost, Transfer):
            return (cost.messages * self.start_s + self.of(cost.matrix))[..., None]
        assert isinstance(cost, Even)
        lasts = (self._even(cost, line) / line.bytes_per_s for line in self.lines)
        return cost.messages * self.start_s + functools.reduce(np.maximum, lasts, 0.0)

    def of(self, matrix: Array) -> Array:
        """Seconds [..] until the busiest port has carried its part of ``matrix`` [.., W, W], in what rates are in."""
        lasts = [self._on(line, matrix).max(-1) for line in self.lines]
        return functools.reduce(np.maximum, lasts or [np.zeros(matrix.shape[:-2])])

    def by_rank(self, matrix: Array) -> Array:
        """Seconds [.., W] until the ports of each rank have."""
        lasts = [self._on(line, matrix)[..., line.port_of(self.topology)] for line in self.lines]
        return functools.reduce(np.maximum, lasts or [np.zeros(matrix.shape[:-1])])

    def _on(self, line: Line, matrix: Array) -> Array:
        """Seconds of each port of ``line``, [.., units x ports]; of each unit above, where it is shared."""
        if line.shared:
            return inside_load(matrix, self.topology, line.level - 1) / line.bytes_per_s
        if line.sizes:
            return unequal_load(matrix, line.sizes) / line.bytes_per_s
        return port_load(matrix, self.topology, line.level, line.ports) / line.bytes_per_s

    def _even(self, cost: Even, line: Line) -> Any:
        """Bytes through one port: of an all-to-all what its ranks send out of the unit; of a ring (two for ``ar``) what
        the unit's part of each group gets from others, once."""
        assert not line.shared
        if line.sizes and cost.operation == "a2a":
            return most_through(line.sizes) * np.asarray(cost.num_bytes, dtype=np.float64)
        shape = self.topology.shape
        members, apart = meeting(cost.scope, shape)
        ranks = math.prod(shape[line.level + 1 :])  # of a unit
        inside = min(members, max(1, ranks // apart))  # of each group in one unit
        units = members // inside
        rings = ranks if cost.operation == "a2a" else ranks // inside  # groups that go through one unit
        times = 2 if cost.operation == "ar" else 1
        return times * rings / line.ports * (units - 1) / units * np.asarray(cost.num_bytes, dtype=np.float64)


@dataclasses.dataclass(frozen=True)
class SharedPorts(Ports):
    """What one rank sends another is a flow, which begins when its sender does; a port is shared evenly among the flows
    at work. A rank is done when its own flows are, out and in. Collectives of even buffers still meet."""

    meets: ClassVar[bool] = False

    def finish(self, cost: Transfer, begins: Array, busy: Busy | None = None) -> Array:
        ends = self.flows(cost.matrix, begins + cost.messages * self.start_s)
        ends = np.where(cost.matrix > 0, ends, -np.inf)
        return np.maximum(np.maximum(ends.max(-1), ends.max(-2)), begins)

    def flows(self, matrix: Array, begins: Array, *, out: bool = True, into: bool = True) -> Array:
        """When each flow is done, [.., W, W]; where there is none, when its sender begins. ``out``, ``into``: whether
        flows share the ports that they leave by, and come in by."""
        num_ranks = self.topology.num_ranks
        shape = np.broadcast_shapes(matrix.shape, (*begins.shape, 1))
        start = np.broadcast_to(begins[..., None], shape).astype(np.float64).reshape(-1, num_ranks, num_ranks)
        amounts = np.broadcast_to(matrix, shape).astype(np.float64).reshape(start.shape)
        ends = start.copy()
        for line in self.lines:
            unit, port = line.units(self.topology), line.port_of(self.topology)
            crossing = np.where(unit[:, None] != unit, amounts, 0)
            edges = [*np.flatnonzero(np.diff(port, prepend=-1)), num_ranks]
            for (first, end), item in itertools.product(itertools.pairwise(edges), range(len(ends))):
                here = slice(first, end)  # neighbours at one port
                for side in [(item, here)] * out + [(item, slice(None), here)] * into:
                    _share(ends[side], start[side], crossing[side], 1 / line.bytes_per_s)
        return ends.reshape(shape)


def _share(ends: Array, begins: Array, amounts: Array, each_s: float) -> None:
    """Raise ``ends`` to when the flows at one port are done; all of one shape."""
    from harness.plan.fair import fair  # numba takes its time to import

    flows = amounts > 0
    done = np.empty(int(flows.sum()))
    fair(begins[flows], amounts[flows], each_s, done)
    ends[flows] = np.maximum(ends[flows], done)


__all__ = ["AlphaBeta", "Busy", "Line", "LinkModel", "Ports", "SharedPorts", "balanced_bytes", "lines_of", "names"]
