"""The step that one rank of many would run, laid out beside its priced twin.

    python -m tests.plan.contract RANKS OUT LAYOUT

Torch's fake process group stands for the other ranks: nothing that is laid out runs. Where an earlier batch decides,
both are told of the same one. Writes, system by system and phase by phase, what differs in names, lanes and waits, and
which kinds of task there were, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness import registry
from harness.bench.serve import Server
from harness.bench.train import Trainer
from harness.case import case_of, cases_of, no_layout, system_of
from harness.comm.job import Job
from harness.layer.weights import Weights
from harness.plan.graph import Plan
from harness.plan.passage import passage, plan_alone
from harness.plan.serving import ServingStep
from harness.plan.slots import OVERLAP
from harness.routing.certificate import expert_counts
from harness.simulation import layer_plans, serving_plan, training_plan
from harness.specs import Cluster, Experiment, Model, Workload, with_levels
from harness.system import Case, Gradients, MoELayer, System
from harness.topology import Topology

SHAPES = {8: (2, 4), 64: (8, 8), 12: (2, 3, 2)}
SMALL = 12  # ranks up to which variants are tried too
PHASES = ("exchange", "layer", "train_step", "prefill", "decode")
#: options of systems that decide something only then
OPTIONS: dict[str, dict[str, Any]] = {"fastermoe": {"shadows": 3}}
#: recipes beside the systems that have names of their own
COMPOSED = (
    "hiermoe-hd2+fsmoe+hecate",
    "hiermoe-hd+fsmoe+hecate+smartmoe",
    "hiermoe-hd2+pipelined+eplb",
    "hiermoe-hd2+fsmoe-lina+fastermoe",
    "hiermoe-hd+fsmoe+hiermoe",
    "flat+fsmoe+fsdp-experts+two-stage",
)


def tried() -> list[type[System]]:
    return [*registry.systems().values(), *map(registry.system, COMPOSED)]


class Laid(Exception):
    """Holds the plan that would run now."""

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan


def keep(plan: Plan) -> Any:
    raise Laid(plan)


class Package(MoELayer):
    """In the place of a real package's layer, which is one task whatever it does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gradients(self) -> Gradients:
        return Gradients({}, {})

    def shared_parameters(self) -> list[torch.nn.Parameter]:
        return []


#: of a model with shared experts, and layers without any
WITH_DENSE = {"num_layers": 5, "num_dense_layers": 1, "moe_every": 2, "dense_ffn": 40, "num_shared_experts": 2}


def experiment_of(
    system: str,
    phase: str,
    shape: Sequence[int],
    options: dict[str, Any],
    changes: dict[str, Any],
    layout: dict[str, Any] | None = None,
) -> Experiment:
    num_ranks = Topology(tuple(shape)).num_ranks
    levels = [{"name": f"level{i}", "size": size, "bandwidth_bytes_per_s": 1e9} for i, size in enumerate(shape)]
    cluster: Cluster = with_levels("fake", levels, kind="physical", device_flops_per_s=1e12)
    model = Model(
        name="small",
        num_layers=2,
        hidden=32,
        ffn=48,
        num_experts=max(16, num_ranks),
        top_k=2,
        num_heads=4,
        seq=8,
        vocab=64,
    ).model_copy(update=changes)
    workload = Workload(name="skewed", generator="zipf", params={"target": min(8, num_ranks)}, tokens_per_rank=16)
    return Experiment(
        model=model,
        cluster=cluster,
        workload=workload,
        system=system,
        phase=phase,  # type: ignore[arg-type]
        dtype="float32",
        backward=phase not in ("prefill", "decode"),
        options=options,
        layout=layout or {},
    )


def variants(system: type[System]) -> Iterator[dict[str, Any]]:
    """As it comes, cut into chunks, and in its own variants."""
    yield OPTIONS.get(system.name, {})
    yield from filter(None, [dict(system.chunked), *map(dict, system.variants.values())])


