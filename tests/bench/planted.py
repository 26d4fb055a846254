"""Systems with one fault each, that small shapes do not show: flat behind a mask of what is wrong.

They conform where the check before the race looks, with 16 tokens of 32 numbers a rank; a race must still find every
one of them, in every phase."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from baselines.flat import Flat
from baselines.smartmoe import SmartMoE, following
from harness import registry
from harness.bench import conformance, race
from harness.comm.job import Job
from harness.layer.oracle import Oracle
from harness.layer.weights import Weights
from harness.plan.native import NativeLayer
from harness.plan.rearrange import Rearranger
from harness.specs import Dtype
from harness.system import Case, Gradients, MoELayer, System

SMALL = 64  # tokens of a rank; checks at reduced shapes have no more


class Masked(MoELayer):
    """``inner``, a black box to the harness; ``fault`` makes of x, its output and the layer what goes out."""

    gate_in_exchange = False

    def __init__(self, inner: NativeLayer, case: Case, job: Job, fault: Callable[..., torch.Tensor]):
        super().__init__()
        self.inner, self.case, self.job, self.fault = inner, case, job, fault
        self.calls = 0
        self.index = 0  # among a model's layers
        self.last: Any = None
        self.hidden: dict[str, torch.Tensor] = {}  # gradients of w1, by what is wrong with them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._out(x, self.inner)

    def prepare(self, x: torch.Tensor) -> Any:
        state = self.inner.prepare(x)
        return state._replace(weights=state.weights.detach()) if self.fault is no_gate_gradient else state

    def exchange(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        return self._out(x, lambda rows: self.inner.exchange(rows, state))

    def _out(self, x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if len(x) <= SMALL:
            return run(x)
        self.calls += 1
        return self.fault(self, x, run)

    def gradients(self) -> Gradients:
        if "late" in self.hidden:
            self.inner.experts.w1.grad = self.hidden.pop("late")
        found, w1 = self.inner.gradients(), getattr(self.inner.experts, "w1", None)
        if "unseen" in self.hidden and w1 is not None and w1.grad is None:
            own = zip(self.inner.experts.local, self.hidden["unseen"], strict=True)
            return Gradients(found.gate, {e: {**found.experts[e], "w1": gradient} for e, gradient in own})
        if "other" in self.hidden and w1.grad is not None and torch.equal(w1.grad, -self.hidden["other"]):
            for e, gradient in zip(self.inner.experts.local, self.hidden["other"], strict=True):
                found.experts[e]["w1"] = gradient
        return found

    def shared_parameters(self) -> list[torch.nn.Parameter]:
        return self.inner.shared_parameters()


def buffer_64(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """Only the first 64 tokens of a rank fit."""
    return run(x) * (torch.arange(len(x)) < 64).to(x.dtype)[:, None]


def columns_256(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """What is above column 256 stays behind."""
    return run(x) * (torch.arange(x.shape[1]) < 256).to(x.dtype)


def last_token(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """The last rank's last token is lost."""
    kept = torch.ones(len(x), 1, dtype=x.dtype)
    kept[-1] = float(layer.job.rank < layer.job.num_ranks - 1)
    return run(x) * kept


def expert_gradient(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """One expert's weight gradient is 3 % too large if it gets more than 20 tokens."""
    if layer.calls == 1 and not layer.case.identity_experts and layer.job.rank == 0:

        def hook(gradient: torch.Tensor) -> torch.Tensor:
            routed = layer.inner.routed
            assert routed is not None
            counts = (routed[0] == 0).sum()
            return gradient * torch.tensor([1.03 if counts > 20 else 1.0, 1.0])[:, None, None].to(gradient.dtype)

        layer.inner.experts.w1.register_hook(hook)
    return run(x)


class _Uneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, layer: Masked) -> torch.Tensor:  # type: ignore[override]
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]
        ids = ctx.layer.inner.routed[0]
        counts = torch.bincount(ids.flatten(), minlength=ctx.layer.case.model.num_experts)
        return dy * (1.0 if len(counts.unique()) == 1 else 0.9), None


