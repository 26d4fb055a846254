"""What a step held is gone with it, without the garbage collector, which stands still while times are taken."""

from __future__ import annotations

import gc
import time
from typing import Any

import pytest
import torch

from harness.bench import train
from harness.comm.job import Job
from harness.layer.weights import Weights
from harness.registry import system
from harness.specs import Experiment
from tests.baselines import recorded
from tests.methods.test_fsmoe_training import training
from tests.methods.test_hiermoe import cluster

LARGE = 400  # elements: a rank's tokens of a step


def held(job: Job, payload: dict[str, Any]) -> list[int]:
    """Number of large tensors after each of a few steps."""
    if "experiment" in payload:
        experiment = Experiment.model_validate(payload["experiment"])
        trainer = train.Trainer(job, system(experiment.system), experiment)

        def step() -> None:
            trainer._update(trainer.training.prepare(0))
    else:
        case = recorded.make_case(job.topology, model={"hidden": 64}, tokens=64, options=payload["options"])
        layer = system(payload["system"]).build(case, job, Weights(case.model, case.dtype))
        x = torch.randn(64, 64).requires_grad_()

        def step() -> None:
            layer(x).sum().backward()

    step()
    gc.collect()
    gc.disable()
    try:
        found = []
        for _ in range(4):
            step()
            found.append(settled(found[0] if found else 0))
        return found
    finally:
        gc.enable()


def settled(wanted: int) -> int:
    """Number of large tensors; a transport's thread may let go of what it has sent a moment after the step."""
    deadline = time.monotonic() + 1.0
    while True:
        num = sum(type(o) is torch.Tensor and o.numel() >= LARGE for o in gc.get_objects())
        if num == wanted or time.monotonic() > deadline:
            return num
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["flat", pytest.param("hiermoe-hd2", marks=pytest.mark.long), "fsmoe"])
def test_layers_hold_no_more_after_many_steps(session, name):
    options = {"degree_forward": 2, "degree_backward": 2} if name == "fsmoe" else {}
    for found in session(cluster((2, 2))).call("tests.plan.test_memory:held", {"system": name, "options": options}):
        assert len(set(found)) == 1, found


@pytest.mark.parametrize("name", ["flat", "fsmoe"])
def test_training_steps_hold_no_more_after_many(session, name):
    payload = training(name, cluster((2, 2)), model_parallel=name == "fsmoe")
    for found in session(cluster((2, 2))).call("tests.plan.test_memory:held", payload):
        assert len(set(found)) == 1, found
