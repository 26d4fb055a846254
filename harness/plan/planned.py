"""Native layers: the unified layer, whose whole way (gate, travel, experts, travel back, mix) is tasks of a plan.

Alone, a layer runs a plan of its own for forward and one for backward, behind one node of autograd. In a training step
the same tasks stand in the step's plan (``harness.plan.training``).
"""

from __future__ import annotations

import abc
from typing import Any

import torch

from harness.comm.handover import pop
from harness.comm.job import Job
from harness.layer.gates import Gated
from harness.layer.moe import UnifiedLayer
from harness.layer.weights import Weights
from harness.plan.graph import Timeline
from harness.plan.lanes import executor_of
from harness.plan.layouts import OpaqueTasks, PlannedTasks
from harness.plan.passage import Way, plan_alone
from harness.plan.segment import Segment
from harness.system import Case, MoELayer


class PlannedLayer(UnifiedLayer):
    """``timelines``: of the last forward and backward that ran alone, by direction."""

    def __init__(self, case: Case, job: Job, weights: Weights):
        super().__init__(case, weights, job.rank)
        self.job, self.case = job, case
        self.lanes = executor_of(job)
        self.timelines: dict[str, Timeline] = {}

    @abc.abstractmethod
    def passage(self, gated: Gated | None = None) -> PlannedPassage:
        """The next batch's way; ``gated``: what the gate chose already."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._alone(x, None)

    def exchange(self, x: torch.Tensor, state: Gated) -> torch.Tensor:
        return self._alone(x, state)

    def _alone(self, x: torch.Tensor, gated: Gated | None) -> torch.Tensor:
        # Backward adds to the parameters' gradients itself, so they are no inputs; x alone may want no gradient.
        return _Alone.apply(x, self, gated, torch.is_grad_enabled(), x.new_empty(0, requires_grad=True))


class PlannedPassage(PlannedTasks, Way):
    """Gate, the way there and back, mix. A subclass takes rows from ``depart`` to the experts and brings home what they
    made, and in backward its gradient the other way. Gate weights it applies either on the way or in ``restore``."""

    def __init__(self, layer: PlannedLayer, gated: Gated | None):
        self.layer, self.gated = layer, gated
        self.share(layer.case)
        self.enter, self.leave, self.beside = Segment(), Segment(), Segment()
        self.x_shared: torch.Tensor | None = None  # what shared experts are given, and its gradient
        self.y_shared: torch.Tensor | None = None
        self.dx_shared: torch.Tensor | None = None
        self.dy_shared: torch.Tensor | None = None
        self.dweights: torch.Tensor | None = None  # of the gate's weights, where they are applied on the way

    @abc.abstractmethod
    def depart(self, rows: torch.Tensor) -> None:
        """In the gate's task: what ``order`` made is there."""

    @abc.abstractmethod
    def arrive(self) -> torch.Tensor:
        """In the last task: what came home, for ``restore``."""

    @abc.abstractmethod
    def depart_back(self, dhome: torch.Tensor | None) -> None:
        """In backward's first task: the gradient of what came home."""

    @abc.abstractmethod
    def arrive_back(self) -> torch.Tensor | None:
        """In backward's last task: the gradient of what departed."""

    def order(self, x: torch.Tensor, gated: Gated) -> torch.Tensor:
        """Tokens [T, M] as they are mixed -> what departs; differentiated through."""
        return x

    def restore(self, home: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What came home -> [T, M]; differentiated through."""
        return home

    def forward_gate(self) -> None:
        if self.shares:
            self.x_shared = self.x
        rows, self.weights, self.unmix = self.enter.forward(self._enter, pop(self, "x"))
        self.depart(rows)

    def forward_restore(self) -> None:
        shared = pop(self, "y_shared")
        self.y = self.leave.forward(self._leave, self.arrive(), pop(self, "weights"), pop(self, "unmix"), shared)

    def forward_shared(self) -> None:
        assert self.layer.shared is not None
        self.y_shared = self.beside.forward(self.layer.shared, pop(self, "x_shared"))

    def backward_restore(self) -> None:
        dhome, self.dweights, self.dunmix, self.dy_shared = self.leave.backward(pop(self, "dy"))
        self.depart_back(dhome)

    def backward_shared(self) -> None:
        (self.dx_shared,) = self.beside.backward(pop(self, "dy_shared"))

    def backward_gate(self) -> None:
        (self.dx,) = self.enter.backward(self.arrive_back(), pop(self, "dweights"), pop(self, "dunmix"))
        if (more := pop(self, "dx_shared")) is not None:
            self.dx = more if self.dx is None else self.dx + more

    def _enter(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        gated = self.layer.choose(x) if self.gated is None else self.gated
        self.ids, self.kept = gated.ids, gated.kept
        mixed = x if gated.mix is None else (gated.mix @ x.to(gated.mix.dtype)).to(x.dtype)
        return self.order(mixed, gated), gated.weights, gated.unmix

    def _leave(
        self, home: torch.Tensor, weights: torch.Tensor, unmix: torch.Tensor | None, shared: torch.Tensor | None
    ) -> torch.Tensor:
        rows = self.restore(home, weights)
        y = rows if unmix is None else (unmix @ rows.to(unmix.dtype)).to(rows.dtype)
        return y if shared is None else y + shared


class Opaque(OpaqueTasks, Way):
    """A layer that is one task a direction."""

    def __init__(self, layer: MoELayer):
        self.layer, self.segment = layer, Segment()

    def forward_moe(self) -> None:
        self.y = self.segment.forward(self.layer, pop(self, "x"))

    def backward_moe(self) -> None:
        (self.dx,) = self.segment.backward(pop(self, "dy"))


class _Alone(torch.autograd.Function):
    """A layer's tokens x [T, M] -> y [T, M]; gradients of parameters are added to them in backward."""

    @staticmethod
    def forward(ctx, x, layer, gated, grad, tie):  # type: ignore[no-untyped-def, override]
        way: Any = layer.passage(gated)
        way.x = x.detach().requires_grad_(grad and x.requires_grad)
        with torch.set_grad_enabled(grad):
            layer.timelines["forward"] = layer.lanes.run(plan_alone(way, "forward"))
        ctx.layer, ctx.way = layer, way
        return way.y.detach()

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        way, ctx.way = ctx.way, None
        way.dy = dy.contiguous()
        with torch.enable_grad():
            ctx.layer.timelines["backward"] = ctx.layer.lanes.run(plan_alone(way, "backward"))
        dx = way.dx
        del way  # with it goes its hold on dx, which autograd then takes over instead of copying it
        return dx, None, None, None, None
