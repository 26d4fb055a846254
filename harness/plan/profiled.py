"""Links as ``moebench profile`` found them.

Collectives of even buffers cost what their own fit says. Any other matrix takes as long as its busiest port: the fit of
a level's all-to-all says how fast the ports of its units are, and of its start-up time. Ranks of one machine share what
they send each other inside a node; devices of a real node have a port each.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from harness.comm.fits import Fit
from harness.ledger import Calibration
from harness.plan.cost import Even, OnLinks
from harness.plan.links import Line, LinkModel, Ports, names
from harness.topology import Topology


@dataclasses.dataclass(frozen=True, eq=False)
class Profiled(LinkModel):
    """By ``calibration``; ``UserError`` where a fit that is needed was refused."""

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

    @functools.cached_property
    def ports(self) -> Ports:
        cluster = self.calibration.profiled
        topology, lines = Topology(cluster.shape), []
        for level, link in enumerate(cluster.levels):
            if link.size == 1:
                continue
            _, beta = self._fit(f"a2a.{link.name}")
            below = topology.num_ranks // topology.num_units(level)  # ranks behind one port
            shared = cluster.kind != "physical" and level == 1 and topology.num_levels == 2
            through = (link.size if shared else below) * (link.size - 1) / link.size
            lines.append(Line(level, through / beta, shared=shared))
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
