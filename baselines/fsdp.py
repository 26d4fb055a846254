"""Plain FSDP on experts: every rank gathers all experts of a layer before it, and reduces all their gradients after it.

Parameters, gradients and optimizer state are sharded, as in Hecate, but which experts are gathered does not depend on
the load: all of them, in forward and again in backward. No token travels.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from harness.comm.job import Job
from harness.plan.replicated import Policy, ReplicatedSystem
from harness.system import Case


class Everything(Policy):
    """All experts everywhere, in every batch."""

    rematerialises = True

    def expect(self, owner: np.ndarray, num_ranks: int) -> np.ndarray:
        return np.ones((len(owner), num_ranks), dtype=bool)


class FSDPExperts(ReplicatedSystem):
    name = "fsdp-experts"
    title = "plain FSDP on experts: every rank gathers all of them, forward and backward"
    source = "fully sharded data parallelism (ZeRO-3), a baseline of Hecate (arXiv 2502.02581)"
    variants: ClassVar[dict[str, dict[str, bool | int | float | str]]] = {"training": {}}
    remembers = False
    recipe: ClassVar[dict[str, str]] = {"state": "fsdp-experts"}

    @classmethod
    def policy(cls, case: Case, job: Job | None) -> Policy:
        return Everything()

    @classmethod
    def copied_parameters(cls, case: Case) -> int:
        return 2 * (case.model.num_experts - case.model.num_experts // case.topology.num_ranks)  # of one layer


#: brought to recipes, by name
STATES = {"fsdp-experts": FSDPExperts}
