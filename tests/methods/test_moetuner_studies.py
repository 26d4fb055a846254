"""MoETuner's latency model on numbers that can be told by hand, and its studies on few points."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness.specs import Model, with_levels
from methods.moetuner import studies
from methods.moetuner.latency import Served, serve

MODEL = Model(name="m", num_layers=2, hidden=100, ffn=50, num_experts=4, top_k=1, num_heads=1, seq=10)
CLUSTER = with_levels(
    "c",
    [
        {"name": "node", "size": 2, "bandwidth_bytes_per_s": 1e3},
        {"name": "gpu", "size": 2, "bandwidth_bytes_per_s": 1e4},
    ],
    kind="physical",
    device_flops_per_s=1e6,
    device_bytes_per_s=1e9,
)


def test_times_are_those_of_the_slowest_link_and_rank() -> None:
    """8 tokens, 2 on each of 4 ranks, one expert on each; all go to expert 0 in layer 0, then to their own rank."""
    ids = np.stack([np.zeros((8, 1), int), np.repeat(np.arange(4), 2)[:, None]])
    owner = np.tile(np.arange(4), (2, 1))
    served = Served(MODEL, CLUSTER, 1, efficiency=0.5)
    found = serve(served, ids, owner)
    flops = 2 * 2 * 100 * 50 / (0.5 * 1e6)
    assert found.experts_s.tolist() == [[8 * flops, 0, 0, 0], [2 * flops] * 4]
    row = 200  # bytes
    # layer 0: 4 rows come over the node's port at 1e3 B/s, on both sides of it; inside, 6 rows to rank 0 take less
    assert found.dispatch_s[0].tolist() == [4 * row / 1e3] * 4
    assert found.combine_s[0].tolist() == found.dispatch_s[0].tolist()
    assert found.all_to_all_s[1].tolist() == [0] * 4
    assert found.summary()["experts_tail_s"] == pytest.approx((8 + 2) * flops / 2)
    assert found.summary()["a2a_mean_s"] == pytest.approx(2 * 4 * row / 1e3 / 2)
    straight = serve(served, ids, owner, "paper")  # from rank 0 to all: 4 rows leave its node, 2 stay on it
    assert straight.dispatch_s[1].tolist() == [4 * row / 1e3] * 4
    assert straight.dispatch_s[0].tolist() == straight.combine_s[0].tolist() == [0] * 4
    inside = serve(served, np.stack([ids[1], np.array([[1], [1], [0], [0], [2], [2], [3], [3]])]), owner)
    assert inside.dispatch_s[1].tolist() == [2 * row / 1e4] * 2 + [0] * 2
    named = {"dispatch", "experts", "combine"}
    others = [task.cost for task in served.plan(found.passages).tasks if task.kind not in named]
    rest = sum(np.max(served.machine.seconds(cost)) for cost in others)  # attention, gate, head, ..
    assert found.end_to_end_s - rest == pytest.approx((8 + 2) * flops + 2 * 4 * row / 1e3)
    # rank 1 has its own done at once; rank 0 is the last in both layers, whoever waits for it
    free = dataclasses.replace(served, links="shared-ports")
    assert serve(free, ids, owner).end_to_end_s == pytest.approx(found.end_to_end_s)
    crowded = np.array([1, 1, 1, 1, 3, 3, 0, 0])[:, None]  # rank 1 computes most, and none of its rows change nodes
    met, apart = (serve(each, np.stack([crowded] * 2), owner).end_to_end_s for each in (served, free))
    assert apart < met


def test_few_tokens_take_as_long_as_reading_the_weights() -> None:
    ids = np.zeros((2, 4, 1), int)
    found = serve(Served(MODEL, CLUSTER.model_copy(update={"device_bytes_per_s": 10.0}), 1), ids, np.zeros((2, 4), int))
    assert found.experts_s[0].tolist() == [2 * 100 * 50 * 2 / 10, 0, 0, 0]


def test_tensor_parallel_ranks_share_computation_and_the_inner_link() -> None:
    ids = np.stack([np.repeat([1, 0], 4)[:, None]] * 2)
    rates = {"device_flops_per_s": 1e6, "device_bytes_per_s": 1e9}
    made = []
    for tp in (1, 2):
        levels = [{"name": "node", "size": 1}, {"name": "gpu", "size": 2 * tp, "bandwidth_bytes_per_s": 1e4}]
        cluster = with_levels("c", levels, kind="physical", **rates)
        made.append(serve(Served(MODEL, cluster, tp), ids, np.tile([0, 1, 1, 1], (2, 1))))
    one, two = made
    assert np.allclose(one.experts_s, 2 * two.experts_s)
    assert np.allclose(one.dispatch_s, 2 * two.dispatch_s)
    assert one.dispatch_s.max() > 0


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One routing, one testbed, quick methods."""
    monkeypatch.setattr(studies, "ROUTINGS", ("recorded early",))
    monkeypatch.setattr(studies, "TESTBEDS", {"multi-node": studies.TESTBEDS["multi-node"]})
    monkeypatch.setattr(studies, "METHODS", ("contiguous", "greedy", "exflow", "two-stage", "joint"))


