"""Training with materialised experts and moving shards: the oracle's losses, and one copy of every state."""

from __future__ import annotations

import numpy as np
import pytest

from harness import presets
from harness.specs import with_levels
from tests.methods.hidden_on_ranks import timeline_of
from tests.methods.test_fsmoe_training import training
from tests.methods.test_hiermoe import cluster

ON_RANKS = "tests.methods.hecate_on_ranks:"
LAYERS, EXPERTS, EXPERT = 3, 8, 2 * 32 * 32  # elements of one expert


def train(session, shape, system="hecate", num_steps=50, **options):
    payload = training(system, slow(shape), options=options) | {"num_steps": num_steps}
    found = session(cluster(shape)).call(ON_RANKS + "trained", payload, timeout_s=200)
    assert found[0]["losses"] == pytest.approx(found[0]["oracle"], rel=1e-9)
    assert found[0]["losses"][-1] < found[0]["losses"][0]
    for key in ("losses", "copies", "owners", "t"):
        assert all(each[key] == found[0][key] for each in found)
    # one copy of the optimizer's two moments in the whole job, as many on every rank
    states = np.array([each["states"] for each in found])
    assert states.sum() == 2 * LAYERS * EXPERTS * EXPERT
    assert (states.sum(1) == states.sum() / len(found)).all()
    return found


def slow(shape):
    """Links so slow that only what they carry counts."""
    levels = [{"name": f"l{i}", "size": size, "bandwidth_bytes_per_s": 1e6} for i, size in enumerate(shape)]
    return with_levels("slow", levels, kind="local")


@pytest.mark.parametrize(
    ("system", "options"),
    [
        pytest.param("hecate", {"t": 3, "reshard_every": 7, "window": 3}, marks=pytest.mark.long),
        pytest.param("hecate", {"t": 5, "m": 1, "reshard_every": 10}, marks=pytest.mark.long),
        pytest.param("hecate-rm", {"t": 3, "m": 2, "reshard_every": 7, "calibrate": True}, marks=pytest.mark.long),
    ],
    ids=["wide", "tight", "rematerialised"],
)
def test_fifty_steps_have_the_oracles_losses(session, system, options):
    found = train(session, (2, 2), system, **options)
    copies = np.array(found[0]["copies"])  # [step, layer, E]
    assert not copies[0].any() or options.get("calibrate")  # nothing is known yet
    assert copies[1:].any((1, 2)).all()
    assert len({each.tobytes() for each in copies}) > 10  # another placement nearly every step
    if "m" not in options:
        assert set(np.unique(copies)) == {0, 3}
        assert set(np.unique((copies[1:] > 0).sum(2))) <= {2, 3}  # a gate may leave all but two without tokens
    else:
        assert (copies.sum(2) <= 4 * options["m"]).all()
    assert len(found[0]["moved"]) >= 2
    assert sum(sum(each["moved"]) for each in found) % (3 * EXPERT * 8) == 0  # parameters and both moments
    assert len({tuple(np.bincount(owner, minlength=4)) for owner in found[0]["owners"]}) > 1  # uneven in a layer
    kinds = {name.split(".")[2] for name in found[0]["names"] if name.count(".") > 1}
    assert {"gather", "reduce"} <= kinds
    assert ("regather" in kinds) == (system == "hecate-rm")


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 4), (2, 2, 2)], ids=str)
def test_a_rank_for_each_expert_and_three_levels(session, shape):
    found = train(session, shape, num_steps=10, t=4, m=2, reshard_every=3, rematerialise=shape == (2, 2, 2))
    assert found[0]["moved"]


def test_without_any_materialisation_it_is_expert_parallelism(session):
    found = train(session, (2, 2), num_steps=5, t=0, reshard_every=0)
    assert not np.any(found[0]["copies"])
    assert not {name for name in found[0]["names"] if "gather." in name or "reduce." in name}


@pytest.mark.timed
def test_the_overlap_degree_is_what_the_attention_hides(session):
    on = slow((2, 2))
    payload = training("hecate", on) | {"num_steps": 4, "oracle": False}
    found = session(cluster((2, 2))).call(ON_RANKS + "trained", payload)
    degree = found[0]["t"]
    assert degree == found[3]["t"]
    assert 0 <= degree < EXPERTS  # attention of a millisecond, experts of 16 KiB at 1 MB/s


def test_training_goes_on_with_the_shards_it_had(session, tmp_path):
    """Ranks own other numbers of a layer's experts by then."""
    payload = training("hecate", cluster((2, 2)), options={"t": 3, "window": 2, "reshard_every": 2})
    payload |= {"folder": str(tmp_path / "cut"), "every": 5, "num_steps": 5, "dies_at": 0}
    trained = "tests.bench.checkpoint_on_ranks:trained"
    session(cluster((2, 2))).call(trained, payload)
    rest = session(cluster((2, 2))).call(trained, payload | {"num_steps": 9})[0]
    whole = session(cluster((2, 2))).call(trained, payload | {"folder": str(tmp_path / "whole"), "num_steps": 9})[0]
    assert rest["began"] == 5
    assert len(rest["losses"]) == 4
    for step, loss in rest["losses"].items():
        assert loss == pytest.approx(whole["losses"][step], rel=1e-9)


@pytest.mark.long
@pytest.mark.timed
def test_gathers_are_hidden_where_the_overlap_degree_says_so(session):
    """On shaped links, computation a wait; t is what the attention that was profiled hides. Of three steps the best, as
    two cores have to wake 24 threads."""
    on = presets.cluster("emulated-2x4-balanced")
    ranks = session(on)
    if not ranks.network["shaped"]:
        pytest.skip(ranks.network["reason"])
    model = {"hidden": 256, "ffn": 128, "num_experts": 16, "top_k": 2, "num_layers": 2, "seq": 1024, "vocab": 64}
    payload = training(
        "hecate",
        on,
        model=presets.model("gpt-tiny-moe").model_dump() | model,
        workload={"name": "w", "tokens_per_rank": 1024, "generator": "zipf", "params": {"target": 4.0}},
        dtype="bfloat16",
        compute="stand-in",
    )
    found = ranks.call("tests.methods.hidden_on_ranks:traced", payload | {"num_steps": 6}, timeout_s=120)
    assert 4 <= found[0]["t"] < 16
    hidden = [min(timeline_of(found, step).hidden("gather").values()) for step in (3, 4, 5)]
    assert max(hidden) >= 0.9, hidden
