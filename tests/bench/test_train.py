from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness import presets, registry
from harness.bench import losses, train, training_check
from harness.comm.job import Job
from harness.launch.session import Session
from harness.plan import gradients, training
from harness.plan.graph import Work
from harness.specs import Experiment

#: layers without experts, shared experts, heads that do not make up the hidden size
MODEL = {
    **{"num_layers": 5, "num_dense_layers": 1, "moe_every": 2, "dense_ffn": 48, "head_dim": 24},
    **{"num_shared_experts": 2, "shared_ffn": 40, "ffn_type": "swiglu"},
}


def loss_gate(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """On a rank: the loss check, with the named step of the training left out."""
    experiment = Experiment.model_validate(payload["experiment"])
    give_back, take = gradients.Stream.give_back, gradients.Stream.take
    inside: list[train.Trainer] = []

    class Watched(train.Trainer):
        def __init__(self, *given: Any):
            super().__init__(*given)
            inside.append(self)

    def without_experts(stream: gradients.Stream) -> None:
        give_back(stream)
        for steered in inside[0].training.steered:
            for parameter in steered.layer.experts.parameters():  # type: ignore[union-attr, operator]
                parameter.grad = torch.zeros_like(parameter)

    def without_run(*given: Any, **named: Any) -> Work | None:
        work = take(*given, **named)
        return work and Work(work.cost)

    def without_shared(stream: gradients.Stream) -> None:
        give_back(stream)
        for steered in inside[0].training.steered:
            for parameter in steered.layer.shared.parameters():  # type: ignore[union-attr, operator]
                parameter.grad = torch.zeros_like(parameter)

    left_out: dict[str, tuple[Any, str, Any]] = {
        "sum": (training, "sum_over", lambda *_: None),
        "attention": (gradients.Stream, "take", without_run),
        "experts": (gradients.Stream, "give_back", without_experts),
        "shared": (gradients.Stream, "give_back", without_shared),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_check, "Trainer", Watched)
        if payload["without"]:
            patch.setattr(*left_out[payload["without"]])
        found = {"status": "ok", "reason": "", "errors": {}}
        return training_check.gate_case(job, registry.system(experiment.system), experiment, found)


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
@pytest.mark.parametrize("without", ["", "sum", "attention", "experts"])
def test_losses_must_be_the_oracles(session: Callable[[str], Session], generator: str, without: str) -> None:
    payload = {"experiment": flat_training(generator), "without": without}
    for row in session("local-2").call("tests.bench.test_train:loss_gate", payload):
        assert row["status"] == ("nonconforming" if without else "ok"), row
        assert row["errors"]["loss"] < (1e-2 if without else 1e-5)


@pytest.mark.parametrize("without", ["", "sum", "attention", "shared"])
@pytest.mark.parametrize("overlap", [False, True])
def test_losses_with_dense_layers_and_shared_experts_must_be_the_oracles(
    session: Callable[[str], Session], overlap: bool, without: str
) -> None:
    payload = {"experiment": flat_training("uniform", **MODEL), "without": without}
    payload["experiment"]["options"] = {"overlap_shared": overlap}
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


#: dtype, routing, step, how far off its loss is, whether it is a right system's: as measured (``losses.NATURAL``)
OFF = [
    ("float32", "natural", 3, 4e-5, True),
    ("float32", "natural", 5, 3.4e-4, True),
    ("float32", "natural", 1, 3.7e-3, False),  # gradients that are not summed
    ("float32", "natural", 3, 2.4e-3, False),
    ("float32", "natural", 1, 2.3e-3, False),  # experts without gradients
    ("bfloat16", "natural", 1, 4e-3, True),
    ("bfloat16", "natural", 2, 6.2e-3, True),
    ("bfloat16", "natural", 3, 5.1e-2, True),  # by then rounding has sent tokens elsewhere
    ("bfloat16", "natural", 1, 2.2e-2, False),  # attention that is not summed
    ("bfloat16", "natural", 2, 2.5e-2, False),
    ("bfloat16", "natural", 4, 0.3, False),
    ("bfloat16", "uniform", 3, 2e-3, True),
    ("bfloat16", "uniform", 3, 5.1e-2, False),
    ("bfloat16", "natural", 4, float("nan"), False),
]


@pytest.mark.parametrize(("dtype", "generator", "step", "off", "right"), OFF)
def test_losses_of_a_race_may_differ_as_rounding_makes_them(
    dtype: str, generator: str, step: int, off: float, right: bool
) -> None:
    training = flat_training(generator)
    training["workload"]["tokens_per_rank"], training["dtype"] = 96, dtype
    found = losses._against(Experiment.model_validate(training), {step: 4 * (1 + off)}, {step: 4.0}, "the oracle's")
    assert (not found.reason) is right, found


def test_a_gradient_in_another_order_than_its_parameter_is_named():
    """A fused optimizer would take its numbers for others."""
    layer = torch.nn.Linear(3, 4)
    layer.weight.grad = torch.ones(3, 4).t()
    layer.bias.grad = torch.ones(4)
    assert "weight lies with strides (1, 4), not (3, 1)" in training_check._laid_out(layer)
    layer.weight.grad = layer.weight.grad.contiguous()
    assert not training_check._laid_out(layer)


def test_a_trial_draws_from_as_many_letters_whatever_the_model_has():
    """Of two letters the loss becomes so small that what rounding does to it is called a fault."""
    experiment = Experiment.model_validate(flat_training("natural", vocab=2))
    assert experiment.model.vocab == 2
    assert training_check.reduced(experiment).model.vocab == 256
