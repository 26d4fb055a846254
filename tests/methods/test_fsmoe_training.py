"""Whole training steps as one plan: the oracle's losses, with gradients of later layers between the all-to-alls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from harness import presets, registry
from harness.errors import UserError
from harness.plan.gradients import Stream
from harness.specs import Cluster, Experiment
from tests.methods.test_fsmoe_cut import COSTS
from tests.methods.test_hiermoe import cluster

SYSTEMS = [name for name in registry.systems() if name.startswith("fsmoe")]
LAYERS = 3


def training(system: str, on: Cluster, **changes: Any) -> dict[str, Any]:
    small = {"num_layers": LAYERS, "hidden": 32, "ffn": 32, "num_heads": 4, "seq": 8, "vocab": 64}
    experiment = Experiment.parse(
        {
            "model": presets.model("gpt-tiny-moe").model_dump() | small,
            "cluster": on,
            "workload": {"name": "w", "tokens_per_rank": 16, "generator": "natural"},
            "system": system,
            "phase": "train_step",
            "dtype": "float64",
        }
        | changes,
        "test",
    )
    return {"experiment": experiment.model_dump(mode="json")}


def run(session, system: str, shape: tuple[int, int], priced: bool = False, **changes: Any) -> list[dict[str, Any]]:
    on = cluster(shape)
    costs = COSTS | {"ar.flat": {"alpha_s": 1e-6, "beta_s_per_byte": 2e-9}}
    constants = {"collectives": costs, "gemm": {"alpha_s": 1e-4, "beta_s_per_mac": 1e-9}} if priced else {}
    known = Cluster.model_validate({**on.model_dump(), **constants})
    payload = training(system, known, **changes)
    found = session(on).call("tests.methods.fsmoe_on_ranks:trained", payload, timeout_s=120)
    assert found[0]["error"] < 1e-9
    assert all(each["losses"] == found[0]["losses"] for each in found)
    assert found[0]["losses"][-1] < found[0]["losses"][0]  # it learns
    assert all(sum(each["slices"].values()) == sum(each["part_bytes"]) for each in found)  # each gradient once
    return found


@pytest.mark.parametrize(
    ("shape", "model_parallel"),
    [((2, 4), True), ((4, 2), False), ((2, 4), False), ((4, 2), True)],
    ids=str,
)
@pytest.mark.long
def test_ten_steps_have_the_oracles_losses(session, shape, model_parallel):
    options = {"degree_forward": 2, "degree_backward": 4}
    for each in run(session, "fsmoe", shape, model_parallel=model_parallel, options=options):
        assert each["slices"]["layer0.backward.gradients"] == each["part_bytes"][LAYERS - 2]
        assert each["slices"]["layer1.backward.gradients"] == each["part_bytes"][LAYERS - 3]
        assert each["before_combine"]
        assert each["lanes"] == ["compute", "inter", "intra"]
        heads = shape[1] if model_parallel else 1
        assert each["part_bytes"] == [4 * 32 * 32 * 8 // heads] * LAYERS


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_schedule_trains_alike_where_costs_decide(session, system):
    for each in run(session, system, (2, 2), priced=True):
        kinds = {name.split(".")[-1] for name in each["slices"]}
        wanted = {"after": "gradients-after", "dense": "gradients-dense"}
        policy = registry.system(system).schedule.policy
        assert wanted.get(policy.gradients, "gradients") in kinds
        assert {1, 2, 4, 8} >= set(each["degrees"])


@pytest.mark.parametrize("system", ["flat", "hiermoe-hd2", "megatron"])
def test_other_systems_train_behind_model_parallel_attention(session, system):
    dtype = "float32" if system == "megatron" else "float64"
    on = cluster((2, 2))
    payload = training(system, on, model_parallel=True, dtype=dtype)
    rows = session(on).call("tests.methods.fsmoe_on_ranks:gated", payload, timeout_s=120)
    assert all(row["status"] == "ok" for row in rows), rows[0]


def test_a_slice_larger_than_the_gradient_names_the_task():
    stream = Stream([[nn.Parameter(torch.zeros(4))], [nn.Parameter(torch.zeros(6))]], None, "flat")
    assert stream.part_bytes == [16, 24]
    assert stream.take("layer1.backward.gradients", 0, after_part=0) is None
    with pytest.raises(UserError, match=r"task layer0.backward.gradients: slice: 20: must be 0 to 16 bytes"):
        stream.take("layer0.backward.gradients", 20, after_part=1)
    with pytest.raises(UserError, match="whole elements"):
        stream.take("layer0.backward.gradients", 6, after_part=1)
    assert stream.take("layer0.backward.gradients", 16, after_part=1).cost.num_bytes == 16
    with pytest.raises(UserError, match="must be 0 to 0 bytes"):
        stream.take("layer0.backward.gradients-dense", 4, after_part=1)
