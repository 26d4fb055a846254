"""Memory of a training step on one rank, in parts: planned by arithmetic, and measured by counting bytes.

``parameters``, ``gradients`` (with the buffer in which the attentions' are summed) and ``optimizer`` are counted
tensor by tensor; ``materialised`` are copies of other ranks' experts, the most that a step holds at once;
``activations`` is what forward leaves for backward, copies excepted; ``peak`` is all that the step holds at its
fullest. Allocations are recorded over one untimed step whose tasks run one after another in the calling thread (the
recorder sees no other): with lanes side by side a little more or less may be held at once. Python's own memory, and
buffers of the transport, are not in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from harness.bench.timing import quiet
from harness.comm.exchange import FlatExchange
from harness.comm.replicas import nearest
from harness.memory import Rows, activation_bytes, expert_bytes, peak_bytes, state_bytes
from harness.plan.copies import meter_of
from harness.plan.graph import Plan, Timeline
from harness.plan.native import NativeLayer
from harness.plan.replicated import ReplicatedLayer
from harness.routing import make_routing
from harness.routing.certificate import expert_counts

if TYPE_CHECKING:
    from harness.bench.train import Trainer

_MARK = "moebench: forward is done"


@quiet()  # what an earlier trainer left in a circle would be counted as this one's, or as given back by its step
def measured(trainer: Trainer) -> dict[str, float]:
    """Collective: bytes of each of ``PARTS`` on this rank, over one more training step."""
    training, meter = trainer.training, meter_of(trainer.job.part(trainer.experiment.groups))
    training.optimizer.zero_grad(set_to_none=True)
    tokens = training.prepare(trainer.step)
    parameters = _bytes({id(p): p for p in training.gpt.parameters()}.values())
    buffer = _bytes([trainer.stream.buffer])
    meter.peak, copies_then = meter.now, 0

    def at_head(run: Callable[[], None]) -> Callable[[], None]:
        def marked() -> None:
            nonlocal copies_then
            copies_then = meter.now
            with torch.profiler.record_function(_MARK):
                run()

        return marked

    def serially(plan: Plan) -> Timeline:
        for i, task in enumerate(plan.tasks):
            if task.name == "head" and task.run is not None:
                plan.tasks[i] = dataclasses.replace(task, run=at_head(task.run))
            elif task.name == "after-step":  # nobody moves now
                plan.tasks[i] = dataclasses.replace(task, run=None)
        return trainer.lanes.run(plan, serial=True)

    before = parameters + buffer + _optimizer_bytes(training.optimizer)
    if trainer.job.device.type == "cuda":
        activations, most = _on_device(trainer, tokens, serially)
    else:
        activations, most = _recorded(trainer, tokens, serially)
    return {
        "parameters": parameters,
        "gradients": _bytes(p.grad for p in training.gpt.parameters() if p.grad is not None) + buffer,
        "optimizer": _optimizer_bytes(training.optimizer),
        "materialised": float(meter.peak),
        "activations": activations - copies_then,
        "peak": before + most,
    }


def _recorded(trainer: Trainer, tokens: torch.Tensor, run: Callable[[Plan], Timeline]) -> tuple[float, float]:
    """What a step has allocated and not given back when forward is done, and at the most."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profiler:
        trainer._update(tokens, run)
    now = most = then = 0.0
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
        elif event.name() == _MARK:
            then = now
    return then, most


def _on_device(trainer: Trainer, tokens: torch.Tensor, run: Callable[[Plan], Timeline]) -> tuple[float, float]:
    """The same from the device's allocator, which may hold other contenders too."""
    device, found = trainer.job.device, []
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    head = trainer.training.gpt.head
    handle = head.register_forward_pre_hook(lambda *_: found.append(torch.cuda.memory_allocated(device)))
    try:
        trainer._update(tokens, run)
    finally:
        handle.remove()
    return found[0] - before, float(torch.cuda.max_memory_allocated(device) - before)


def planned(trainer: Trainer) -> dict[str, float]:
    """By arithmetic, of the parts for which there is some: shapes and placements instead of tensors."""
    experiment, job = trainer.experiment, trainer.job
    layers = [layer for layer in trainer.layers if isinstance(layer, ReplicatedLayer)]
    each = expert_bytes(experiment.model, experiment.dtype)
    part = job.part(experiment.groups)
    placements = [layer.exchange_.placement for layer in trainer.layers if isinstance(layer, NativeLayer)]
    if len(placements) == len(trainer.layers):  # whole copies are as good as owned
        own = sum(len(placement.local(part.rank)) for placement in placements)
    else:
        own = experiment.model.num_moe_layers * experiment.model.num_experts // part.num_ranks
    found = state_bytes(experiment, job.topology, own)
    copies = [int((layer.hosts[:, part.rank] & (layer.placement.owner != part.rank)).sum()) for layer in layers]
    together = max if layers and layers[0].policy.rematerialises else sum
    found["materialised"] = float(each * together(copies)) if copies else 0.0
    if (activations := _planned_activations(trainer)) is not None:
        found["activations"] = activations
        found["peak"] = peak_bytes(experiment, trainer.training.tokens[job.rank], found)
    return found


def _planned_activations(trainer: Trainer) -> float | None:
    """Of the last step; None where its routing was not prescribed, or rows do not travel as they are."""
    experiment, job, tokens = trainer.experiment, trainer.job, trainer.training.tokens
    part, rows = job.part(experiment.groups), []
    for i, layer in enumerate(trainer.layers):
        exchange = getattr(layer, "exchange_", None)
        if not trainer.training.prescribed or not isinstance(exchange, FlatExchange):
            return None
        routing = make_routing(experiment.workload, experiment.model, job.topology, step=trainer.step - 1, layer=i)
        assert routing is not None
        counts = expert_counts(routing)[part.members]
        hosts = layer.hosts if isinstance(layer, ReplicatedLayer) else exchange.placement.hosts
        here = nearest(hosts, part.topology).rows(counts)[:, :, part.rank]
        rows.append(Rows(int(counts[part.rank].sum()), int(here.sum()), grouped=not layer.cut.whole))  # type: ignore[union-attr]
    return activation_bytes(experiment, tokens[job.rank], rows, job.device.type == "cuda")


def _bytes(tensors: Any) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Without the step counters, one number a parameter."""
    return _bytes(v for state in optimizer.state.values() for v in state.values() if getattr(v, "ndim", 0) > 0)
