"""Models that people train: each is priced whole, and runs scaled down."""

from __future__ import annotations

import pytest

from harness import presets
from harness.bench import dry, suite
from harness.plan.choice import Wanted
from harness.simulation import simulate

TRAINED = [name for name in presets.names("models") if "hub page" in presets.model(name).source]
#: dense layers, shared experts and latent attention; dense layers between; a window
KINDS = ("deepseek-v3", "llama-4-maverick", "gpt-oss-20b")
PHASES = ["layer", "train_step", "prefill", "decode"]


def parsed(model: str, phases: list[str], cluster: object, tokens: int, small: bool) -> suite.Suite:
    entry = {"model": model, "cluster": cluster, "phase": phases, "system": "flat", "dtype": "float32"}
    entry["workload"] = {"name": "w", "tokens_per_rank": tokens}
    return suite.from_data({"name": "s", "experiments": [entry]}, "s", physical=True, small=small)


@pytest.mark.parametrize("name", TRAINED)
def test_each_is_priced_whole(name: str) -> None:
    found = {}
    for phase, tokens in (("train_step", presets.model(name).seq), ("prefill", presets.model(name).seq), ("decode", 8)):
        (experiment,) = parsed(name, [phase], {"preset": "h100", "nodes": 1}, tokens, small=False).experiments
        (found[phase],) = simulate(experiment, Wanted().machine(experiment)).samples["total"]
    assert 0 < found["decode"] < found["prefill"] < found["train_step"] < 10


def test_layers_without_experts_and_shared_experts_cost_time() -> None:
    def step_s(**changes: object) -> float:
        model = {"preset": "llama-4-maverick", **changes}
        (experiment,) = parsed(model, ["train_step"], {"preset": "h100", "nodes": 1}, 2048, False).experiments  # type: ignore[arg-type]
        return float(simulate(experiment, Wanted().machine(experiment)).samples["total"][0])

    whole = step_s()
    assert step_s(num_shared_experts=0) < 0.97 * whole
    assert step_s(dense_ffn=64) < 0.9 * whole
    assert step_s(num_layers=24, moe_every=1, dense_ffn=None) < 0.9 * whole


def test_attention_that_is_only_priced_runs_in_no_whole_model() -> None:
    for name, field in (("deepseek-v3", "kv_lora_rank: null"), ("gpt-oss-20b", "attention_window: null")):
        for experiment in parsed(name, ["exchange", "layer", *PHASES[1:3]], "local-1", 2048, small=False).experiments:
            runs = experiment.phase in ("exchange", "layer")
            assert experiment.lacks is None if runs else field in (experiment.lacks or "")
            assert (dry.refusal(experiment) or "") == (experiment.lacks or "")
            assert field not in (dry.refusal(experiment, installed=True) or "")
    assert presets.model("gpt-oss-20b").model_copy(update={"attention_window": 2048}).lacks is None


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.long) for n in TRAINED])
def test_each_runs_scaled_down(session, name: str) -> None:
    cells = parsed(name, PHASES, "local-2", 64, small=True).experiments
    assert all(cell.model.name == f"{name}-small" for cell in cells)
    assert cells[0].model.num_experts == min(64, presets.model(name).num_experts)
    for cell in cells if name not in KINDS else cells[1::2]:
        payload = {"experiments": [cell.model_dump(mode="json")], "repeats": 1, "warmup": 1}
        for answer in session("local-2").call("harness.bench.race:run_race", payload):
            (outcome,) = answer["cells"].values()
            assert outcome["status"] == "ok", (cell.phase, outcome["reason"])
