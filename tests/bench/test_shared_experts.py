"""Shared experts at full shape: a fault in them is found, in layer and model; studies say what they leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baselines.flat import Flat
from harness import presets, registry
from harness.bench import race, suite
from harness.comm.job import Job
from harness.report import context
from harness.report.run import load
from harness.specs import Experiment
from harness.studies import left_out
from methods.hiermoe import studies
from methods.hiermoe.replay import RIVALS
from tests.bench.test_witness import experiments
from tests.report.synthetic_run import RunMaker

SHARED = {"num_shared_experts": 2, "shared_ffn": 24, "ffn_type": "swiglu", "gate": "softmax_topk"}
WIDE = 288  # of ``experiments``: trials before timing are narrower


def planted(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """On the ranks: a race of flat whose shared experts have one fault at full shape."""

    class Broken(Flat):
        @classmethod
        def build(cls, case: Any, job: Job, weights: Any) -> Any:
            layer = super().build(case, job, weights)
            if layer.shared is None or case.model.hidden != WIDE:
                return layer
            if payload["fault"] == "output":
                layer.shared.register_forward_hook(lambda *given: given[-1] * 1.01)
            elif payload["fault"] == "gradient":
                layer.shared.all.w3.register_hook(lambda gradient: gradient * 1.1)
            return layer

    registry.systems()["flat"] = Broken
    try:
        return race.run_race(job, payload)
    finally:
        registry.systems()["flat"] = Flat


@pytest.mark.parametrize("phase", ["layer", "train_step", "prefill"])
@pytest.mark.parametrize(
    ("fault", "words"), [("", ""), ("output", "output off by"), ("gradient", "of the shared experts' shared_w3")]
)
def test_a_fault_at_full_shape_is_found(session, phase: str, fault: str, words: str) -> None:
    if fault == "gradient" and phase == "prefill":
        return
    (cell,) = experiments(phase, ["flat"], **SHARED, num_dense_layers=1, dense_ffn=24)
    payload = {"experiments": [cell.model_dump(mode="json")], "repeats": 1, "warmup": 1, "fault": fault}
    for answer in session("local-2").call("tests.bench.test_shared_experts:planted", payload):
        (outcome,) = answer["cells"].values()
        assert outcome["status"] == ("nonconforming" if fault else "ok"), outcome["reason"]
        assert words in outcome["reason"]


def parsed(entry: dict[str, Any]) -> list[Experiment]:
    return suite.from_data({"name": "shared", "experiments": [entry]}, "shared").experiments


def test_studies_keep_them_and_say_what_they_leave_out(monkeypatch: pytest.MonkeyPatch):
    (note,) = left_out([presets.model("deepseek-v3-half"), presets.model("qwen3-30b-a3b")], "their time is left out")
    assert note == "Of deepseek-v3-half, shared experts (1 in each layer) have no part in this: their time is left out."
    monkeypatch.setattr(studies, "SKEWS", (1.0,))
    model, two = presets.model("qwen3-30b-a3b"), {name: RIVALS[name] for name in ("megatron", "hd2")}
    small = studies.of_layers(presets.cluster("hiermoe"), model, studies.workload(1.0, 64), two, 2, 0)
    monkeypatch.setattr(studies, "_by_skew", lambda name, skew: small)
    for study in (studies.exchanges, studies.steps):
        found = study(lambda text: None)
        assert "deepseek-v3-half" in set(next(iter(found.tables.values()))["model"])
        assert any("Of deepseek-v3-half, shared experts" in note for note in found.notes)


def test_pages_show_how_many_there_are(tmp_path: Path):
    common = {"model": "deepseek-v3-half", "cluster": "local-1", "workload": "balanced-2048", "system": "flat"}
    (experiment,) = parsed(common | {"phase": "exchange"})
    maker = RunMaker(tmp_path / "runs" / "demo")
    maker.timed(experiment, 1.0)
    maker.write_records()
    html = context.where(load(maker.path)).html
    assert "shared experts" in html
