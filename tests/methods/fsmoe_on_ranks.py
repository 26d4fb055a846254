"""What every rank does in the tests of FSMoE's layer."""

from __future__ import annotations

from typing import Any

import torch

from harness.bench import conformance
from harness.comm.job import Job
from harness.layer.weights import Weights
from harness.registry import system
from harness.routing import planned_routing
from harness.specs import Workload
from tests.baselines import recorded

GATES = {name: trial for name, trial in conformance.TRIALS.items() if "gate" in trial.model}


def every_cut(job: Job, payload: dict[str, Any]) -> list[str]:
    """All pairs of ``degrees`` in float64 with gradients in flight; returns what does not equal the oracle."""
    wrong = []
    chosen = system(payload["system"])
    trials = GATES if payload.get("gates") else {"uniform": conformance.TRIALS["uniform"]}
    for name, trial in trials.items():
        model = conformance.BASE.model_copy(update=trial.model)
        tokens = (11, 16, 5, 9, 16, 0, 13, 2)[: job.num_ranks]
        workload = Workload(name=name, tokens_per_rank=tokens, generator=trial.generator, params=trial.params)
        routing = planned_routing(workload, model, job.topology)
        for forward in payload["degrees"]:
            for backward in payload["degrees"]:
                options = {"degree_forward": forward, "degree_backward": backward, "gradient_bytes": 4096}
                row = conformance.compare(job, chosen, model, "float64", routing, options=options)
                if row["status"] != "ok":
                    wrong.append(f"{name} {forward} {backward}: {row['reason']}")
    return wrong


def gradients_in_flight(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """One step of a layer with gradients to reduce: were they, and when."""
    case = recorded.make_case(job.topology, options=payload["options"], model={"hidden": 64}, tokens=64)
    layer: Any = system("fsmoe").build(case, job, Weights(case.model, case.dtype))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(job.rank)).requires_grad_()
    layer(x).sum().backward()
    timeline = layer.timelines["backward"]
    degree = payload["options"]["degree_backward"]
    others = job.topology.rail(job.rank, 0)
    return {
        "reduced": bool((layer.reduced[0] == sum(others) / len(others)).all()),
        "elements": layer.reduced[0].numel(),
        "after_dispatch": timeline.of("backward.gradients")[0] >= timeline.of(f"backward.dispatch[{degree - 1}]")[1],
        "before_combine": timeline.of("backward.gradients")[1] <= timeline.of("backward.combine[0]")[0],
        "forward_chunks": sum(task.kind == "experts" for task in layer.timelines["forward"].plan.tasks),
    }
