from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.placement import Placement
from harness.routing import KNOWN_GENERATORS, certify, make_routing
from harness.routing.certificate import expert_counts
from harness.routing.types import Routing
from harness.specs import Model, Workload
from harness.topology import Topology

NODES = Topology((2, 4))
ALL = [name for name in KNOWN_GENERATORS if name not in ("trace", "natural")]
PARAMS = {"grouped": {"num_groups": 8}}  # of those that need some


def model(num_experts: int = 64, top_k: int = 8) -> Model:
    return Model(name="m", num_layers=4, hidden=8, ffn=8, num_experts=num_experts, top_k=top_k)


def made(
    generator: str, tokens: int | tuple[int, ...] = 512, *, m: Model | None = None, topology=NODES, **kw
) -> Routing:
    where = {key: kw.pop(key) for key in ("step", "layer") if key in kw}
    workload = Workload(name="w", tokens_per_rank=tokens, generator=generator, params=kw, seed=3)
    routing = make_routing(workload, m or model(), topology, **where)
    assert routing is not None
    return routing


def load(routing: Routing) -> np.ndarray:
    return expert_counts(routing).sum(0)


def distinct(routing: Routing) -> bool:
    ordered = np.sort(routing.ids, axis=1)
    return bool((ordered[:, 1:] > ordered[:, :-1]).all())


@pytest.mark.parametrize("generator", ALL)
def test_same_inputs_same_routing_and_k_distinct_experts(generator):
    tokens = (300, 0, 1, 17, 64, 5, 2, 111)
    params = PARAMS.get(generator, {})
    first, again = made(generator, tokens, **params), made(generator, tokens, **params)
    assert first.digest == again.digest
    assert np.array_equal(first.ids, again.ids)
    assert distinct(first)
    assert first.ids.dtype == np.int32
    for other in ({"step": 1}, {"layer": 1}):
        assert made(generator, tokens, **params, **other).digest != first.digest


shapes = st.tuples(st.integers(1, 3), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    experts_per_rank=st.integers(1, 5),
    data=st.data(),
    step=st.integers(0, 3),
    layer=st.integers(0, 3),
)
def test_balanced_is_balanced_on_every_rank_and_between_all_of_them(shape, experts_per_rank, data, step, layer):
    topology = Topology(shape)
    num_experts = experts_per_rank * topology.num_ranks
    top_k = data.draw(st.integers(1, num_experts))
    tokens = tuple(data.draw(st.lists(st.integers(0, 70), min_size=topology.num_ranks, max_size=topology.num_ranks)))
    m = model(num_experts, top_k)
    routing = made("balanced", tokens, m=m, topology=topology, step=step, layer=layer)
    placement = Placement.contiguous(num_experts, topology.num_ranks)
    certificate = certify(routing, placement, topology)
    counts = expert_counts(routing)  # [W, E]

    assert distinct(routing)
    assert certificate.balanced
    assert certificate.worst_rank_expert <= certificate.balanced_bound * (1 + 1e-12)
    assert np.ptp(counts, axis=1).max() <= 1  # on every rank
    assert np.ptp(counts.sum(0)) <= 1  # over all ranks
    to_rank = counts.reshape(topology.num_ranks, topology.num_ranks, -1).sum(2)
    to_node = counts.reshape(topology.num_ranks, shape[0], -1).sum(2)
    assert np.ptp(to_rank, axis=1).max() <= 1  # towards every rank
    assert np.ptp(to_node, axis=1).max() <= 1  # towards every node


def test_balanced_is_random_in_everything_else():
    """Any two experts meet as often as chance has it, and experts come in no fixed stride."""
    routing = made("balanced", 2048)
    used = np.zeros((len(routing.ids), 64))
    np.put_along_axis(used, routing.ids, 1, 1)
    met = (used.T @ used)[~np.eye(64, dtype=bool)]
    expected = len(routing.ids) * 8 * 7 / (64 * 63)
    assert met.mean() == pytest.approx(expected)
    assert met.std() < 1.1 * expected**0.5
    steps = np.diff(routing.ids.astype(int), axis=1)
    assert np.unique(steps).size > 100
    first = np.bincount(routing.ids[:, 0], minlength=64)  # the best expert is no special one
    assert first.max() < 1.4 * first.mean()


def test_uniform_is_balanced_only_on_average():
    certificate = certify(made("uniform", 2048), Placement.contiguous(64, 8), NODES)
    assert certificate.max_over_mean["expert"] < 1.1
    assert 1.1 < certificate.worst_rank_expert < 1.4
    assert not certificate.balanced


@pytest.mark.parametrize(
    ("num_experts", "top_k", "target"), [(64, 8, 2), (64, 8, 8), (64, 2, 16), (8, 1, 8), (256, 8, 5)]
)
def test_zipf_realises_its_target(num_experts, top_k, target):
    routing = made("zipf", 1024, m=model(num_experts, top_k), target=target)
    loads = load(routing)
    assert loads.max() / loads.mean() == pytest.approx(target, rel=0.02)
    assert distinct(routing)
    certificate = certify(routing, Placement.contiguous(num_experts, 8), NODES)
    assert certificate.worst_rank_expert == pytest.approx(target, rel=0.03)


