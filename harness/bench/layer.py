"""Phases ``exchange`` and ``layer``: one MoE layer, forward and backward, as a contender of a race."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.bench.timing import Sample, Stopwatch
from harness.comm.job import Job
from harness.layer import gates
from harness.layer.oracle import Oracle
from harness.layer.weights import Weights
from harness.plan.graph import Timeline
from harness.routing import Routing
from harness.specs import Experiment
from harness.system import Case, MoELayer, System


class LayerContender:
    """Phases ``exchange`` and ``layer``: forward and backward of one MoE layer on inputs drawn in advance."""

    def __init__(self, job: Job, system: type[System], experiment: Experiment, case: Case):
        self.job, self.system, self.experiment, self.case = job, system, experiment, case
        weights = Weights(case.model, case.dtype, seed=experiment.workload.seed)
        self.layer = system.build(case, job, weights)
        prescribed = experiment.workload.generator != "natural"
        directions = weights.directions.double() if prescribed else None
        x, dy = draw_inputs(case.routing, case.model.hidden, directions, job.rank, experiment.workload.seed)
        self.x = x.to(job.device, case.torch_dtype).requires_grad_(experiment.backward)
        self.oracle = Oracle(weights, identity_experts=True)
        if prescribed:
            check_routing(case, self.oracle, self.x.detach().double().cpu(), job.rank)
        self.dy = dy.to(job.device, case.torch_dtype)
        self.y: torch.Tensor | None = None

    @property
    def layers(self) -> list[MoELayer]:
        return [self.layer]

    def keep(self) -> list[torch.Tensor]:
        self.layer.zero_grad(set_to_none=True)
        return [*self.layer.parameters(), *self.layer.buffers(), self.x, self.dy]

    def run(self, rep: int, watch: Stopwatch) -> list[Sample]:
        with torch.set_grad_enabled(self.experiment.backward):
            forward = self._forward()
            samples = [watch.measure(rep, "forward", forward)]
            if self.experiment.backward:
                samples.append(watch.measure(rep, "backward", self._backward))
        return samples

    def _forward(self) -> Callable[[], None]:
        """Clear what the last step left and prepare; the work that remains is to be timed."""
        self.y = self.x.grad = None
        self.layer.zero_grad(set_to_none=True)
        exchange = self.experiment.phase == "exchange"
        state = self.layer.prepare(self.x) if exchange else None

        def forward() -> None:
            self.y = self.layer.exchange(self.x, state) if exchange else self.layer(self.x)

        return forward

    def _backward(self) -> None:
        assert self.y is not None
        self.y.backward(self.dy)

    def warm_up(self) -> None:
        with torch.set_grad_enabled(self.experiment.backward):
            self._forward()()
            if self.experiment.backward:
                self._backward()

    def errors(self) -> dict[str, float]:
        """With identity experts every token must have come home as the sum of its gate weights times itself, and its
        gradient likewise: no token lost, none taken twice. Else the result must be finite."""
        assert self.y is not None
        if self.experiment.phase == "layer":
            parts = [self.y.detach()] + ([] if self.x.grad is None else [self.x.grad])
            finite = all(bool(part.isfinite().all()) for part in parts)
            return worst_of(self.job, {"output": 0.0 if finite else torch.inf})
        return worst_of(self.job, self._exchange_errors())

    def timelines(self) -> dict[str, Timeline]:
        return dict(getattr(self.layer, "timelines", {}))

    def close(self) -> None:
        """It keeps nothing."""

    def _exchange_errors(self) -> dict[str, float]:
        assert self.y is not None
        x = self.x.detach().double().cpu().requires_grad_()
        expected = self.oracle(x, self._kept(x.detach()), constant_gate=not self.layer.gate_in_exchange)
        errors = {"output": relative_error(self.y, expected)}
        if self.experiment.backward:
            (dx,) = torch.autograd.grad(expected, x, self.dy.double().cpu())
            found = torch.zeros_like(self.x) if self.x.grad is None else self.x.grad
            errors["input_grad"] = relative_error(found, dx)
        return errors

    def _kept(self, x: torch.Tensor) -> torch.Tensor | None:
        """bool [T, E] where the system drops by capacity, by its documented rule over all ranks' tokens."""
        if self.case.model.capacity_factor is None:
            return None
        gathered: list[Any] = [None] * self.job.num_ranks
        dist.all_gather_object(gathered, self.oracle.logits(x).detach().softmax(-1))
        kept = self.system.kept(self.case, gathered)
        return None if kept is None else kept[self.job.rank]


def draw_inputs(
    routing: Routing, hidden: int, directions: torch.Tensor | None, rank: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a gradient of y, float64 [T_rank, M] each. Given ``Weights.directions``, the real gate routes x as
    ``routing`` says."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + rank)
    z, dy = torch.randn((2, routing.tokens[rank], hidden), generator=generator, dtype=torch.float64)
    if directions is None:
        return z, dy
    return gates.steer(z, directions, torch.as_tensor(routing.of_rank(rank).astype(np.int64))), dy


def check_routing(case: Case, oracle: Oracle, x: torch.Tensor, rank: int) -> None:
    """The gate must choose what the certificate will state: an error if it does not, for any token of this rank."""
    chosen, _ = gates.route(case.model, oracle.logits(x).detach(), oracle.bias)
    wanted = torch.as_tensor(case.routing.of_rank(rank).astype(np.int64))
    different = int((chosen.sort(-1).values != wanted.sort(-1).values).any(-1).sum())
    if different:
        raise ValueError(f"the gate routes {different} of {len(x)} tokens otherwise than the workload prescribes")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| over max |expected|; 0 for nothing."""
    if not expected.numel():
        return 0.0
    difference = (found.detach().double().cpu() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max())


def worst_of(job: Job, errors: dict[str, float]) -> dict[str, float]:
    """The largest over all ranks; NaN counts as infinite."""
    worst = torch.tensor(list(errors.values()), dtype=torch.float64, device=job.device).nan_to_num(nan=torch.inf)
    if job.num_ranks > 1:
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(errors, worst.tolist(), strict=True))
