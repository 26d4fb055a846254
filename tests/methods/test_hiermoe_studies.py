"""HierMoE's studies on few points."""

from __future__ import annotations

from harness import presets
from harness.placement import Placement
from harness.registry import system
from harness.specs import Model
from harness.system import Case
from harness.topology import Topology
from methods.hiermoe import studies
from methods.hiermoe.counts import count
from methods.hiermoe.planner import PlannerModel
from methods.hiermoe.replay import NINE, RIVALS, Swapping, replay, routings

SMALL = Model(name="s", num_layers=1, hidden=16384, ffn=64, num_experts=64, top_k=4)


def test_table_2_is_beside_what_is_counted():
    found = studies.duplicates(lambda text: None)
    assert found.raw["gaps"]["gap"].max() < 0.015
    assert set(found.tables["duplication"]["evidence"]) == {"simulated", "reported"}
    assert len(found.tables["duplication"]) == 3 * 16


def test_swaps_help_on_skewed_routing_and_every_variant_has_its_time():
    cluster = presets.cluster("hiermoe")
    load = studies.workload(6.0, tokens=256)
    swapping = Swapping(PlannerModel(cluster), 2.0 * SMALL.hidden, pairs=4)
    played = replay(cluster, SMALL, routings(load, SMALL, cluster, 6), RIVALS, swapping)
    frame = studies.mean_times(studies.one_ways(cluster, played), warm=3)
    at = frame.set_index("variant")["one_way_s"]
    assert list(frame["variant"]) == list(RIVALS)
    assert at["hd"] <= at["hd2"]
    assert at.idxmax() == "tutel-2dh"
    assert at["hiermoe"] < at["hd"]
    assert studies.over(frame, "megatron").iloc[0] == 1


def test_a_placement_is_for_the_next_step_only():
    """In the first step every placement is the contiguous one."""
    cluster = presets.cluster("hiermoe")
    played = replay(cluster, SMALL, routings(studies.workload(6.0, tokens=64), SMALL, cluster, 2))
    rows = list(studies.one_ways(cluster, played))
    first = {row["variant"]: row["one_way_s"] for row in rows if row["step"] == 0}
    assert first["hiermoe"] == first["hd"]
    assert first["hd2-smart"] == first["hd2"]


def test_on_one_node_hd2_is_plain_deduplication():
    """The node's level joins one unit: nothing travels there, and what is left is one all-to-all of all ranks."""
    whole = presets.cluster("hiermoe")
    one = studies.resized(whole, 1)
    assert one.shape == (1, 2, 2, 2)
    assert one.collectives["a2a.flat"] == whole.collectives["a2a.intra1"]
    assert studies.resized(whole, 2).shape == (2, 2, 2, 2)
    model, topology = PlannerModel(one), Topology(one.shape)
    placement = Placement.contiguous(SMALL.num_experts, one.num_ranks)
    (routing,) = routings(studies.workload(4.0, tokens=64), SMALL, one, 1)
    for deduplicated in (True, False):
        times = model.times(count(routing, placement.owner, topology), 4096.0, deduplicated=deduplicated)
        assert times[1] == times[0]
        assert (times[2:] != times[0]).all()
    # as executed, whatever levels there are below the node
    case = Case(SMALL, "bfloat16", topology, placement, routing, options={"dimension": 1})
    plain, hd2 = (system(name).planned_bytes(case)["dispatch"] for name in ("hiermoe-hd", "hiermoe-hd2"))
    assert (plain == hd2).all()
    frame = studies.times(one, SMALL, studies.workload(4.0, tokens=64), {"hd1": NINE["hd1"], **RIVALS}, 2, 0)
    at = frame.set_index("variant")["one_way_s"]
    assert at["hd2"] == at["hd1"] > at["hd"]


def test_a_layer_takes_longer_the_slower_its_device_and_by_more_than_its_rows_alone():
    """Four ways of the rows, each behind the others, and computation that nothing hides."""
    cluster = presets.cluster("hiermoe")
    rivals = {name: RIVALS[name] for name in ("megatron", "tutel-2dh", "hd2", "hiermoe")}
    one_way, layer = studies.of_layers(cluster, SMALL, studies.workload(1.0, tokens=64), rivals, 1, 0)
    at = layer.pivot(index="variant", columns="efficiency", values="layer_s")
    assert (at[0.2] > at[0.6]).all()
    assert (at[0.6] > 4 * one_way.set_index("variant")["one_way_s"].loc[at.index]).all()
