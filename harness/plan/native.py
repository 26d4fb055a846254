"""Native systems that differ by their exchange alone: one layer, run as a plan of four tasks a direction.

Every task is a piece of autograd of its own: its inputs are cut off from what made them, and its backward is a task of
the backward plan (as pipeline runtimes do it). So a layer's communication lies on the lanes, forward and backward,
where timelines show it and other work may stand beside it.
"""

from __future__ import annotations

import abc
from typing import Any

import torch

from harness.comm.exchange import Exchange
from harness.comm.job import Job
from harness.layer.experts import Experts, IdentityExperts
from harness.layer.moe import UnifiedLayer, UnifiedSystem
from harness.layer.weights import Weights
from harness.plan.graph import COMPUTE, INTER, Plan, Timeline
from harness.plan.lanes import executor_of
from harness.system import Case


class NativeLayer(UnifiedLayer):
    """Whole experts on their ranks behind an exchange. ``timelines``: of the last forward and backward."""

    def __init__(self, case: Case, exchange: Exchange, weights: Weights, rank: int):
        super().__init__(case, weights, rank)
        self.exchange_ = exchange
        self.timelines: dict[str, Timeline] = {}
        if case.identity_experts:
            self.experts = IdentityExperts()
        else:
            self.experts = Experts(weights, case.placement.local(rank).tolist(), case.device)

    def travel(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None
    ) -> torch.Tensor:
        return _Planned.apply(x, weights, self, ids, kept, *self.experts.parameters())

    def run(self, direction: str, plan: Plan) -> None:
        self.timelines[direction] = executor_of(self.exchange_.job).run(plan)


class _Step:
    """One forward and its backward, task by task."""

    def __init__(self, layer: NativeLayer, x: torch.Tensor, weights: torch.Tensor):
        self.layer, self.exchange, self.parameters = layer, layer.exchange_, tuple(layer.experts.parameters())
        self.x, self.weights = x, weights

    def forward(self, ids: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        plan = Plan()

        def metadata() -> None:
            self.plan = self.exchange.plan(ids, self.weights, kept)

        def dispatch() -> None:
            self.arrived = self.exchange.dispatch(self.x, self.plan)

        def experts() -> None:
            self.rows = _cut(self.arrived)
            self.made = self.layer.experts(self.rows, self.plan.counts)

        def combine() -> None:
            self.sent = _cut(self.made)
            self.y = self.exchange.combine(self.sent, self.plan)

        plan.add("metadata", INTER, run=metadata)
        plan.add("dispatch", INTER, run=dispatch)
        plan.add("experts", COMPUTE, ["dispatch"], run=experts)
        plan.add("combine", INTER, ["experts"], run=combine)
        self.layer.run("forward", plan)
        return self.y.detach()

    def backward(self, dy: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of x, the gate's weights and the experts' parameters."""
        plan = Plan()
        dx = dweights = None
        dparameters: tuple[Any, ...] = ()

        def combine() -> None:
            nonlocal dweights
            self.dsent, dweights = _gradients(self.y, (self.sent, self.plan.weights), dy)

        def experts() -> None:
            nonlocal dparameters
            self.drows, *rest = _gradients(self.made, (self.rows, *self.parameters), self.dsent)
            dparameters = tuple(rest)

        def dispatch() -> None:
            nonlocal dx
            (dx,) = _gradients(self.arrived, (self.x,), self.drows)

        def metadata() -> None:
            nonlocal dweights
            if self.plan.weights is not self.weights:
                (dweights,) = _gradients(self.plan.weights, (self.weights,), dweights)

        plan.add("combine_grad", INTER, run=combine)
        plan.add("experts_grad", COMPUTE, ["combine_grad"], run=experts)
        plan.add("dispatch_grad", INTER, ["experts_grad"], run=dispatch)
        plan.add("metadata_grad", INTER, run=metadata)
        self.layer.run("backward", plan)
        return dx, dweights, *dparameters


def _cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _gradients(
    output: torch.Tensor, inputs: tuple[torch.Tensor, ...], doutput: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Of each input; None where none is wanted or nothing depends on it."""
    wanted = [each for each in inputs if each.requires_grad]
    if doutput is None or not wanted or not output.requires_grad:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(output, wanted, doutput, allow_unused=True))
    return [next(found) if each.requires_grad else None for each in inputs]


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, layer, ids, kept, *parameters):  # type: ignore[no-untyped-def, override]
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            own = (x.detach().requires_grad_(needs_x), weights.detach().requires_grad_(needs_weights))
            step = _Step(layer, *own)
            y = step.forward(ids, kept)
        ctx.step = step
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        dx, dweights, *dparameters = ctx.step.backward(dy)
        return dx, dweights, None, None, None, *dparameters


class NativeSystem(UnifiedSystem):
    """A native system that differs by its exchange alone."""

    @classmethod
    @abc.abstractmethod
    def exchange(cls, case: Case, job: Job) -> Exchange:
        """Collective: the exchange of this rank."""

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> NativeLayer:
        return NativeLayer(case, cls.exchange(case, job), weights, job.rank)
