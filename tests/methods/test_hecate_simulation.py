"""Hecate's simulation: loads, what things take, memory, systems; against the harness's own counts and brute force."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from harness import presets
from harness.errors import UserError
from harness.plan.cost import Even, InTurn, Transfer
from harness.topology import Topology
from harness.traffic import port_load
from methods.hecate import loads as load_model
from methods.hecate import memory_model
from methods.hecate.memory_model import Copies
from methods.hecate.outcome import Result
from methods.hecate.played import PRICED, WARM, Loads, Options, Setup, play, whole_state

MODEL = presets.model("gpt-moe-s-e32")
CLUSTER = presets.cluster("hecate-a").resized(2)
SETUP = Setup(MODEL, CLUSTER, samples=2)
TOPOLOGY = Topology((2, 8))


@pytest.fixture(scope="module")
def loads() -> np.ndarray:
    return load_model.drifting(40, 3, 16, SETUP.tokens, MODEL, 4.0)


# ----------------------------------------------------------------------------------------------------------- loads


@pytest.mark.parametrize("skew", [1.0, 1.5, 4.0, 16.0])
def test_generated_loads_have_the_stated_skew_everywhere(skew):
    found = load_model.shares(5, 3, MODEL, skew, 10, 0)
    np.testing.assert_allclose(found.max(-1) * 32, skew, rtol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1)
    counts = load_model.drifting(5, 3, 16, 4096, MODEL, skew)
    assert (counts.sum(-1) == 4096 * 2).all()
    assert load_model.max_over_mean(counts) == pytest.approx(skew, rel=0.05)


def test_loads_drift_by_their_half_life_and_begin_anew_with_the_seed():
    def alike(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(np.log(a).ravel(), np.log(b).ravel())[0, 1])

    slow, fast = (load_model.shares(60, 20, MODEL, 4.0, half_life, 0) for half_life in (1000, 5))
    assert alike(slow[0], slow[5]) > 0.9 > alike(fast[0], fast[5]) > 0.3
    assert abs(alike(fast[0], fast[50])) < 0.2
    assert abs(alike(slow[0], load_model.shares(1, 20, MODEL, 4.0, 1000, 1)[0])) < 0.2
    for skew in (0.5, 17.0):
        with pytest.raises(UserError, match="skew"):
            load_model.shares(1, 1, MODEL, skew, 10, 0)


def test_recorded_loads_are_the_traces():
    model = presets.model("gpt-moe-s")
    found = load_model.recorded(3, 5, 32, 4096, model)
    assert found.shape == (3, 5, 32, 64)
    trace = load_model.read_trace(load_model.find_trace(load_model.TRACE))
    ids = trace[trace.steps[-1], trace.layers[0]].ids[:, :2]
    share = np.bincount(ids.ravel(), minlength=64) / ids.size
    np.testing.assert_allclose(found[:, 0].sum((0, 1)) / found[:, 0].sum(), share, atol=2e-3)
    with pytest.raises(UserError, match="num_experts"):
        load_model.recorded(1, 1, 16, 16, MODEL)


def test_the_estimate_is_the_mean_of_the_window_before(loads):
    found = load_model.predicted(loads, 5)
    for step in (1, 3, 5, 17):
        np.testing.assert_allclose(found[step], loads[max(0, step - 5) : step].sum(-2).mean(0))
    assert (found[0] == found[0][:, :1]).all()


def test_overlap_degree_is_the_papers_formula():
    t = SETUP.attention_s * 12.5e9 / (2 * 2 * 768 * 1536)
    assert SETUP.overlap_degree == int(t) > 0
    assert dataclasses.replace(SETUP, bw_ranks=8).overlap_degree == int(t / 8)


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("name", "billions"), [("gpt-moe-s", 1.84), ("gpt-moe-l", 7.36), ("bert-moe", 3.27), ("bert-moe-deep", 6.54)]
)
def test_parameters_are_those_of_table_1(name, billions):
    model = presets.model(name)
    experts = model.num_layers * model.num_experts * memory_model.expert_parameters(model)
    attention = model.num_layers * 4 * model.hidden**2
    assert (experts + attention) / 1e9 == pytest.approx(billions, abs=0.005)
    assert memory_model.dense_parameters(model) - attention == (model.vocab + model.seq) * model.hidden


def test_copies_cost_what_they_are():
    ep = memory_model.memory(MODEL, Copies(24), 2, 1.0)
    each = memory_model.expert_parameters(MODEL)
    assert ep.state == 24 * 16 * each
    assert ep.experts_optimizer == 6 * ep.experts_parameters
    more = memory_model.memory(MODEL, Copies(24, resident=10, widest=3), 2, 1.0)
    assert more.state - ep.state == each * (10 * 2 + 3 * 2)
    assert memory_model.memory(MODEL, Copies(24), 4, 1.0).activations == 2 * ep.activations
    assert memory_model.memory(MODEL, Copies(24), 2, 2.0).activations > ep.activations


@pytest.mark.parametrize("remat", [False, True])
def test_capacity_is_the_most_copies_that_fit(remat):
    room = 1e9
    m = memory_model.capacity(MODEL, room, remat=remat)
    layers = 1 if remat else 12

    def used(m: int) -> float:
        more = memory_model.memory(MODEL, Copies(24, resident=layers * m, widest=m), 2, 1.0)
        return more.peak - memory_model.memory(MODEL, Copies(24), 2, 1.0).peak

    assert used(m) <= room
    assert m == 32 or used(m + 1) > room
    assert memory_model.capacity(MODEL, -1.0, remat=remat) == 0


# --------------------------------------------------------------------------------------------------------- systems


@functools.cache
def played(name: str, **changes: object) -> Result:
    return play(SETUP, drifting(), name, Options(**changes))  # type: ignore[arg-type]


@functools.cache
def drifting() -> np.ndarray:
    return load_model.drifting(WARM + 20, 3, 16, SETUP.tokens, MODEL, 4.0).astype(np.int64)


def skewed(step: int) -> np.ndarray:
    """[layers, W, E] of a step that is priced."""
    return drifting()[WARM + step]


def test_loads_are_a_routing_without_tokens():
    counts = skewed(3)[0]
    found = Loads(counts, 2)
    assert found.counts is counts
    assert (found.top_k, found.num_experts) == (2, 32)
    assert found.tokens == (SETUP.tokens,) * 16


def test_rows_take_as_long_as_the_busiest_port_and_the_busiest_rank():
    """Of a training whose steps are all alike."""
    alike = np.repeat(skewed(0)[None], WARM + len(PRICED), axis=0)
    found = play(SETUP, alike, "ep", Options())
    port_s, rank_s, macs_s = 0.0, 0.0, 2 * 2 * 768 * 1536 / (0.4 * 125e12)
    for counts in alike[0]:
        rows = counts.reshape(16, 16, 2).sum(-1).astype(float)  # two experts to a rank
        rank_s += 3 * rows.sum(0).max() * macs_s
        np.fill_diagonal(rows, 0)
        port_s += (
            4 * 2 * 768 * max(port_load(rows, TOPOLOGY, 0).max() / 12.5e9, port_load(rows, TOPOLOGY, 1).max() / 150e9)
        )
    metadata_s = 3 * 8 * 8 * 2 * 8 / 12.5e9  # of a rank's two experts
    assert found.all_to_all_s * 3 == pytest.approx(port_s + metadata_s)
    assert found.busy_s["experts"] == pytest.approx(rank_s)
    parts = found.seconds()
    assert sum(parts.values()) == pytest.approx(found.layers_s.mean())  # the chain has no gaps
    assert parts["all-to-all"] + parts["experts"] == pytest.approx((port_s + metadata_s + rank_s) / 3)


def test_a_layer_more_is_a_layer_more_of_the_step():
    """Of even loads, under systems that have nothing to decide then."""
    even = np.full((WARM + len(PRICED), 12, 16, 32), SETUP.tokens * 2 // 32)
    for name, near in (("ep", 1e-9), ("hecate-rm", 1e-9), ("fsdp", 2e-4)):  # FSDP's first layer gathers before all else
        few, all_of_them = (play(SETUP, even[:, :layers], name, Options(t=2, m=2)) for layers in (3, 12))
        assert few.step_s == pytest.approx(all_of_them.step_s, rel=near)
        assert few.layer_s == pytest.approx(all_of_them.layer_s, rel=near)


def test_hecate_without_copies_and_resharding_is_ep():
    plain, bare = played("ep"), played("hecate", t=0, reshard_every=0)
    np.testing.assert_allclose(bare.layers_s - plain.layers_s, 8 * 8 * (32 - 2) * 8 / 12.5e9)  # metadata of all experts
    assert bare.copies == plain.copies
    assert bare.collectives_s == 0


def test_everything_everywhere_is_balanced_and_fsdp_has_no_traffic():
    every, plain = played("hecate", t=32, m=32, reshard_every=0), played("fsdp")
    each = 2 * 2 * 768 * 1536
    assert every.busiest == pytest.approx(1, rel=1e-3)
    assert every.busy_s["experts"] == pytest.approx(plain.busy_s["experts"])
    metadata_s = 8 * 8 * 32 * 8 / 12.5e9
    assert plain.all_to_all_s == pytest.approx(metadata_s)
    between = 16 * each / 12.5e9  # half of the experts come to each node
    assert plain.busy_s["gather"] > 3 * between
    assert plain.busy_s["gather"] < 3 * (between + 32 * each / 150e9)
    assert plain.busy_s["regather"] == pytest.approx(plain.busy_s["gather"] * 2 / 3)  # the last layer's stay
    assert every.busy_s["gather"] == pytest.approx(plain.busy_s["gather"])
    assert every.busy_s["reduce"] == pytest.approx(plain.busy_s["reduce"])
    assert "regather" not in every.busy_s


def test_copies_help_under_skew_and_cost_their_gathers():
    assert played("hecate").layer_s < played("ep").layer_s
    assert played("flexmoe").layer_s < played("ep").layer_s
    hidden = played("hecate", reshard_every=0)
    assert hidden.collectives_s > 0
    more = played("hecate", t=32, m=32, reshard_every=0)
    assert more.seconds()["gather"] > hidden.seconds()["gather"]
    assert more.layer_s - more.seconds()["gather"] < hidden.layer_s


def test_remat_gathers_once_more_and_keeps_one_layer():
    keeps, again = played("hecate"), played("hecate-rm")
    assert again.busy_s["gather"] == pytest.approx(keeps.busy_s["gather"])
    assert 0 < again.busy_s["regather"] < again.busy_s["gather"]
    assert again.copies.resident == again.copies.widest == keeps.copies.widest
    assert keeps.copies.resident > keeps.copies.widest


def test_calibration_is_taken_where_there_is_memory_left():
    def of(**changes: object) -> Result:
        return played("hecate", t=8, reshard_every=0, **changes)

    full, calibrated = of(m=4), of(m=4, calibrates=True)
    np.testing.assert_allclose(calibrated.layers_s, full.layers_s)
    assert "late" not in full.busy_s


def test_rearrangement_pays_its_moves_at_its_boundaries():
    for name in ("smartmoe", "flexmoe", "eplb"):
        assert played(name, every=10).move_s > 0
        assert played(name, every=1000).move_s == 0  # longer than the training
    assert played("flexmoe", slots=3).copies.owned == 3 * played("ep").copies.owned
    assert played("hecate", reshard_every=10).move_s > played("hecate").move_s == 0


def test_an_expert_moves_with_the_state_that_the_memory_counts():
    matrix = np.full((16, 16), 6.0)  # 2 bytes of a parameter and as many of each of two moments
    told = Even("ar", "flat", 8.0)
    moved = whole_state(InTurn((told, Transfer("a2a", "flat", matrix))))
    assert moved.parts[0] is told
    np.testing.assert_allclose(moved.parts[1].matrix, 2 + 12)
    assert whole_state(None) is None


def test_an_expert_that_is_passed_on_leaves_a_node_once():
    matrix = np.zeros((32, 32))
    matrix[0, [8, 16, 24]] = 1e9  # to three other nodes
    plain = Setup(MODEL, presets.cluster("hecate-a").resized(4), samples=2)
    passing = dataclasses.replace(plain, passes_on=True)
    for each in (matrix, matrix.T):  # a gather, and the reduction
        gather = Transfer("a2a", "inter", each)
        assert np.max(plain.priced(gather).seconds) == pytest.approx(3 / 12.5)
        assert np.max(passing.priced(gather).seconds) == pytest.approx(1 / 12.5)
        tokens = Transfer("a2a", "flat", each)
        assert np.max(passing.priced(tokens).seconds) == pytest.approx(3 / 12.5)


def test_fastermoe_overlaps_what_is_even():
    even = np.full((WARM + len(PRICED), 2, 16, 32), SETUP.tokens * 2 // 32)
    fused, plain = (play(SETUP, even, name, Options()) for name in ("fastermoe", "ep"))
    assert fused.copies.widest == 0
    assert plain.seconds()["all-to-all"] * 0.99 * 3 / 4 < fused.layer_s < plain.layer_s
