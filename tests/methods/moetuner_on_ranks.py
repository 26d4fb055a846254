"""What every rank does in the tests of serving."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harness.bench import serve, serving_check
from harness.comm.job import Job
from harness.layer.experts import Experts
from harness.placement import Placement
from harness.registry import system
from harness.specs import Experiment


def logits(job: Job, payload: dict[str, Any]) -> list[np.ndarray]:
    """Of this rank's tokens under each of ``placements`` ([layers][ranks][experts] each; None: as the system plans)."""
    experiment, found = Experiment.model_validate(payload["experiment"]), []
    for given in payload["placements"]:
        placed = None if given is None else tuple(Placement.of_slots(layer) for layer in given)
        server = serve.Server(job, system(experiment.system), experiment, placed)
        found.append(server.logits().numpy())
        if given is not None:
            held = [layer.experts.local for layer in server.layers]
            assert held == [layer[job.rank] for layer in given]
    return found


def gate(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """The check before timing; ``broken``: experts that hold the weights of others."""
    experiment = Experiment.model_validate(payload["experiment"])
    found = {"status": "ok", "reason": "", "errors": {}}
    with pytest.MonkeyPatch.context() as patch:
        if payload["broken"]:
            made = Experts.__init__

            def wrong(self: Experts, weights: Any, local: list[int], device: Any = "cpu") -> None:
                made(self, weights, sorted(local), device)

            patch.setattr(Experts, "__init__", wrong)
        return serving_check.gate_case(job, system(experiment.system), experiment, found)


def parts(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """The parts of a pass, and the load of each expert as the gates chose."""
    experiment = Experiment.model_validate(payload["experiment"])
    server = serve.Server(job, system(experiment.system), experiment)
    server.warm_up()
    assert server.timeline is not None
    torch.set_grad_enabled(True)
    return {
        "parts": serve.parts_s(server.timeline, experiment.model.num_layers),
        "placed": [[placement.local(rank).tolist() for rank in range(job.num_ranks)] for placement in server.placed],
        "tasks": [task.name for task in server.timeline.plan.tasks],
    }