def quietly(text: str) -> None: ...


@pytest.mark.long
def test_gains_stand_beside_the_reported_ones_and_add_up(few: None) -> None:
    found = studies.latency(quietly)
    gains, raw = found.tables["gains"], found.raw["latency"]
    assert gains[gains["evidence"] == "reported"]["end_to_end_gain"].tolist() == [9.3, 17.5]
    assert {"contiguous", "two-stage"} <= set(raw["placement"])
    tuned = raw[(raw["placement"] == "two-stage") & (raw["traffic"] == "dispatcher")]
    assert (tuned["end_to_end_gain"] > 0).all()
    assert (tuned["experts_tail_gain"] > 0).all()
    assert raw["a2a_percent"].between(0, 100).all()
    of_layers = found.raw["layers"].query("placement == 'two-stage' and traffic == 'dispatcher'")
    assert len(of_layers) == 32
    for part in ("end_to_end", "experts_tail", "experts_mean", "a2a_tail", "a2a_mean"):
        new_over_old = 1 / (1 + tuned[f"{part}_gain"] / 100)
        assert np.allclose(tuned[f"{part}_reduction"], 100 * (1 - new_over_old))
        assert {f"{part}_gain", f"{part}_reduction"} <= set(gains)
    half = tuned[tuned["efficiency"] == 0.5].iloc[0]
    assert of_layers["experts_tail_s"].mean() == pytest.approx(half["experts_tail_s"])
    sources = studies.sources(quietly).tables["sources"].query("traffic == 'dispatcher' and placement == 'two-stage'")
    sources = sources.set_index("part")["gain"]
    assert sources["both"] == pytest.approx(half["end_to_end_gain"])
    assert sources["computation"] < sources["both"]
    waiting = found.tables["waiting"]
    assert waiting["basis"].nunique() == 3
    waiting = waiting[waiting["basis"].str.contains("50% of the peak")].set_index(["links", "placement"])
    assert waiting.loc[("ports", "two-stage"), "end_to_end_gain"] == pytest.approx(half["end_to_end_gain"])
    for placement in studies.METHODS:
        seconds = waiting.xs(placement, level="placement")["end_to_end_s"]
        assert seconds["shared-ports"] <= seconds["ports"]


@pytest.mark.long
def test_no_rival_has_a_better_objective_on_held_out_routing(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "ROUTINGS", ("recorded early", "markov 0.9"))
    table = studies.objective(quietly).tables["objective"]
    rivals = table[table["placement"].isin(("contiguous", "greedy", "exflow"))]
    assert len(rivals) == 6
    assert (rivals["joint_over"] <= 1).all()
    assert (table["joint_over_low"] <= table["joint_over_high"]).all()
    own = table[table["placement"] == "joint"][["joint_over", "joint_over_low", "joint_over_high"]]
    assert (own.to_numpy() == 1).all()
    own = table[table["placement"] == "two-stage"]
    assert (own["joint_over_low"] <= 1).all()
    held = table.pivot(index="routing", columns="placement", values="objective")
    found = table.pivot(index="routing", columns="placement", values="joint_over")
    assert np.allclose(found["greedy"], held["joint"] / held["greedy"])