def test_zipf_is_zipf():
    loads = np.sort(load(made("zipf", 4096, target=4)))[::-1]
    slope = np.polyfit(np.log(np.arange(1, 65)), np.log(loads), 1)
    assert np.abs(np.log(loads) - np.polyval(slope, np.log(np.arange(1, 65)))).max() < 0.02


@pytest.mark.parametrize(("generator", "hot"), [("hot_experts", 8), ("rotating", 8), ("burst", 8)])
def test_the_hot_set_gets_its_share(generator, hot):
    loads = np.sort(load(made(generator, share=0.4, hot_experts=hot)))[::-1]
    assert loads[:hot].sum() / loads.sum() == pytest.approx(0.4, abs=0.002)
    assert loads[:hot].max() / loads[:hot].min() < 1.01


def test_hot_rank_gets_its_share():
    loads = load(made("hot_rank", rank=5, share=0.6)).reshape(8, 8).sum(1)
    assert loads.argmax() == 5
    assert loads[5] / loads.sum() == pytest.approx(0.6, abs=0.002)


def test_the_hot_set_stays_rotates_or_bursts():
    def hot(generator: str, step: int, **params) -> set[int]:
        loads = load(made(generator, step=step, hot_experts=4, share=0.3, **params))
        return set(np.flatnonzero(loads > 1.5 * loads.mean()).tolist())

    assert hot("hot_experts", 0) == hot("hot_experts", 9)
    moved = [hot("rotating", step, period=3) for step in range(7)]
    assert moved[0] == moved[2]
    assert len(moved[0] | moved[3] | moved[6]) == 12
    assert [bool(hot("burst", step, period=4, length=1)) for step in range(6)] == [
        True,
        False,
        False,
        False,
        True,
        False,
    ]


def test_empty_experts_get_nothing():
    routing = made("empty", num_empty=10)
    assert (load(routing) == 0).sum() == 10
    assert certify(routing, Placement.contiguous(64, 8), NODES).num_empty_experts == 10
    assert (load(made("empty", num_empty=10, step=5)) == 0).tolist() == (load(routing) == 0).tolist()


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_markov_brings_the_successor_with_the_stated_strength(strength):
    m = model(32, 2)
    for layer in (0, 2):
        now = made("markov", 2048, m=m, layer=layer, strength=strength).ids
        then = made("markov", 2048, m=m, layer=layer + 1, strength=strength).ids
        pairs = np.zeros((32, 32))
        for j in range(2):
            np.add.at(pairs, (now[:, [j]], then), 1)
        brought = pairs.max(1) / pairs.sum(1) * 2  # of each expert: chance that its best successor follows
        by_chance = (1 - strength) * 2 / 32
        assert brought.mean() == pytest.approx(strength + by_chance, abs=0.04)
        loads = np.bincount(then.ravel(), minlength=32)
        assert loads.max() / loads.mean() < 1.15


def test_one_token_one_rank_every_expert():
    routing = made("balanced", 1, m=model(4, 4), topology=Topology((1, 1)))
    assert sorted(routing.ids[0].tolist()) == [0, 1, 2, 3]
    assert certify(routing, Placement.contiguous(4, 1), Topology((1, 1))).max_over_mean["link"] == 1


def test_natural_is_the_routers_own_choice():
    workload = Workload(name="natural", generator="natural")
    assert make_routing(workload, model(), NODES) is None
    with pytest.raises(UserError, match="no params"):
        make_routing(Workload(name="natural", generator="natural", params={"x": 1}), model(), NODES)


@pytest.mark.parametrize(
    ("generator", "params", "parts"),
    [
        ("zipf", {"target": 9}, ["workload w (zipf).params.target: 9", "E / k = 8"]),
        ("zipf", {"target": 0.5}, ["params.target: 0.5"]),
        ("zipf", {"alpha": 2}, ["params.alpha: 2", "known fields are target"]),
        ("balanced", {"share": 0.5}, ["params.share: 0.5", "unknown"]),
        ("hot_experts", {"share": 1.5}, ["params.share: 1.5"]),
        ("hot_experts", {"hot_experts": 2, "share": 0.5}, ["params.share: 0.5", "0.03125 to 0.25"]),
        ("hot_experts", {"hot_experts": 65, "share": 0.5}, ["params.hot_experts: 65", "64 experts"]),
        ("hot_experts", {"hot_experts": "many"}, ["params.hot_experts: 'many'"]),
        ("hot_rank", {"rank": 8}, ["params.rank: 8", "0 to 7"]),
        ("burst", {"length": 11}, ["params.length: 11", "period = 10"]),
        ("empty", {"num_empty": 57}, ["params.num_empty: 57", "at most 56"]),
        ("markov", {"strength": -0.1}, ["params.strength: -0.1"]),
        ("hot", {}, ["workload w.generator: 'hot'", "balanced, uniform"]),
    ],
)
def test_bad_params_are_named(generator, params, parts):
    workload = Workload(name="w", generator=generator, params=params)
    with pytest.raises(UserError) as error:
        make_routing(workload, model(), NODES)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
