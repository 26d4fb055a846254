from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness import presets, registry
from harness.bench import train
from harness.comm.job import Job
from harness.launch.session import Session
from harness.specs import Experiment


def loss_gate(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """On a rank: the loss check, with the named step of the training left out."""
    whole, experiment = train.Trainer._sum_gradients, Experiment.model_validate(payload["experiment"])

    def without_experts(trainer: train.Trainer) -> None:
        whole(trainer)
        for steered in trainer.training.steered:
            for parameter in steered.layer.experts.parameters():  # type: ignore[union-attr, operator]
                parameter.grad = torch.zeros_like(parameter)

    left_out = {"": whole, "sum": lambda trainer: None, "experts": without_experts}[payload["without"]]
    train.Trainer._sum_gradients = left_out  # type: ignore[method-assign]
    try:
        found = {"status": "ok", "reason": "", "errors": {}}
        return train.gate_case(job, registry.system(experiment.system), experiment, found)
    finally:
        train.Trainer._sum_gradients = whole  # type: ignore[method-assign]


def flat_training(generator: str, **model: Any) -> dict[str, Any]:
    experiment = Experiment.parse(
        {
            "model": presets.model("gpt-tiny-moe").model_dump() | model,
            "cluster": presets.cluster("local-2"),
            "workload": {"name": "w", "tokens_per_rank": 64, "generator": generator},
            "system": "flat",
            "phase": "train_step",
            "dtype": "float32",
        },
        "test",
    )
    return experiment.model_dump(mode="json")


@pytest.mark.parametrize("generator", ["natural", "uniform"])
@pytest.mark.parametrize("without", ["", "sum", "experts"])
def test_losses_must_be_the_oracles(session: Callable[[str], Session], generator: str, without: str) -> None:
    payload = {"experiment": flat_training(generator), "without": without}
    for row in session("local-2").call("tests.bench.test_train:loss_gate", payload):
        assert row["status"] == ("nonconforming" if without else "ok"), row
        assert row["errors"]["loss"] < (1e-2 if without else 1e-5)


@pytest.mark.parametrize(
    "model",
    [{"gate": "xmoe"}, {"gate": "expert_choice", "capacity_factor": 1.5}, {"gate": "softmoe"}, {"gate_noise": True}],
    ids=str,
)
def test_gates_that_take_no_prescribed_routing_train_on_their_own(
    session: Callable[[str], Session], model: dict[str, Any]
) -> None:
    payload = {"experiment": flat_training("natural", **model), "without": ""}
    for row in session("local-2").call("tests.bench.test_train:loss_gate", payload):
        assert row["status"] == "ok", row
        assert row["errors"]["loss"] < 1e-5
