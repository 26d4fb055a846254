"""Steps 6, 7 and 8: streams side by side, and the memory that passes between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from harness import registry
from harness.bench import conformance as checks
from harness.comm.handover import Handover, pop
from harness.comm.job import Job
from harness.layer.weights import Weights
from harness.placement import Placement
from harness.plan.graph import COMPUTE, INTER, Plan
from harness.plan.lanes import PlanFailure, executor
from harness.routing import make_routing
from harness.specs import Model, Workload
from harness.system import Case, MoELayer
from tests.gpu.machine import CLUSTER, Machine
from tests.gpu.step import need

SLEEP_S = 0.02
SIZE = 1 << 20  # elements of the block that passes from lane to lane
SLACK = 0.05
LAYER = Model(name="smoke", num_layers=1, hidden=128, ffn=64, num_experts=8, top_k=2)
TOKENS, NUM_STEPS = 256, 20


def memory(machine: Machine) -> dict[str, Any]:
    """A block that one lane made and another reads must not be given out again before it is read."""
    machine.hazards()
    found = _hand_over(machine, _Careless())
    if machine.emulated:
        need(machine.hazards(), "the emulated device does not see a block that is used again too early")
    else:
        need(found == 2, f"without any precaution the reader sees {found}: this step would not see the fault")
    found = _hand_over(machine, _Careful())
    _no_hazards(machine)
    need(found == 1, f"the reader sees {found}, which was written behind its back; it was given 1")
    losses = {degree: _train_fsmoe(machine, degree) for degree in (1, 4)}
    _no_hazards(machine)
    difference = float(np.abs(np.subtract(losses[4], losses[1]) / losses[1]).max())
    need(difference <= 1e-9, f"losses of FSMoE in 4 chunks and in 1 differ by {difference:.1e}")
    need(losses[1][-1] < losses[1][0], f"the loss does not fall: {losses[1]}")
    return {"losses": losses[4][:: NUM_STEPS - 1], "largest_difference": difference}


def _no_hazards(machine: Machine) -> None:
    need(not (found := machine.hazards()), f"{len(found)} kinds of races or reuses, first: {found[:1]}")


class _Careless:
    """What passes from task to task, as in a first draft of a plan."""

    given: torch.Tensor | None = None
    read: torch.Tensor | None = None
    more: torch.Tensor | None = None


class _Careful(Handover, _Careless):
    """The same, as plans do it."""


def _hand_over(machine: Machine, box: _Careless) -> float:
    """What ``compute`` reads of a block of ones that ``inter`` made, while ``inter`` fills another block of its size
    with twos."""

    def give() -> None:
        box.given = torch.ones(SIZE, device=machine.device)

    def read() -> None:
        given = pop(box, "given")
        machine.spin(5 * SLEEP_S)
        box.read = given.sum() / SIZE

    def again() -> None:
        box.more = torch.full((SIZE,), 2.0, device=machine.device)

    plan = Plan()
    plan.add("give", INTER, run=give)
    plan.add("read", COMPUTE, ["give"], run=read)
    plan.add("again", INTER, run=again)
    with executor(machine.device) as lanes:
        lanes.run(plan)
    assert box.read is not None
    return float(box.read)


def _train_fsmoe(machine: Machine, degree: int) -> list[float]:
    """Losses of one FSMoE layer in float64 whose experts lag behind its links, so that every hand-over is late."""
    layer = _layer(machine.job, "fsmoe", degree_forward=degree, degree_backward=degree)
    passage = layer.passage

    def late(gated: Any = None) -> Any:
        way = passage(gated)
        for task in ("forward_experts", "backward_experts"):
            setattr(way, task, _behind(machine, getattr(way, task)))
        return way

    layer.passage = late
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    generator = torch.Generator().manual_seed(3)
    x, wanted = torch.randn(2, TOKENS, LAYER.hidden, generator=generator, dtype=torch.float64).to(machine.device)
    losses = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss = (layer(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _behind(machine: Machine, work: Callable[..., Any]) -> Callable[..., Any]:
    def late(*arguments: Any) -> Any:
        machine.spin(SLEEP_S / 10)
        return work(*arguments)

    return late


def _layer(job: Job, system: str, **options: Any) -> MoELayer:
    workload = Workload(name="smoke", tokens_per_rank=TOKENS, generator="uniform")
    routing = make_routing(workload, LAYER, job.topology)
    assert routing is not None
    placement = Placement.contiguous(LAYER.num_experts, job.num_ranks)
    case = Case(LAYER, "float64", job.topology, placement, routing, str(job.device), options=options, cluster=CLUSTER)
    return registry.system(system).build(case, job, Weights(LAYER, "float64", seed=5))


# ---------------------------------------------------------------------- executor


def executor_(machine: Machine) -> dict[str, Any]:
    """Lanes work side by side and wait for each other; a failure names its task; backward inside backward."""
    found = _order(machine) | _failure(machine) | _nested(machine)
    if not machine.emulated:
        found |= _sleeps(machine) | {"overlap": _overlap(machine)}
    _no_hazards(machine)
    return found | machine.unseen("overlap and times: the emulated device has no time")


def _order(machine: Machine) -> dict[str, Any]:
    """A task reads what the task that it waits for has written, on another lane, after a while."""
    numbers = torch.zeros(2, device=machine.device)

    def write() -> None:
        machine.spin(SLEEP_S)
        numbers[0] = 7

    plan = Plan()
    plan.add("write", INTER, run=write)
    plan.add("read", COMPUTE, ["write"], run=lambda: numbers[1].copy_(numbers[0]))
    with executor(machine.device) as lanes:
        lanes.run(plan)
    need(numbers.tolist() == [7, 7], f"a task that waits for another has read {numbers.tolist()}")
    return {}


def _sleeps(machine: Machine) -> dict[str, Any]:
    """Two tasks of ``SLEEP_S``: beside each other, and one after the other."""
    found: dict[str, Any] = {}
    with executor(machine.device) as lanes:
        for name, after, expected in (("beside", [], 1), ("after", ["a"], 2)):
            plan = Plan()
            plan.add("a", INTER, run=lambda: machine.spin(SLEEP_S))
            plan.add("b", COMPUTE, after, run=lambda: machine.spin(SLEEP_S))
            lanes.run(plan)
            timeline = lanes.run(plan)
            took = timeline.end_s - timeline.start_s
            found[f"sleeps_{name}"] = total = float(timeline.total_s) / SLEEP_S
            need(abs(total / expected - 1) <= SLACK, f"two sleeps {name} each other take {total:.3f} of one")
            need(np.abs(took / SLEEP_S - 1).max() <= SLACK, f"the timeline says {took} s of tasks of {SLEEP_S} s")
    return found


def _failure(machine: Machine) -> dict[str, Any]:
    """The lanes are of use afterwards."""

    def fail() -> None:
        raise ZeroDivisionError("planted")

    plan, after = Plan(), Plan()
    plan.add("first", INTER)
    plan.add("the guilty one", COMPUTE, ["first"], run=fail)
    number = torch.zeros((), device=machine.device)
    after.add("later", INTER, run=lambda: number.add_(1))
    with executor(machine.device) as lanes:
        try:
            lanes.run(plan)
        except PlanFailure as failure:
            need("the guilty one" in str(failure), f"the failure does not name its task: {failure}")
        else:
            need(False, "a task raised and the plan has not")
        lanes.run(after)
    need(float(number) == 1, "after a failure the lanes do nothing")
    return {}


class _Again(torch.autograd.Function):
    """``layer`` once more in backward: a backward inside a backward, as checkpointing does it."""

    @staticmethod
    def forward(ctx, x, layer):  # type: ignore[no-untyped-def, override]
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x.detach())

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            y = ctx.layer(inner)
        y.backward(dy)
        return inner.grad, None


def _nested(machine: Machine) -> dict[str, Any]:
    found = []
    for call in (lambda layer, x: layer(x), _apply):
        layer = _layer(machine.job, "flat")
        x, dy = torch.randn(2, TOKENS, LAYER.hidden, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        x = x.to(machine.device).requires_grad_()
        call(layer, x).backward(dy.to(machine.device))
        assert x.grad is not None
        found.append([x.grad.cpu(), *(p.grad.cpu() for p in layer.parameters() if p.grad is not None)])
    worst = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    need(worst <= 1e-10, f"a backward inside a backward makes gradients that differ by {worst:.1e}")
    return {"nested_backward_difference": worst}


def _apply(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _Again.apply(x, layer)  # type: ignore[no-any-return]


def _overlap(machine: Machine) -> dict[str, float]:
    """A matrix product on ``compute`` and copies on ``inter``, about equally long: what part of the shorter one
    vanishes where both are at work (1: all, 0: none)."""
    a, b = torch.randn(2, 8192, 8192, device=machine.device, dtype=torch.bfloat16)
    one, other = torch.zeros(2, 1 << 28, device=machine.device, dtype=torch.uint8)

    def products() -> None:
        for _ in range(5):
            torch.mm(a, b)

    count = max(1, round(machine.seconds(products, 3) / machine.seconds(lambda: other.copy_(one), 10)))

    def copies() -> None:
        for _ in range(count):
            other.copy_(one)

    took = {}
    with executor(machine.device) as lanes:
        for name, works in {"product": (products, None), "copies": (None, copies), "both": (products, copies)}.items():
            plan = Plan()
            plan.add("product", COMPUTE, run=works[0])
            plan.add("copies", INTER, run=works[1])
            totals = [float(lanes.run(plan).total_s) for _ in range(5)]
            took[name] = float(np.median(totals))
    hidden = took["product"] + took["copies"] - took["both"]
    return {f"{name}_s": value for name, value in took.items()} | {
        "hidden_share": hidden / min(took["product"], took["copies"])
    }


# ---------------------------------------------------------------------- sanitizer


def sanitizer(machine: Machine) -> dict[str, Any]:
    """torch's own watch over streams, during training steps: it reports accesses that nothing orders."""
    machine.only_real("torch.cuda._sanitizer needs the hooks of a CUDA build; tests/cuda watches instead")
    job = machine.job
    torch.cuda._sanitizer.enable_cuda_sanitizer()
    systems = ["flat", "hecate", "fsmoe"]
    for name in systems:
        row = checks.check_training(job, name, {}, num_steps=1)
        need(row["status"] in ("ok", "refused"), f"{name}: {row['reason']}")
    return {"systems": systems}


__all__ = ["executor_", "memory", "sanitizer"]
