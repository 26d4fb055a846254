"""What is timed is checked: systems that are right at small shapes and wrong at full shape, in every phase."""

from __future__ import annotations

from typing import Any

import pytest

from harness import presets
from harness.specs import SERVING, Experiment

MODEL = {
    "name": "wide", "num_layers": 2, "hidden": 288, "ffn": 16, "num_experts": 4, "top_k": 2, "num_heads": 4, "seq": 24,
    "vocab": 64,
}  # fmt: skip
#: words of the reason, by fault and phase; not named: the fault cannot show there
EXCHANGE = {
    "buffer-64": "output off by",
    "columns-256": "output off by",
    "last-token": "of token 95",
    "equal-backward": "input_grad off by",
    "second-call": "at call 1 (timed repetition 0)",
    "stale-routing": "input_grad off by",
    "repeats": "at call 1 (timed repetition 0)",
    "sends-nothing": "received 0 bytes",
}
LATER = {"second-call": "(timed repetition", "stale-routing": "(timed repetition", "repeats": "(timed repetition"}
FOUND: dict[str, dict[str, str]] = {
    "exchange": {name: words for name, words in EXCHANGE.items() if name != "stale-routing"},
    "layer": EXCHANGE
    | {
        "expert-gradient": "of w1 of expert 0",
        "stale-routing": "at call 1 (timed repetition 0)",
        "sends-nothing": "weight_grad off by inf",
    },
    "train_step": EXCHANGE
    | LATER
    | {
        "expert-gradient": "of w1 of expert 0",
        "sends-nothing": "weight_grad off by inf",
        "sends-sums": "received 0 bytes",
    },
    "natural train_step": {"sends-sums": "received 0 bytes"},
    "prefill": {name: words for name, words in (EXCHANGE | LATER).items() if name != "equal-backward"},
    "decode": {name: words for name, words in (EXCHANGE | LATER).items() if name != "equal-backward"},
}


#: a training in whose third step all rows of the second layer stood nearly at right angles to two directions that
#: they were seen through; in bfloat16
ALIKE: dict[str, str] = {"second-call": "(warm-up)", "repeats": "(warm-up)", "last-token": "of token 95"}


#: what calls of one layer alone, or of layers that never had their turn, would not show; by phase, in bfloat16
OUTSIDE: dict[str, dict[str, str]] = {
    "exchange": {
        "late-output": "output of timed repetition 0 changed after the clock had stopped",
        "more-threads": "torch.get_num_threads() from 1 to 2",
        "no-gate-gradient": "weight_grad off by 1.000e+00, allowed 2.000e-02, of the gate's weights of token",
    },
    "layer": {
        "late-weights": "gradients of timed repetition 0 changed after the clock had stopped",
        "fewer-cores": "cores of threads",
        "half": "allowed 3.000e-02",
    },
    "train_step": {
        "middle-layer": "layer 1",
        "in-place": "its input was written to at step 0 (warm-up), layer 0",
        "behind-torch": "its input was written to at step 0 (warm-up), layer 0",
        "weights-before": "when all experts had changed their signs: output off by",
        "no-update": "has a gradient and no update at step 0",
        "other-gradient": "of layer 0 at step 0 (warm-up) are not what AdamW makes of its gradient",
        "weights-misplaced": "of layer 3 at step 1 (timed repetition 0) changed by",
        "moments-misplaced": "of layer 3 at step 1 (timed repetition 0) are smaller than the step before left them",
        "half-loaded": "weights w2 of expert 2 of layer 2 on rank 1 begin 5.0",
    },
    "prefill": {
        "middle-layer": "layer 1",
        "in-place": "its input was written to at pass 0 (warm-up), layer 0",
        "behind-torch": "its input was written to at pass 0 (warm-up), layer 0",
    },
}


@pytest.mark.parametrize("phase", OUTSIDE)
def test_nothing_is_hidden_from_the_witness(session, phase: str) -> None:
    """Behind the clock, in a layer between those watched first, ahead of the first step, in what a system was given."""
    cells = experiments(phase, [*OUTSIDE[phase], "flat"], "bfloat16", num_layers=4, hidden=96)
    race(session, cells, OUTSIDE[phase], repeats=3)


def experiments(
    phase: str, systems: list[str], dtype: str = "float32", seed: int = 3, **shape: Any
) -> list[Experiment]:
    *natural, phase = phase.split()
    workload = {"name": "w", "tokens_per_rank": 96, "generator": "zipf", "params": {"target": 1.5}, "seed": seed}
    if natural:
        workload |= {"generator": "natural", "params": {}}
    fields = {
        "cluster": presets.cluster("local-2"),
        "phase": phase,
        "dtype": dtype,
        "backward": phase not in SERVING,
    }
    return [
        Experiment.model_validate({"model": MODEL | shape, "workload": workload, "system": name, **fields})
        for name in systems
    ]


@pytest.mark.parametrize("phase", FOUND)
def test_a_system_that_is_wrong_at_full_shape_never_gets_a_time(session, phase: str) -> None:
    race(session, experiments(phase, [*FOUND[phase], "flat"]), FOUND[phase])


@pytest.mark.parametrize("phase", ["train_step", "prefill"])
def test_every_layer_is_seen_however_few_calls_there_are(session, phase: str) -> None:
    cells = experiments(phase, ["middle-layer", "flat"], "bfloat16", num_layers=8, hidden=96)
    race(session, cells, {"middle-layer": "layer 1"})


def test_a_right_system_is_right_where_its_rows_are_all_alike(session) -> None:
    cells = experiments("natural train_step", [*ALIKE, "flat"], "bfloat16", seed=0, hidden=512, ffn=64)
    errors = race(session, cells, ALIKE, warmup=2)
    assert errors["output"] < 0.01


def test_an_experts_matrices_may_stand_in_any_order(session) -> None:
    race(session, experiments("train_step", ["reordered", "flat"], ffn_type="swiglu"), {})


def race(
    session, cells: list[Experiment], wanted: dict[str, str], warmup: int = 1, repeats: int = 2
) -> dict[str, float]:
    """Some are wrong, for the reasons that are ``wanted``, and the others right -> errors of the last."""
    payload: dict[str, Any] = {
        "experiments": [e.model_dump(mode="json") for e in cells],
        "repeats": repeats,
        "warmup": warmup,
    }
    answers = session("local-2").call("tests.bench.planted:run_race", payload, timeout_s=120)
    for experiment in cells:
        outcome = answers[0]["cells"][experiment.digest]
        if experiment.system not in wanted:
            assert outcome["status"] == "ok", outcome["reason"]
        else:
            assert outcome["status"] == "nonconforming", (experiment.system, outcome)
            assert wanted[experiment.system] in outcome["reason"], (experiment.system, outcome["reason"])
            assert answers[1]["cells"][experiment.digest]["reason"] == outcome["reason"]
    return answers[0]["cells"][cells[-1].digest]["errors"]


def test_check_goes_beyond_64_tokens_and_256_columns(session) -> None:
    payload = {"systems": ["buffer-64", "columns-256"], "trials": ["ragged", "long"], "dtypes": ["float64"]}
    rows = session("local-2").call("tests.bench.planted:check", payload, timeout_s=120)[0]
    found = {(row["system"], row["trial"]): row["status"] for row in rows}
    for name in ("buffer-64", "columns-256"):
        assert found[name, "ragged"] == "ok"
        assert found[name, "long"] == "nonconforming"
