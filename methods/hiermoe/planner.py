"""HierMoE's own model of the d-dimensional all-to-all, and the choice of d (arXiv 2508.09591, eqs. 1 to 6): what its
planners believe. What a step takes is for ``harness.plan.machine`` to say.

Interpretations: sizes are one rank's (as in nccl-tests, to which the published constants were fitted), so that
``max(p)`` is the largest number of rows that any rank sends to any unit; what stays on a rank counts, as it does in an
all-to-all's buffer. ``exact``: sizes that are sent as they are (all-to-all-v) cost what the balanced all-to-all does
that loads the busiest port as much.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from harness.errors import bad
from harness.ledger import Calibration
from harness.plan.links import balanced_bytes, names
from harness.specs import Cluster, Collective
from harness.topology import Topology
from methods.hiermoe.counts import Array, Counts, Stage, stages


def stage_costs(cluster: Cluster) -> Cluster | None:
    """``cluster`` with its costs by stage (``a2a.flat``, ``a2a.inter1``, ``a2a.intra1``, ...), taken over from those by
    link level (``a2a.node``: ranks alike in all other levels) or role (inter, intra); None if some stage has none."""
    num_levels, found = len(cluster.shape), {}
    for dimension in range(1, num_levels + 1):
        for stage in stages(dimension, num_levels):
            key = stage.key(num_levels)
            others = [f"a2a.{name}" for name in names(cluster, key.removeprefix("a2a."))]
            known = [each for each in (key, *others) if each in cluster.collectives]
            if not known:
                return None
            found[key] = cluster.collectives[known[0]]
    return cluster.model_copy(update={"collectives": {**cluster.collectives, **found}})


def calibrated_costs(calibration: Calibration) -> Cluster | None:
    """``stage_costs`` of a calibration, by its fits that were not refused."""
    return stage_costs(calibration.cluster([key for key, fit in calibration.fits.items() if not fit.refused]))


@dataclasses.dataclass(frozen=True, eq=False)
class PlannerModel:
    """Costs of every stage of every dimension on ``cluster``; ``UserError`` that names a missing one."""

    cluster: Cluster

    @property
    def num_levels(self) -> int:
        return len(self.cluster.shape)

    def cost(self, stage: Stage) -> Collective:
        """Of its all-to-all; among one unit (nodes, where there is one) nothing travels."""
        if self.size(stage) == 1:
            return Collective(alpha_s=0.0, beta_s_per_byte=0.0)
        found = self.cluster.collectives.get(key := stage.key(self.num_levels))
        if found is None:
            known = ", ".join(sorted(self.cluster.collectives)) or "none"
            raise bad(
                f"cluster {self.cluster.name}.collectives",
                key,
                f"is not among its costs ({known}); {self.cluster.profile_command}",
            )
        return found

    def size(self, stage: Stage) -> int:
        """Ranks of one all-to-all of the stage: U[b] / U[a]."""
        shape = self.cluster.shape
        return int(np.prod(shape[stage.a : stage.b]))

    def stage_s(self, counts: Counts, stage: Stage, row_bytes: float, *, deduplicated: bool, exact: bool) -> float:
        """Seconds of one stage, one way: alpha + n beta with n of eqs. 2, 4 and 5."""
        rows, cost = counts.rows(stage, deduplicated=deduplicated), self.cost(stage)
        if exact:
            num_bytes = _balanced(rows * row_bytes, counts.topology, stage, self.size(stage))
        else:
            num_bytes = self.size(stage) * float(rows.max(initial=0)) * row_bytes
        return cost.alpha_s + cost.beta_s_per_byte * num_bytes

    def times(
        self, counts: Counts, row_bytes: float, *, deduplicated: bool = True, exact: bool = False, chunks: int = 1
    ) -> Array:
        """t_1 .. t_D, seconds of one way (dispatch, or combine), float64 [D].

        ``chunks``: pieces of the batch that are in different stages at once. The longest stage then takes its time and
        each other is hidden but for one piece; each start-up is paid per piece. 1: one stage after another (eq. 3)."""
        found = []
        for dimension in range(1, self.num_levels + 1):
            parts = []
            for stage in stages(dimension, self.num_levels):
                whole = self.stage_s(counts, stage, row_bytes, deduplicated=deduplicated, exact=exact)
                alpha = self.cost(stage).alpha_s
                parts.append((whole - alpha) / chunks + alpha)
            found.append(sum(parts) + (chunks - 1) * max(parts))
        return np.array(found)

    def best(self, counts: Counts, row_bytes: float, *, padded: bool, chunks: int) -> int:
        """d* of a routing, as every rank chooses it for itself."""
        return choose(self.times(counts, row_bytes, exact=not padded, chunks=chunks))


def choose(times: Array) -> int:
    """d* (eq. 6): 1 only if it is less than all others; among others the least, the lower one of equals."""
    if len(times) == 1 or times[0] < times[1:].min():
        return 1
    return 2 + int(np.argmin(times[1:]))


def _balanced(matrix: Array, topology: Topology, stage: Stage, size: int) -> float:
    """Buffer of one rank in the balanced all-to-all among ``size`` ranks that loads the busiest port as much."""
    if stage.a == 0 and topology.shape[0] > 1:  # ranks of a node share its port
        return float(balanced_bytes(matrix, topology, "flat" if stage.b == topology.num_levels else "inter"))
    outward = matrix.astype(np.float64)
    np.fill_diagonal(outward, 0)
    return float(max(outward.sum(0).max(), outward.sum(1).max())) * size / max(1, size - 1)
