"""float16 in training steps: loss scaling as torch.amp's, float32 weights behind the parameters, overflows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from harness.bench import adam, losses, train
from harness.bench.adam import ScaledAdamW, adamw
from harness.comm.job import Job
from harness.registry import system
from harness.specs import Experiment
from tests.bench.test_train import flat_training


def parameters(num: int = 3) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(7, 5, generator=generator) / 50 for _ in range(num)]
    return [torch.nn.Parameter(each.to(torch.float16 if i else torch.float32)) for i, each in enumerate(drawn)]


def test_scale_changes_as_torchs(monkeypatch):
    monkeypatch.setattr(adam, "GROWTH_STEPS", 3)
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    own = ScaledAdamW([parameter], "dynamic")
    other = torch.nn.Parameter(torch.ones(4))
    sgd, theirs = torch.optim.SGD([other]), torch.amp.GradScaler("cpu", growth_interval=3)
    for overflows in (True, True, False, False, False, False, True, False, False, False, False):
        value = torch.inf if overflows else 1.0
        theirs.scale((other * value).sum()).backward()
        theirs.step(sgd)
        theirs.update()
        sgd.zero_grad()
        parameter.grad = torch.full_like(parameter, value)
        own.step()
        assert own.skipped == overflows
        assert own.scale == theirs.get_scale()


def test_parameters_are_the_rounded_ones_of_a_training_in_float32():
    held, scale = parameters(), 2.0**10
    wide = [torch.nn.Parameter(p.detach().float()) for p in held]
    own, plain = adamw(held, int(scale)), adamw(wide)
    assert isinstance(own, ScaledAdamW)
    assert not isinstance(plain, ScaledAdamW)
    for step in range(20):
        for narrow, other in zip(held, wide, strict=True):
            gradient = torch.randn(narrow.shape, generator=torch.Generator().manual_seed(step)) * 1e-6
            narrow.grad = (gradient * scale).to(narrow.dtype)
            other.grad = narrow.grad.float() / scale
        if step == 10:  # as from a checkpoint
            saved = copy.deepcopy(own.state_dict())
            own = adamw(held, 2)
            own.load_state_dict(saved)
            assert own.scale == scale
        own.step()
        plain.step()
        for narrow, other in zip(held, wide, strict=True):
            assert torch.equal(narrow, other.to(narrow.dtype))
    assert own.state[held[1]]["exp_avg_sq"].dtype == torch.float32
    held[1].data.neg_()  # somebody else's numbers
    before = held[1].detach().clone()
    held[0].grad = held[2].grad = None
    held[1].grad = torch.zeros_like(held[1])
    own.step()
    assert (held[1] - before).abs().max() < 2 * adam.LEARNING_RATE


@pytest.mark.parametrize(("scale", "num_skipped"), [(1024, 0), ("dynamic", 16)])
def test_a_scale_at_which_gradients_overflow_is_told(scale, num_skipped):
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = adamw([parameter], scale)
    parameter.grad = torch.full_like(parameter, torch.nan)
    for _ in range(num_skipped):
        optimizer.step()
    with pytest.raises(OverflowError, match=r"^loss_scale: .*give a smaller one, or dynamic$"):
        optimizer.step()


def trained(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """Warm-up and a timed step, compared with the truth, as in a race."""
    experiment = Experiment.model_validate(payload["experiment"])
    with pytest.MonkeyPatch.context() as patch:
        if payload.get("unscaled"):
            patch.setattr(ScaledAdamW, "scale", property(lambda self: 1.0))
        patch.setattr(adam, "FIRST_SCALE", payload.get("first", adam.FIRST_SCALE))
        trainer = train.Trainer(job, system(experiment.system), experiment)
        for _ in range(2):
            trainer.warm_up()
        verdict = trainer.check()
        verdict += losses.check(job, [(experiment, trainer)])[experiment.digest]
    found = {"reason": verdict.reason, "errors": verdict.errors, "skipped": sorted(trainer.skipped)}
    return found | {"scale": trainer.training.optimizer.scale}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "scale"), [("flat", "dynamic"), ("flat", 256), ("hecate", "dynamic"), ("smartmoe", "dynamic")]
)
def test_a_training_in_float16_is_the_oracles(session, name, scale):
    experiment = flat_training("uniform") | {"dtype": "float16", "system": name, "loss_scale": scale}
    if name == "smartmoe":
        experiment["options"] = {"place_every": 1}
    for found in session("local-2").call("tests.bench.test_adam:trained", {"experiment": experiment}):
        assert not found["reason"], found
        assert found["errors"]["loss"] < 2.5e-4
        assert found["scale"] == (256 if scale == 256 else adam.FIRST_SCALE / 2 ** len(found["skipped"]))
        assert scale == "dynamic" or not found["skipped"]


def test_steps_that_overflow_are_skipped_by_all_ranks_and_by_the_oracle(session):
    payload = {"experiment": flat_training("uniform") | {"dtype": "float16", "system": "smartmoe"}, "first": 2.0**26}
    for found in session("local-2").call("tests.bench.test_adam:trained", payload):
        assert found["skipped"] == list(range(len(found["skipped"])))
        assert 2 < len(found["skipped"]) < 12
        assert found["scale"] == 2.0 ** (26 - len(found["skipped"]))
        assert not found["reason"], found


@pytest.mark.parametrize("without", ["", "sum", "experts"])
def test_losses_in_float16_must_be_the_oracles(session, without):
    payload = {"experiment": flat_training("uniform") | {"dtype": "float16"}, "without": without}
    for row in session("local-2").call("tests.bench.test_train:loss_gate", payload):
        assert row["status"] == ("nonconforming" if without else "ok"), row


def test_gradients_of_a_loss_that_was_not_scaled_are_found(session):
    payload = {"experiment": flat_training("uniform") | {"dtype": "float16", "loss_scale": 1024}, "unscaled": True}
    (found, *_) = session("local-2").call("tests.bench.test_adam:trained", payload)
    assert "are not what AdamW makes of its gradient" in found["reason"] or "off by" in found["reason"]
