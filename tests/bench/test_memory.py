"""Memory of training steps: what is planned is what is counted."""

from __future__ import annotations

import pytest
import torch

from harness.bench.adam import adamw
from harness.memory import PARTS, peak_bytes
from harness.specs import Experiment
from tests.methods.hidden_on_ranks import timeline_of
from tests.methods.test_fsmoe_training import training
from tests.methods.test_hiermoe import cluster
from tests.plan.contract import WITH_DENSE


@pytest.mark.parametrize(
    ("system", "options", "dtype"),
    [
        ("flat", {}, "float32"),
        ("flat", {}, "float16"),
        ("flat", {"overlap_shared": True}, "float32"),
        ("hecate", {"t": 3, "reshard_every": 2}, "float32"),
        ("hecate-rm", {"t": 3, "reshard_every": 2}, "float32"),
        ("fastermoe", {"shadows": 2}, "float32"),
        ("eplb", {}, "float32"),
        ("fsmoe", {}, "float32"),
    ],
    ids=["flat", "float16", "dense-and-shared", "hecate", "hecate-rm", "fastermoe", "eplb", "fsmoe"],
)
def test_parts_are_as_planned_and_the_peak_holds_them(session, system, options, dtype):
    changes = {"workload": {"name": "w", "tokens_per_rank": 16, "generator": "uniform"}, "dtype": dtype}
    payload = training(system, cluster((2, 2)), options=options, **changes) | {"num_steps": 3}
    if "overlap_shared" in options:
        payload["experiment"]["model"] |= WITH_DENSE | {"head_dim": 12, "num_kv_heads": 2, "ffn_type": "swiglu"}
    every = session(cluster((2, 2))).call("tests.methods.hidden_on_ranks:traced", payload)
    for found in every:
        measured, planned = found["measured"], found["planned"]
        assert tuple(measured) == PARTS
        static = ("parameters", "gradients", "optimizer", "materialised")
        assert [measured[part] for part in static] == [planned[part] for part in static]
        assert ("activations" in planned) == (system != "fsmoe")  # which sends padded chunks
        if "activations" in planned:
            assert measured["activations"] == pytest.approx(planned["activations"], rel=3e-3)
            assert measured["peak"] == pytest.approx(planned["peak"], rel=0.1)
        static = measured["parameters"] + measured["optimizer"]
        assert measured["activations"] > 0
        assert measured["peak"] >= static + max(
            measured["gradients"], measured["activations"] + measured["materialised"]
        )
        assert measured["peak"] <= sum(measured[part] for part in PARTS[:-1]) + 300_000  # what a task needs
    copies = [found["measured"]["materialised"] for found in every]
    assert (max(copies) > 0) == (system.startswith("hecate") or system == "fastermoe")
    if system == "hecate-rm":  # one layer's at a time
        assert max(copies) <= 3 * 2 * 32 * 32 * 4
    if system != "fsmoe":  # which gathers tokens
        gathers = {f"layer{i}.forward." for i in range(3)} if system.startswith("hecate") else set()
        assert timeline_of(every).hidden("gather").keys() == gathers


@pytest.mark.parametrize("size", [1, 2])
def test_a_layout_keeps_what_is_planned(session, size):
    changes = {"workload": {"name": "w", "tokens_per_rank": 16, "generator": "uniform"}, "dtype": "float32"}
    payload = training("flat", cluster((2, 2)), layout={"expert_parallel": size}, **changes) | {"num_steps": 3}
    for found in session(cluster((2, 2))).call("tests.methods.hidden_on_ranks:traced", payload):
        measured, planned = found["measured"], found["planned"]
        static = ("parameters", "gradients", "optimizer", "materialised")
        assert [measured[part] for part in static] == [planned[part] for part in static]
        assert measured["activations"] == pytest.approx(planned["activations"], rel=3e-3)
        assert measured["peak"] == pytest.approx(planned["peak"], rel=0.03)


def test_the_update_holds_nothing_beside():
    experiment = Experiment.model_validate(training("flat", cluster((1, 2)), dtype="float32")["experiment"])
    parts = {"parameters": 0.0, "optimizer": 0.0, "gradients": 1e9, "materialised": 0.0, "activations": 0.0}
    assert peak_bytes(experiment, 16, parts) == 1e9
    parameter = torch.nn.Parameter(torch.ones(64, 32, 32))
    parameter.grad = torch.ones_like(parameter)
    optimizer = adamw([parameter])
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        optimizer.step()
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert most <= 64