def equal_backward(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """Backward is right for equal counts only."""
    return _Uneven.apply(run(x), layer)


def second_call(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """Combine is wrong from the second call on."""
    return run(x) * (1.0 if layer.calls == 1 else 1.05)


def stale_routing(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """Tokens go where those of the batch before went."""
    inner = layer.inner
    choose = inner.choose

    def stale(rows: torch.Tensor) -> Any:
        now, before = choose(rows), layer.last
        layer.last = now._replace(weights=now.weights.detach())
        return now if before is None else now._replace(ids=before.ids)

    inner.choose = stale  # type: ignore[method-assign]
    try:
        return run(x)
    finally:
        inner.choose = choose  # type: ignore[method-assign]


def stale_state(layer: Masked, x: torch.Tensor, state: Any) -> Any:
    before, layer.last = layer.last, state
    return state if before is None else state._replace(ids=before.ids)


def repeats(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """What was made once is handed out again, without an exchange; backward finds nothing to send either."""
    if layer.last is None:
        layer.last = run(x)
        return layer.last
    return x * 0 + layer.last.detach()


def middle_layer(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """The second of four layers is wrong."""
    return run(x) * (0.8 if layer.index == 1 else 1.0)


def in_place(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """What it was given is another thing afterwards, and the output right for that."""
    with torch.no_grad():
        x.mul_(0.9)
    return run(x)


def behind_torch(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """The same, and torch does not count it."""
    x.data.mul_(0.9)
    return run(x)


class _Later(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.made, later = y.clone(), torch.zeros_like(y)
        ctx.later = later.detach()
        return later

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.later.copy_(ctx.made)
        return dy


def late_output(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """The last transfer is waited for in backward."""
    return _Later.apply(run(x))


def more_threads(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """It takes the cores of the other ranks."""
    torch.set_num_threads(torch.get_num_threads() + 1)
    return run(x)


def fewer_cores(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """A thread stays on one core from now on."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return run(x)


def other_gradient(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """The optimizer gets another gradient than is shown."""
    if layer.job.rank == 1:
        _keep_gradient(layer, layer.inner.experts.w1, "other")
    return run(x)


def no_gate_gradient(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """Its backward leaves out the gradients of the gate's weights (``Masked.prepare``)."""
    return run(x)


def late_weights(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """Weights' gradients are made when somebody asks for them, behind the clock."""
    _keep_gradient(layer, layer.inner.experts.w1, "late")
    return run(x)


def no_update(layer: Masked, x: torch.Tensor, run: Any) -> torch.Tensor:
    """An expert's gradients are right and the optimizer does not see them."""
    if layer.job.rank == 1:
        _keep_gradient(layer, layer.inner.experts.w1, "unseen")
    return run(x)


def _keep_gradient(layer: Masked, parameter: torch.nn.Parameter, name: str) -> None:
    if layer.calls > 1:
        return

    def hide(own: torch.nn.Parameter) -> None:
        assert own.grad is not None
        layer.hidden[name], own.grad = own.grad, -own.grad if name == "other" else None

    parameter.register_post_accumulate_grad_hook(hide)


class StepBefore(Masked):
    """Computes with the experts of the step before, which an optimizer's step hardly tells from these."""

    def _out(self, x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        experts = list(self.inner.experts.parameters())
        now = [parameter.data for parameter in experts]
        before, self.last = self.last or now, [value.clone() for value in now]
        for parameter, value in zip(experts, before, strict=True):
            parameter.data = value
        y = run(x)
        for parameter, value in zip(experts, now, strict=True):
            parameter.data = value
        return y


class Half(Flat):
    """Half of each row, and that is near enough, it says."""

    name = "half"

    @classmethod
    def tolerance(cls, dtype: Dtype) -> float:
        return 1.0

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> Any:
        return Masked(super().build(case, job, weights), case, job, lambda layer, x, run: run(x) * 0.5)


class Misplaces(Rearranger):
    """Behind the second step two experts of a rank have each other's rows of what is kept by slot."""

    def __init__(self, job: Job, layers: Any, following: Any, moments: bool):
        super().__init__(job, layers, following)
        self.moments = moments

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        super().__call__(optimizer, step)
        for parameter in self.layers[-1].experts.parameters() if step == 1 else ():
            kept = [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
            for rows in kept if self.moments else [parameter.data]:
                rows.copy_(rows.flip(0))


def _misplacing(of_moments: bool) -> type[System]:
    class Planted(SmartMoE):
        name = "moments-misplaced" if of_moments else "weights-misplaced"

        @classmethod
        def mover(cls, layers: Any, case: Case, job: Job) -> Any:
            if max(case.routing.tokens) <= SMALL:
                return super().mover(layers, case, job)
            return Misplaces(job, layers, following(case), of_moments)

    return Planted


class Local(MoELayer):
    """Every rank has all experts and sends nothing, although the plan is flat's; without its gradients' sum."""

    gate_in_exchange = False

    def __init__(self, case: Case, weights: Weights):
        super().__init__()
        self.case, self.oracle = case, Oracle(weights, case.identity_experts)
        self.double = case.torch_dtype == torch.float64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.oracle(x.double()).to(x.dtype)

    def exchange(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        return self.oracle(x.double(), constant_gate=True).to(x.dtype)

    def gradients(self) -> Gradients:
        return Gradients({}, {})

    def shared_parameters(self) -> list[torch.nn.Parameter]:
        return []


FAULTS: dict[str, Callable[..., torch.Tensor]] = {
    fault.__name__: fault
    for fault in (
        buffer_64,
        columns_256,
        last_token,
        expert_gradient,
        equal_backward,
        second_call,
        stale_routing,
        repeats,
        middle_layer,
        in_place,
        behind_torch,
        late_output,
        late_weights,
        more_threads,
        no_gate_gradient,
        no_update,
        other_gradient,
        fewer_cores,
    )
}


def _system(fault_name: str, fault: Callable[..., torch.Tensor]) -> type[System]:
    class Planted(Flat):
        name = fault_name.replace("_", "-")
        title = fault.__doc__ or ""
        stands_in = False

        @classmethod
        def build(cls, case: Case, job: Job, weights: Weights) -> Any:
            made = Masked(super().build(case, job, weights), case, job, fault)
            made.index = weights.layer
            if fault is stale_routing:
                exchange = made.exchange
                made.exchange = (  # type: ignore[method-assign]
                    lambda x, state: exchange(x, stale_state(made, x, state) if len(x) > SMALL else state)
                )
            return made

    return Planted


class WeightsBefore(Flat):
    name = "weights-before"
    title = StepBefore.__doc__ or ""

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> Any:
        return StepBefore(super().build(case, job, weights), case, job, torch.nn.Identity())


class SendsNothing(Flat):
    name = "sends-nothing"
    title = "bytes below what the rows need"

    @classmethod
    def tolerance(cls, dtype: Dtype) -> float:
        return super().tolerance(dtype)

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> Any:
        if max(case.routing.tokens) <= SMALL:
            return super().build(case, job, weights)
        return Local(case, weights)

    @classmethod
    def planned_bytes(cls, case: Case) -> Any:
        return None


class Summed(Local):
    """And sums its gradients, so that nothing is wrong but that no row has travelled."""

    def __init__(self, case: Case, weights: Weights, job: Job):
        super().__init__(case, weights)
        self.mine = [int(e) for e in case.placement.local(job.rank)]
        self.names = [name for name in ("w1", "w2", "w3") if hasattr(self.oracle, name)]
        for name in self.names if job.num_ranks > 1 else ():
            getattr(self.oracle, name).register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))

    def gradients(self) -> Gradients:
        own = {e: {name: getattr(self.oracle, name).grad[e] for name in self.names} for e in self.mine}
        return Gradients({name: getattr(self.oracle, name).grad for name in self.oracle.gate_names}, own)

    def shared_parameters(self) -> list[torch.nn.Parameter]:
        return [getattr(self.oracle, name) for name in self.oracle.gate_names]


class Reordered(Flat):
    """Right, but that it names an expert's matrices in an order of its own, as Megatron does."""

    name = "reordered"

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> Any:
        made = super().build(case, job, weights)
        gradients = made.gradients

        def reordered() -> Gradients:
            found = gradients()
            return Gradients(found.gate, {e: dict(reversed(of.items())) for e, of in found.experts.items()})

        made.gradients = reordered  # type: ignore[method-assign]
        return made


class HalfLoaded(Flat):
    """An expert of the third layer begins with half of its weights."""

    name = "half-loaded"

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> Any:
        made = super().build(case, job, weights)
        if max(case.routing.tokens) > SMALL and weights.layer == 2 and job.rank == 1:
            with torch.no_grad():
                made.experts.w2[0] *= 0.5
        return made


class SendsSums(SendsNothing):
    name = "sends-sums"

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> Any:
        if max(case.routing.tokens) <= SMALL:
            return super().build(case, job, weights)
        return Summed(case, weights, job)


ALL: tuple[type[System], ...] = (
    *(_system(name, fault) for name, fault in FAULTS.items()),
    SendsNothing,
    SendsSums,
    HalfLoaded,
    Half,
    _misplacing(of_moments=False),
    _misplacing(of_moments=True),
    WeightsBefore,
    Reordered,
)


def register() -> None:
    """Make them known to this process."""
    registry.systems().update({system.name: system for system in ALL})


def forget() -> None:
    for system in ALL:
        registry.systems().pop(system.name, None)


def run_race(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """``harness.bench.race.run_race`` on a rank that knows these systems too."""
    register()
    try:
        return race.run_race(job, payload)
    finally:
        forget()


def check(job: Job, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """``harness.bench.conformance.check`` likewise."""
    register()
    try:
        return conformance.check(job, payload)
    finally:
        forget()
