"""The check must be able to fail: a system that is wrong in one place is found, and named where."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from baselines.flat import Flat
from harness import presets, registry
from harness.bench import conformance
from harness.bench.trials import BASE
from harness.case import case_of
from harness.comm.job import Job
from harness.plan.native import NativeLayer
from harness.routing import Routing
from harness.specs import Experiment
from harness.system import Gradients


def sabotage(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """On the ranks: flat with one fault, through the real check."""
    fault = payload["fault"]

    class Broken(Flat):
        @classmethod
        def build(cls, case: Any, job: Job, weights: Any) -> NativeLayer:
            layer = super().build(case, job, weights)
            if fault == "weights":
                with torch.no_grad():
                    layer.experts.w2[-1] *= 1 + 1e-7  # type: ignore[index]
            elif fault == "gradient":
                layer.experts.w1.register_hook(lambda grad: grad * (1 + 1e-7))  # type: ignore[union-attr]
            elif fault == "last token" and job.rank == 1:
                layer.register_forward_hook(lambda *given: given[-1] + 1e-3 * (torch.arange(24) == 23).view(24, 1))
            elif fault == "no gradient":
                whole = layer.gradients
                layer.gradients = lambda: _without(whole(), 3)  # type: ignore[method-assign]
            elif fault == "raises":
                raise RuntimeError("out of luck")
            return layer

    registry.systems()["flat"] = Broken
    try:
        return conformance.check_one(job, "flat", "uniform", "float64")
    finally:
        registry.systems()["flat"] = Flat


def _without(gradients: Gradients, expert: int) -> Gradients:
    gradients.experts.pop(expert, None)
    return gradients


NUMBER = r"-?\d\.\d{3,}e-?[+-]?\d\d"


@pytest.mark.parametrize(
    ("fault", "status", "where"),
    [
        ("none", "ok", ""),
        ("weights", "nonconforming", r"output off by .* \(experts (\d+, )?(7|15)[,)]"),
        (
            "gradient",
            "nonconforming",
            rf"weight_grad off by {NUMBER}, allowed 1.000e-10, at rank [01], w1 of expert \d+ \[\d+, \d+\]: {NUMBER} ",
        ),
        ("last token", "nonconforming", rf"output off by {NUMBER}, allowed {NUMBER}, at rank 1, token 23 of 24 \(exp"),
        ("no gradient", "nonconforming", "weight_grad off by inf, .* at no rank has gradients of experts 3$"),
        (
            "raises",
            "failed",
            r"rank [01] in '.*': RuntimeError: out of luck, at tests/bench/test_conformance.py:\d+ in",
        ),
    ],
)
def test_a_fault_of_1e_7_is_found(session, fault: str, status: str, where: str) -> None:
    rows = session("local-2").call("tests.bench.test_conformance:sabotage", {"fault": fault}, timeout_s=60)
    assert {row["status"] for row in rows} == {status}
    assert re.search(where, rows[0]["reason"]), rows[0]["reason"]
    assert rows[0]["reason"] == rows[1]["reason"]


def test_experts_that_do_not_divide_are_refused(session, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = session("local-2").call("tests.bench.test_conformance:odd_experts", {}, timeout_s=60)
    assert rows[0]["status"] == "refused"
    assert rows[0]["reason"] == "num_experts = 15 is not divisible by 2 ranks"


def odd_experts(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    model = BASE.model_copy(update={"num_experts": 15})
    routing = Routing(np.arange(16, dtype=np.int32).reshape(8, 2) % 15, (4, 4), 15)
    return conformance.compare(job, Flat, model, "float64", routing)


@pytest.mark.parametrize("gate", ["expert_choice", "softmoe"])
def test_a_gate_whose_experts_choose_races_whole_layers(session, gate: str) -> None:
    experiment = Experiment.parse(
        {
            "model": BASE.model_dump() | {"gate": gate},
            "cluster": presets.cluster("local-2"),
            "workload": {"name": "natural", "tokens_per_rank": 40, "generator": "natural"},
            "system": "flat",
            "phase": "layer",
            "dtype": "float32",
        },
        "test",
    )
    payload = {"experiments": [experiment.model_dump(mode="json")], "repeats": 1, "warmup": 1}
    for answer in session("local-2").call("harness.bench.race:run_race", payload, timeout_s=60):
        cell = answer["cells"][experiment.digest]
        assert cell["status"] == "ok", cell
        assert len(cell["samples"]) == 2
    planned = Flat.planned_bytes(case_of(experiment))
    assert (planned is None) == (gate == "expert_choice")
