"""Hecate's simulation: loads, what things take, memory, systems; against the harness's own counts and brute force."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness import presets
from harness.comm.replicas import nearest
from harness.comm.sparse import plan_sparse
from harness.errors import UserError
from harness.topology import Topology
from harness.traffic import port_load
from methods.hecate import loads as load_model
from methods.hecate import memory_model, simulate, systems
from methods.hecate.memory_model import Copies
from methods.hecate.simulate import Setup

MODEL = presets.model("gpt-moe-s-e32")
CLUSTER = presets.cluster("hecate-a").resized(2)
SETUP = Setup(MODEL, CLUSTER, samples=2)
TOPOLOGY = Topology((2, 8))


@pytest.fixture(scope="module")
def loads() -> np.ndarray:
    return load_model.drifting(40, 3, 16, SETUP.tokens, MODEL, 4.0)


def random_hosts(rng: np.random.Generator, num_experts: int = 32, num_ranks: int = 16) -> tuple[np.ndarray, np.ndarray]:
    owner = rng.integers(0, num_ranks, num_experts)
    hosts = (rng.random((num_experts, num_ranks)) < 0.2) | (owner[:, None] == np.arange(num_ranks))
    return owner, hosts


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
    ids = trace.rows[trace.steps[-1], trace.layers[0]].ids[:, :2]
    share = np.bincount(ids.ravel(), minlength=64) / ids.size
    np.testing.assert_allclose(found[:, 0].sum((0, 1)) / found[:, 0].sum(), share, atol=2e-3)
    with pytest.raises(UserError, match="num_experts"):
        load_model.recorded(1, 1, 16, 16, MODEL)


def test_the_estimate_is_the_mean_of_the_window_before(loads):
    found = load_model.predicted(loads, 5)
    for step in (1, 3, 5, 17):
        np.testing.assert_allclose(found[step], loads[max(0, step - 5) : step].sum(-2).mean(0))
    assert (found[0] == found[0][:, :1]).all()


# ---------------------------------------------------------------------------------------------------------- prices


def test_tokens_go_where_the_exchange_sends_them():
    rng = np.random.default_rng(1)
    counts = 840 * 16 * rng.integers(0, 3, (16, 32))  # divides by any number of holders
    for _ in range(3):
        _, hosts = random_hosts(rng)
        rows = simulate.arrivals(counts.astype(np.float32), hosts, 2)
        np.testing.assert_allclose(rows, nearest(hosts, TOPOLOGY).rows(counts).sum(1), rtol=1e-5)


def test_rows_take_as_long_as_the_busiest_port():
    rows = np.random.default_rng(2).integers(0, 100, (16, 16)).astype(float)
    moving = rows - np.diag(np.diag(rows))
    wanted = max(
        port_load(moving, TOPOLOGY, 0).max() / 12.5e9,
        port_load(moving, TOPOLOGY, 1).max() / 150e9,
    )
    assert SETUP.links.of(rows) == pytest.approx(wanted)


def test_a_gather_takes_what_the_sparse_plan_sends_between_nodes():
    rng = np.random.default_rng(3)
    for _ in range(5):
        owner, hosts = random_hosts(rng)
        sent = plan_sparse(owner, hosts, TOPOLOGY).bytes(SETUP.expert_bytes)
        between = port_load(sent, TOPOLOGY, 0).max() / 12.5e9
        own = owner[:, None] == np.arange(16)
        assert simulate.sparse_s(SETUP, own, hosts) == pytest.approx(between)
    nothing = simulate.sparse_s(dataclasses.replace(SETUP, start_s=1.0), own, own)
    assert nothing == 0


def test_all_reduce_is_twice_a_gather_at_most_and_moves_cost_their_bytes():
    own = systems.contiguous(SETUP)
    every = np.ones_like(own)
    gather = simulate.sparse_s(SETUP, own, every)
    assert gather == pytest.approx(16 * SETUP.expert_bytes / 12.5e9)  # half of the experts come to each node
    assert simulate.all_reduce_s(SETUP, every) == pytest.approx(32 * SETUP.expert_bytes / 12.5e9)
    assert simulate.all_reduce_s(SETUP, own) == 0
    assert simulate.move_s(SETUP, own, own) == 0
    swapped = own.copy()
    swapped[[0, 31]] = swapped[[31, 0]]
    assert simulate.move_s(SETUP, own, swapped) == pytest.approx(7 * SETUP.expert_bytes / 12.5e9)


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


def run(name: str, loads: np.ndarray, **changes: object) -> simulate.Result:
    of_system, options = systems.SYSTEMS[name]
    return of_system(SETUP, loads, dataclasses.replace(options, **changes))  # type: ignore[arg-type]


def test_hecate_without_copies_and_resharding_is_ep(loads):
    plain, bare = run("ep", loads), run("hecate", loads, t=0, reshard_every=0)
    np.testing.assert_allclose(bare.layers_s, plain.layers_s)
    assert bare.copies == plain.copies
    assert not bare.collectives.any()


def test_everything_everywhere_is_balanced_and_fsdp_has_no_traffic(loads):
    every = run("hecate", loads, t=32, m=32, reshard_every=0)
    plain = run("fsdp", loads)
    assert every.busiest == pytest.approx(1)
    np.testing.assert_allclose(every.parts["experts"], plain.parts["experts"])
    assert not plain.parts["all-to-all"].any()
    assert every.collectives.mean() == pytest.approx(plain.collectives.mean() * 2 / 3)  # FSDP gathers twice


def test_copies_help_under_skew_and_cost_their_gathers(loads):
    times = {name: run(name, loads).layers_s.mean() for name in systems.SYSTEMS}
    assert times["hecate"] < times["ep"]
    assert times["flexmoe"] < times["ep"]
    hidden = run("hecate", loads, reshard_every=0)
    assert not hidden.parts["gather"].any()  # t says that all fits under the attention
    assert hidden.collectives.all()
    more = run("hecate", loads, t=32, m=32, reshard_every=0)
    assert more.parts["gather"].all()
    exposed = more.collectives / 2 - SETUP.attention_s
    np.testing.assert_allclose(more.parts["gather"], exposed)


def test_remat_gathers_once_more_and_keeps_one_layer(loads):
    keeps, again = run("hecate", loads), run("hecate-rm", loads)
    np.testing.assert_allclose(again.collectives, keeps.collectives * 1.5)
    assert again.copies.resident == again.copies.widest == keeps.copies.widest
    assert keeps.copies.resident > keeps.copies.widest


def test_calibration_is_taken_only_where_it_pays(loads):
    def seconds(**changes: object) -> np.ndarray:
        found = run("hecate", loads, t=8, reshard_every=0, **changes)
        return found.parts["all-to-all"] + found.parts["experts"] + 2 * found.parts["gather"]

    plain, calibrated = seconds(m=16), seconds(m=16, calibrates=True)
    assert (calibrated <= plain * (1 + 1e-9)).all()
    assert (calibrated < plain).any()
    np.testing.assert_allclose(seconds(m=8, calibrates=True), seconds(m=8))  # no memory left


def test_rearrangement_pays_its_moves_at_its_boundaries(loads):
    assert systems.boundaries(60, 25) == [5, 25, 50]
    assert systems.boundaries(40, 10) == [5, 15, 25, 35]
    assert systems.boundaries(60, 0) == []
    for name in ("smartmoe", "flexmoe", "eplb"):
        moves = run(name, loads, every=10).parts["move"]
        assert moves[0].any()  # the first step that counts is a boundary
        assert not moves[1:10].any()
        assert not run(name, loads, every=0).parts["move"].any()
    assert run("flexmoe", loads, slots=3).copies.owned == 3 * run("ep", loads).copies.owned


def test_fastermoe_is_ep_where_nothing_is_skewed_but_for_its_schedule():
    even = load_model.drifting(30, 2, 16, SETUP.tokens, MODEL, 1.0)
    fused, plain = run("fastermoe", even), run("ep", even)
    whole = plain.parts["all-to-all"] + plain.parts["experts"]
    assert (fused.parts["fused"] < whole * 1.02).all()
    assert (fused.parts["fused"] > plain.parts["all-to-all"] * 0.99).all() or fused.copies.widest > 0
