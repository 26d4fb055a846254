"""HierMoE's studies on few points."""

from __future__ import annotations

import pytest

from harness import presets
from harness.specs import Model
from methods.hiermoe import studies
from methods.hiermoe.model import TimeModel
from methods.hiermoe.variants import VARIANTS, Swapping, replay, routings

SMALL = Model(name="s", num_layers=1, hidden=16384, ffn=64, num_experts=64, top_k=4)


def test_table_2_is_beside_what_is_counted():
    found = studies.duplicates(lambda text: None)
    assert found.raw["gaps"]["gap"].max() < 0.015
    assert set(found.tables["duplication"]["evidence"]) == {"simulated", "reported"}
    assert len(found.tables["duplication"]) == 3 * 16


def test_swaps_help_on_skewed_routing_and_every_variant_has_its_time():
    cluster = presets.cluster("hiermoe")
    load = studies.workload(6.0, tokens=256)
    swapping = Swapping(TimeModel(cluster), 2.0 * SMALL.hidden, pairs=4)
    frame = studies.mean_times(replay(cluster, SMALL, routings(load, SMALL, cluster, 6), VARIANTS, swapping), warm=3)
    at = frame.set_index("variant")["one_way_s"]
    assert list(frame["variant"]) == list(VARIANTS)
    assert at["hd"] <= at["hd2"]
    assert at.idxmax() == "tutel-2dh"
    assert at["hiermoe"] < at["hd"]
    assert studies.over(frame, "megatron").iloc[0] == 1


def test_a_placement_is_for_the_next_step_only():
    """In the first step every placement is the contiguous one."""
    cluster = presets.cluster("hiermoe")
    rows = list(replay(cluster, SMALL, routings(studies.workload(6.0, tokens=64), SMALL, cluster, 2)))
    first = {row["variant"]: row["one_way_s"] for row in rows if row["step"] == 0}
    assert first["hiermoe"] == first["hd"]
    assert first["hd2-smart"] == first["hd2"]


def test_one_node_has_the_inner_levels_and_their_costs():
    whole = presets.cluster("hiermoe")
    one = studies.resized(whole, 1)
    assert one.shape == (2, 2, 2)
    assert one.collectives["a2a.flat"] == whole.collectives["a2a.intra1"]
    assert one.collectives["a2a.inter1"] == whole.collectives["a2a.inter2"]
    assert one.collectives["a2a.intra2"] == whole.collectives["a2a.intra3"]
    assert studies.resized(whole, 2).shape == (2, 2, 2, 2)
    assert studies.compute_s(presets.model("deepseek-v3-half"), whole, 0.5) == pytest.approx(
        2 * studies.compute_s(presets.model("deepseek-v3-half"), whole, 1.0)
    )