def executed(job: Job, system: type[System], experiment: Experiment) -> dict[str, Plan]:
    """As one rank would run it, behind a batch of the same routing."""
    if experiment.phase in ("exchange", "layer"):
        case = case_of(experiment)
        layer = system.build(case, job, Weights(case.model, case.dtype))
        seen(layer, case)
        way = passage(layer)
        way.turns = True
        return {direction: plan_alone(way, direction) for direction in ("forward", "backward")}  # type: ignore[arg-type]
    plan: Plan
    if experiment.phase == "train_step":
        trainer = Trainer(job, system, experiment)
        for layer, case in zip(trainer.layers, cases_of(experiment), strict=True):
            seen(layer, case)
        try:
            trainer._update(trainer.training.prepare(0), run=keep)
        except Laid as laid:
            plan = laid.plan
        return {"step": plan}
    server = Server(job, system, experiment)
    for layer, case in zip(server.layers, cases_of(experiment), strict=True):
        seen(layer, case)
    passages = [passage(layer) for layer in server.layers]
    steers = [steered.steer for steered in server.steered]
    step = ServingStep(server.gpt, passages, steers, None, server.attention_s, server.group)
    return {"pass": step.plan(server.tokens)}


def seen(layer: MoELayer, case: Case) -> None:
    policy = getattr(layer, "policy", None)
    if hasattr(policy, "saw"):
        policy.saw(expert_counts(case.of_rank(0).routing))


def priced(experiment: Experiment) -> dict[str, Plan]:
    if experiment.phase in ("exchange", "layer"):
        return layer_plans(experiment, seen=1)
    if experiment.phase == "train_step":
        return {"step": training_plan(experiment, seen=1)}
    return {"pass": serving_plan(experiment, seen=1)}


def tasks(plan: Plan) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(task.name, task.lane, tuple(sorted(task.after))) for task in plan.tasks]


def difference(ran: Plan, of_price: Plan) -> str:
    """The first task in which they differ; empty if they do not."""
    pairs = list(zip(tasks(ran), tasks(of_price), strict=False))
    for left, right in pairs:
        if left != right:
            return f"executed {left}, priced {right}"
    more = tasks(ran)[len(pairs) :] or tasks(of_price)[len(pairs) :]
    return f"{len(ran.tasks)} tasks executed, {len(of_price.tasks)} priced: {more[0]}" if more else ""


@contextlib.contextmanager
def packages_unbuilt(system: type[System]) -> Iterator[None]:
    if system.kind != "package":
        yield
        return
    build = system.__dict__.get("build")
    system.build = classmethod(lambda cls, case, job, weights: Package())  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        if build is None:
            del system.build
        else:
            system.build = build  # type: ignore[method-assign]


def compare(
    job: Job,
    system: type[System],
    phase: str,
    options: dict[str, Any],
    changes: dict[str, Any],
    layout: dict[str, Any],
) -> dict[str, Any]:
    experiment = experiment_of(system.name, phase, job.topology.shape, options, changes, layout)
    row: dict[str, Any] = {"system": system.name, "phase": phase, "options": options, "refused": "", "differs": {}}
    row["dense"] = bool(changes)
    if reason := no_layout(experiment) or system_of(experiment).refuse(case_of(experiment)):
        return row | {"refused": reason}
    with packages_unbuilt(system):
        ran = executed(job, system_of(experiment), experiment)
    found = priced(experiment)
    row["kinds"] = sorted({task.kind for plan in ran.values() for task in plan.tasks})
    row["chunks"] = max(task.name.count("[1]") for plan in ran.values() for task in plan.tasks)
    row["unpriced"] = sorted(
        {task.kind for plan in found.values() for task in plan.tasks if task.cost is None and task.lane != "compute"}
    )
    names = ran.keys() | found.keys()
    row["differs"] = {
        name: text for name in sorted(names) if (text := difference(ran.get(name, Plan()), found.get(name, Plan())))
    }
    return row


def cells(system: type[System], whole: bool) -> Iterator[tuple[dict[str, Any], dict[str, Any], Sequence[str]]]:
    """Options, changes to the model, phases."""
    first, *others = variants(system)
    yield first, {}, PHASES
    if not whole:
        return
    for options in others:
        yield options, {}, ("layer", "train_step")
    yield first, WITH_DENSE, ("train_step", "prefill")
    if OVERLAP in system.options:
        yield {**first, OVERLAP: True}, WITH_DENSE, ("train_step",)


def main(num_ranks: int, out: Path, layout: dict[str, Any], progress: Callable[[str], None] = print) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
    job, rows = Job(Topology(SHAPES[num_ranks])), []
    for system in tried():
        for options, changes, phases in cells(system, num_ranks <= SMALL and not layout):
            for phase in phases:
                try:
                    rows.append(compare(job, system, phase, options, changes, layout))
                except Exception as error:
                    differs = {"": f"{type(error).__name__}: {error}"}
                    rows.append({"system": system.name, "phase": phase, "options": options, "differs": differs})
        progress(system.name)
    out.write_text(json.dumps(rows, default=str))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
