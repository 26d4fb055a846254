"""FSMoE's layers under pipeline parallelism (arXiv 2501.10714, section 6.4): GPipe over two halves of the nodes.

All micro-batches go forward through the stages, then all go back in the opposite order; gradients are accumulated, so
that they are reduced beside the last micro-batch's backward alone. A stage begins a micro-batch when it has done the
one before: the compute stream waits for a layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from harness.plan.cost import Cost, Hold
from harness.plan.graph import COMPUTE, INTER, LANES, Plan
from harness.plan.passage import backward_layer, forward_layer
from harness.plan.simulate import simulate
from harness.specs import Cluster, Model
from harness.system import GradientSlices
from methods.fsmoe import models
from methods.fsmoe.grid import ELEMENT_BYTES, Generalized, Layers
from methods.fsmoe.models import SCHEDULES, Slices
from methods.fsmoe.step import Policy, reduction


class Stage(Plan):
    """The lanes of one pipeline stage in a ``whole`` plan: what is added here goes there, names unchanged."""

    def __init__(self, whole: Plan, stage: int):
        super().__init__()
        self.whole, self.stage = whole, stage

    def add(
        self,
        name: str,
        lane: str,
        after: Iterable[str] = (),
        cost: Cost | None = None,
        run: Callable[[], None] | None = None,
        kind: str = "",
    ) -> str:
        return self.whole.add(name, f"{lane}@{self.stage}", after, cost, run, kind)


def gpipe_step(
    layer: Layers,
    policy: Policy,
    slices: Slices,
    *,
    layers_per_stage: int,
    num_micro_batches: int,
    num_stages: int,
    send_s: float,
    optimizer_s: float | None = None,
) -> Plan:
    """A step of ``num_stages`` stages of equal layers; ``slices`` place one stage's gradients. ``send_s``: a
    micro-batch's activations, or their gradients, from one stage to the next."""
    whole = Plan(tuple(f"{lane}@{stage}" for stage in range(num_stages) for lane in LANES))
    reduced = slices.as_slices(ELEMENT_BYTES)

    def sent(stage: int, micro: int, direction: str) -> str:
        return f"stage{stage}.micro{micro}.{direction}.send"

    def forward(lanes: Plan, prefix: str, done: list[str]) -> list[str]:
        way = Generalized(layer, policy, (slices.degree_forward, slices.degree_plain))
        for i in range(layers_per_stage):
            done = forward_layer(lanes, way.forward, way.dense("forward"), prefix=f"{prefix}layer{i}.", after=done)
        return done

    def backward(lanes: Plan, prefix: str, done: list[str], reduce: bool) -> list[str]:
        for back in range(layers_per_stage):
            degree = int(slices.degree_backward[back]) if reduce else slices.degree_plain
            way = Generalized(layer, policy, (slices.degree_forward, degree))
            of_layer = reduced[back] if reduce else GradientSlices()
            works = [
                reduction(*each) if each[0] else None
                for each in zip(of_layer.num_bytes, of_layer.messages, strict=True)
            ]
            done = backward_layer(
                lanes,
                way.backward,
                way.dense("backward"),
                in_moe=works[0],
                beside_dense=works[1],
                after_layer=works[2],
                prefix=f"{prefix}layer{layers_per_stage - 1 - back}.",
                after=done,
            )
        return done

    for stage in range(num_stages):
        lanes = Stage(whole, stage)
        done: list[str] = []
        for micro in range(num_micro_batches):
            before = [sent(stage - 1, micro, "forward")] if stage else []
            done = forward(lanes, f"stage{stage}.micro{micro}.", [*before, *done])
            if stage < num_stages - 1:
                lanes.add(sent(stage, micro, "forward"), INTER, done, Hold(send_s))
        for micro in reversed(range(num_micro_batches)):
            before = [sent(stage + 1, micro, "backward")] if stage < num_stages - 1 else []
            done = backward(lanes, f"stage{stage}.micro{micro}.", [*before, *done], micro == 0)
            if stage:
                lanes.add(sent(stage, micro, "backward"), INTER, done, Hold(send_s))
        left = layers_per_stage * int(layer.gradient_bytes) - sum(sum(each.num_bytes) for each in reduced)
        tail = reduction(left, slices.tail_chunks)
        done = [lanes.put(f"stage{stage}.gradients-tail", INTER, done, tail, "gradients")]
        if optimizer_s is not None:
            lanes.add(f"stage{stage}.optimizer", COMPUTE, done, Hold(optimizer_s * layers_per_stage))
    return whole


def pipeline_times(
    model: Model,
    cluster: Cluster,
    *,
    num_micro_batches: int,
    num_stages: int = 2,
    num_ranks: int | None = None,
    schedules: Iterable[str] = tuple(SCHEDULES),
) -> list[dict[str, Any]]:
    """Seconds of a step of ``num_micro_batches`` samples a node under each schedule.

    ``cluster`` is that of one stage. A rank sends its 1 / N_MP of the activations; the ranks of a node share its port.
    """
    width = cluster.levels[0].unit_bytes_per_s
    assert width is not None
    layers_per_stage = -(-model.num_layers // num_stages)
    send_s = model.seq * model.hidden * ELEMENT_BYTES / width
    rows = []
    for name in schedules:
        given = models.model_layer(model, cluster, num_ranks=num_ranks)
        layer, slices = models.prepare(name, given, layers_per_stage)
        plan = gpipe_step(
            layer,
            SCHEDULES[name],
            slices,
            layers_per_stage=layers_per_stage,
            num_micro_batches=num_micro_batches,
            num_stages=num_stages,
            send_s=send_s,
            optimizer_s=models.optimizer_s(model, cluster),
        )
        seconds = float(simulate(plan, given.machine()).total_s)
        rows.append({"model": model.name, "schedule": name, "step_s": seconds})
    return rows
