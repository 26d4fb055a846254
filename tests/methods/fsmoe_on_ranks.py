"""What every rank does in the tests of FSMoE's layer."""

from __future__ import annotations

from typing import Any

import torch

from harness.bench import conformance, train, training_check
from harness.bench.trials import BASE, TRIALS
from harness.comm.job import Job
from harness.layer.weights import Weights
from harness.registry import system
from harness.routing import planned_routing
from harness.specs import Experiment, Workload
from methods.fsmoe.hooks import Hooks
from tests.baselines import recorded

GATES = {name: trial for name, trial in TRIALS.items() if "gate" in trial.model}


def every_cut(job: Job, payload: dict[str, Any]) -> list[str]:
    """All pairs of ``degrees`` in float64 with gradients in flight; returns what does not equal the oracle."""
    wrong = []
    chosen = system(payload["system"])
    trials = GATES if payload.get("gates") else {"uniform": TRIALS["uniform"]}
    for name, trial in trials.items():
        model = BASE.model_copy(update=trial.model)
        tokens = (11, 16, 5, 9, 16, 0, 13, 2)[: job.num_ranks]
        workload = Workload(name=name, tokens_per_rank=tokens, generator=trial.generator, params=trial.params)
        routing = planned_routing(workload, model, job.topology)
        for forward in payload["degrees"]:
            for backward in payload["degrees"]:
                options = {"degree_forward": forward, "degree_backward": backward, "gradient_bytes": 4096}
                options |= payload.get("options", {})
                row = conformance.compare(job, chosen, model, "float64", routing, options=options)
                if row["status"] != "ok":
                    wrong.append(f"{name} {forward} {backward}: {row['reason']}")
    return wrong


def gradients_in_flight(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """One step of a layer with gradients to reduce: were they, and when."""
    case = recorded.make_case(job.topology, options=payload["options"], model={"hidden": 64}, tokens=64)
    layer: Any = system("fsmoe").build(case, job, Weights(case.model, case.dtype))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(job.rank)).requires_grad_()
    y = layer(x)
    layer.stream.buffer.fill_(job.rank)
    y.sum().backward()
    timeline = layer.timelines["backward"]
    degree = payload["options"]["degree_backward"]
    others = job.topology.rail(job.rank, 0)
    return {
        "reduced": bool((layer.stream.buffer == sum(others)).all()),
        "elements": layer.stream.buffer.numel(),
        "after_dispatch": timeline.of("backward.gradients")[0] >= timeline.of(f"backward.dispatch[{degree - 1}]")[1],
        "before_combine": timeline.of("backward.gradients")[1] <= timeline.of("backward.combine[0]")[0],
        "forward_chunks": sum(task.kind == "experts" for task in layer.timelines["forward"].plan.tasks),
    }


class Compress(Hooks):
    """Cross the links in ``wire`` and compute in ``dtype``."""

    def __init__(self, dtype: torch.dtype, wire: torch.dtype = torch.bfloat16):
        self.dtype, self.wire = dtype, wire

    def before_dispatch(self, parts: torch.Tensor) -> torch.Tensor:
        return parts.to(self.wire)

    def after_dispatch(self, parts: torch.Tensor) -> torch.Tensor:
        return parts.to(self.dtype)

    before_combine, after_combine = before_dispatch, after_dispatch


class Noted(Hooks):
    """Scales tokens by 2 on the way in and by 0.5 on the way out, sends bfloat16, and notes where it was called."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.compress = Compress(torch.float32)

    def before_moe_start(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append("start")
        return 2 * x

    def before_dispatch(self, parts: torch.Tensor) -> torch.Tensor:
        self.seen.append("dispatch")
        return self.compress.before_dispatch(parts)

    def after_dispatch(self, parts: torch.Tensor) -> torch.Tensor:
        assert parts.dtype == torch.bfloat16
        return self.compress.after_dispatch(parts)

    def before_combine(self, parts: torch.Tensor) -> torch.Tensor:
        self.seen.append("combine")
        return self.compress.before_combine(parts)

    after_combine = after_dispatch

    def before_moe_end(self, y: torch.Tensor) -> torch.Tensor:
        self.seen.append("end")
        return 0.5 * y


def hooked(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """A layer with and without hooks on inputs that differ by what the hooks undo."""
    options = {"degree_forward": 2, "degree_backward": 1}
    case = recorded.make_case(job.topology, options=options, model={"hidden": 64}, tokens=32)
    generator = torch.Generator().manual_seed(job.rank)
    x = torch.randn(32, 64, generator=generator)
    found = []
    hooks = Noted()
    for given, scale in ((hooks, 1.0), (Hooks(), 2.0)):
        layer: Any = system("fsmoe").build(case, job, Weights(case.model, case.dtype))
        layer.exchange_.hooks = given
        inner = (x * scale).requires_grad_()
        y = layer(inner)
        y.sum().backward()
        found.append((y.detach(), inner.grad))
    (y, dx), (plain_y, plain_dx) = found
    return {
        "output": float((y - 0.5 * plain_y).abs().max() / plain_y.abs().max()),
        "gradient": float((dx - plain_dx).abs().max() / plain_dx.abs().max()),  # times 2 in, times 0.5 out
        "seen": hooks.seen,
    }


def trained(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Ten training steps: how far the losses are from the oracle's, and which slices went between which tasks."""
    experiment = Experiment.model_validate(payload["experiment"])
    trainer = train.Trainer(job, system(experiment.system), experiment)
    losses = [trainer._job_loss(trainer._update(trainer.training.prepare(step))) for step in range(10)]
    wanted = (
        training_check.oracle_losses(experiment, system(experiment.system), job.topology, 10)
        if job.rank == 0
        else losses
    )
    timeline = trainer.timelines()["step"]
    slices = {
        task.name: int(task.cost.num_bytes)
        for task in timeline.plan.tasks
        if task.kind == "gradients" and task.cost is not None
    }
    first = {task.name.removesuffix("[0]"): task.name for task in timeline.plan.tasks}  # chunks, if there are some
    early = [
        timeline.of(name)[0] < timeline.of(first[f"{name.removesuffix('.gradients')}.combine"])[0]
        for name in slices
        if name.endswith("backward.gradients")
    ]
    return {
        "error": max(abs(a - b) / b for a, b in zip(losses, wanted, strict=True)),
        "losses": losses,
        "slices": slices,
        "part_bytes": trainer.stream.part_bytes,
        "before_combine": all(early),
        "lanes": sorted({task.lane for task in timeline.plan.tasks}),
        "degrees": [layer.cut.backward for layer in trainer.layers],
    }


def gated(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """The loss check that comes before every race."""
    experiment = Experiment.model_validate(payload["experiment"])
    found: dict[str, Any] = {"status": "ok", "reason": "", "errors": {}}
    return training_check.gate_case(job, system(experiment.system), experiment, found)
