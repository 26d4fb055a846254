"""Links as ``moebench profile`` found them.

Collectives of even buffers cost what their own fit says. Of any other matrix the fit of a level's all-to-all says how
fast the ports of its units are, and of its start-up time. Ranks of one machine share what they send each other inside a
node; devices of a real node have a port each.

Ranks do not meet there: gloo and NCCL send to and receive from each other rank by itself. So what one rank sends
another begins when both are ready, and a rank goes on when its own rows are there and have left. Flows share a port
evenly; those of the next transfer, on whatever lane, wait until the port is free of this one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np

from harness.comm.fits import Fit
from harness.ledger import Calibration
from harness.plan.cost import Even, OnLinks, Transfer
from harness.plan.links import Busy, Line, LinkModel, Ports, most_through, names
from harness.topology import Topology


@dataclasses.dataclass(frozen=True, eq=False)
class Profiled(LinkModel):
    """By ``calibration``; ``UserError`` where a fit that is needed was refused."""

    meets: ClassVar[bool] = False

    calibration: Calibration

    @property
    def shape(self) -> tuple[int, ...]:
        return self.calibration.profiled.shape

    def seconds(self, cost: OnLinks) -> Any:
        if isinstance(cost, Even):
            alpha, beta = self._fit(cost.key)
            amount = np.asarray(cost.num_bytes, dtype=np.float64)
            return np.where(amount > 0, cost.messages * alpha + beta * amount, 0.0)
        alpha, _ = self._fit(f"a2a.{cost.scope}")
        return dataclasses.replace(self.ports, start_s=alpha).seconds(cost)

    def finish(self, cost: Transfer, begins: np.ndarray, busy: Busy | None = None) -> np.ndarray:
        from harness.plan.fair import pairwise  # numba takes its time to import

        alpha, _ = self._fit(f"a2a.{cost.scope}")
        units, ports, shared, each_s = self._lines
        num_ranks = units.shape[1]
        shape = np.broadcast_shapes(cost.matrix.shape[:-1], begins.shape)
        done = np.array(np.broadcast_to(begins, shape)).reshape(-1, num_ranks)
        starts = np.broadcast_to(begins + alpha * np.asarray(cost.messages)[..., None], shape).reshape(done.shape)
        matrices = np.broadcast_to(cost.matrix, (*shape, num_ranks)).reshape(-1, num_ranks, num_ranks)
        busy = Busy() if busy is None else busy
        free = busy.setdefault("free", np.zeros((len(done), len(units), 2, num_ranks)))
        for item in range(len(done)):
            matrix = np.ascontiguousarray(matrices[item], dtype=np.float64)
            pairwise(matrix, np.ascontiguousarray(starts[item]), units, ports, shared, each_s, free[item], done[item])
        return done.reshape(shape)

    @functools.cached_property
    def _lines(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of each line of ``ports``: in which unit a rank is and by which port it goes, int64 [L, W] each; whether it
        is shared, [L]; and seconds a byte, [L]."""
        topology, lines = self.ports.topology, self.ports.lines
        of_ranks = ([line.units(topology) for line in lines], [line.port_of(topology) for line in lines])
        shared, each_s = ([getattr(line, name) for line in lines] for name in ("shared", "bytes_per_s"))
        units, ports = (np.array(each, dtype=np.int64).reshape(len(lines), topology.num_ranks) for each in of_ranks)
        return (
            units,
            ports,
            np.array(shared, dtype=bool),
            1 / np.array(each_s, dtype=np.float64),
        )

    @functools.cached_property
    def ports(self) -> Ports:
        cluster = self.calibration.profiled
        topology, lines = Topology(cluster.shape), []
        for level, link in enumerate(cluster.levels):
            if link.size == 1:
                continue
            _, beta = self._fit(f"a2a.{link.name}")
            below = topology.num_ranks // (topology.num_units(level) * link.ports)  # ranks behind one port
            shared = cluster.kind != "physical" and 0 < level == topology.num_levels - 1
            through = (link.size if shared else below) * (link.size - 1) / link.size
            if sizes := link.ranks_per_port:
                through = most_through(sizes)
            lines.append(Line(level, through / beta, 1 if shared else link.ports, shared, sizes))
        return Ports(topology, tuple(lines))

    def _fit(self, key: str) -> tuple[float, float]:
        """By ``key`` itself, else by another name of the same groups."""
        if key not in (known := self.calibration.fits):
            operation, _, scope = key.partition(".")
            others = (f"{operation}.{name}" for name in names(self.calibration.profiled, scope))
            key = next((other for other in others if other in known), key)
        found = self.calibration.fit(key)
        assert isinstance(found, Fit)
        return found.alpha_s, found.beta_s_per_byte


__all__ = ["Profiled"]
