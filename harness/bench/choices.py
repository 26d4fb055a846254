"""Which experts a layer's tokens choose at full shape, what is dropped of it, and where a hair's breadth decides."""

from __future__ import annotations

from typing import Any

import torch

from harness.comm.agree import of_all
from harness.comm.job import Job
from harness.layer.oracle import Oracle
from harness.layer.weights import Weights, shared_names
from harness.specs import EXPERTS_CHOOSE
from harness.system import Case, System

#: logits nearer than this to another choice, of the largest, may be chosen otherwise in float32
UNSURE = 2e-5
_DRAWS = 6


class Gates:
    """The gate of one layer on this rank's tokens, by the oracle. ``system``: whose rule of dropping holds; None: it is
    not asked for what is dropped."""

    def __init__(self, job: Job, system: type[System] | None, case: Case, weights: Weights):
        self.job, self.system, self.case, self.weights = job, system, case, weights
        computes = not case.identity_experts and case.stand_in_costs is None
        self.shared = shared_names(case.model) if computes else {}
        self.oracle = Oracle(weights, True, case.routing.tokens).to(job.device)
        self.oracle.tokens = tuple(count if rank == job.rank else 0 for rank, count in enumerate(case.routing.tokens))

    @property
    def replicated(self) -> list[str]:
        """Names of parameters that every rank has: the gate's, then the shared experts'."""
        return [*self.oracle.gate_names, *self.shared]

    @property
    def rule(self) -> Any:
        """By which assignments are dropped; None: none are."""
        if self.case.model.capacity_factor is None or self.case.model.gate in EXPERTS_CHOOSE or self.system is None:
            return None
        kept = self.system.alone().kept.__func__  # type: ignore[attr-defined]
        return self.case.model.capacity_factor, kept, repr(sorted(self.case.options.items())), self.case.groups

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: getattr(self.oracle, name) for name in self.oracle.gate_names}

    def chosen(self, x: torch.Tensor) -> torch.Tensor:
        """bool [T, E]: which pairs the tokens x float64 [T, M] choose, dropped ones too."""
        with torch.no_grad():
            return self.oracle.gates(self.oracle.logits(x)) > 0

    def weigh(self, logits: torch.Tensor) -> torch.Tensor:
        """Collective: dense gate matrix [T, E], zero where an assignment is dropped."""
        return self.oracle.gates(logits, self._kept(logits.detach()))

    def unsure(self, logits: torch.Tensor) -> torch.Tensor:
        """Collective: bool [T, E]: assignments that are there or not by a hair's breadth."""
        logits = logits.detach()
        found = torch.zeros_like(logits, dtype=torch.bool)
        if not logits.numel():
            width = 0.0
        else:
            width = UNSURE * float(logits.abs().max())
        first = self.weigh(logits) > 0
        generator = torch.Generator().manual_seed(1)
        for _ in range(_DRAWS):
            noise = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
            found |= (self.weigh(logits + width * noise) > 0) != first
        return found

    def _kept(self, logits: torch.Tensor) -> torch.Tensor | None:
        if self.rule is None:
            return None
        assert self.system is not None
        kept = self.system.kept(self.case, of_all(self.job, logits.softmax(-1).cpu()))
        return None if kept is None else kept[self.job.rank].to(logits.device)
