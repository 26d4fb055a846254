"""The workloads of a token-imbalance benchmark: each skews what its name says, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness import presets
from harness.bench import suite
from harness.errors import UserError
from harness.routing import KNOWN_GENERATORS, counts_of
from harness.routing.generators import WHAT
from harness.specs import Model, Ragged, Workload
from harness.topology import Topology

NODES = Topology((2, 4))


def model(num_experts: int = 64, top_k: int = 8) -> Model:
    return Model(name="m", num_layers=4, hidden=8, ffn=8, num_experts=num_experts, top_k=top_k)


def received(counts: np.ndarray, num_units: int) -> np.ndarray:
    """Rows that each of ``num_units`` ranks or nodes receives from each rank, [W, units]; experts lie in order."""
    return counts.reshape(len(counts), num_units, -1).sum(2)


def of_preset(name: str, step: int = 0) -> np.ndarray:
    return counts_of(presets.workload(name), model(), NODES, step=step)


def max_over_mean(load: np.ndarray) -> float:
    return float(load.max() / load.mean())


# what max/mean is: of experts, of what ranks receive, of what ranks send
EIGHT = {
    "balanced-2048": (1, 1, 1),
    "hot-experts": (4, None, 1),  # on whichever rank they lie
    "hot-rank": (4, 4, 1),
    "spread-hot-experts": (4, 1, 1),
    "ragged-sources": (1, 1, 1.75),
    "empty-ranks": (64 / 52, 64 / 52, 1),
    "rotating": (4, None, 1),
    "burst": (4, None, 1),
}


@pytest.mark.parametrize("name", EIGHT)
def test_each_of_the_eight_skews_what_it_says(name):
    counts = of_preset(name)
    found = [max_over_mean(each) for each in (counts.sum(0), received(counts, 8).sum(0), counts.sum(1))]
    for what, value, wanted in zip(("experts", "ranks", "sources"), found, EIGHT[name], strict=True):
        assert wanted is None or value == pytest.approx(wanted, rel=2e-3), what
    assert name == "balanced-2048" or "7488, W" in presets.workload(name).source
    if name == "empty-ranks":
        assert (received(counts, 8).sum(0) == 0).sum() == 1
        assert (counts.sum(0) == 0).sum() == 8 + 4
    if name in ("rotating", "burst"):
        later = of_preset(name, step=11 if name == "rotating" else 5)
        hot, then = (np.flatnonzero(each.sum(0) > 2 * each.sum(0).mean()) for each in (counts, later))
        assert len(hot) == 8
        assert set(hot).isdisjoint(then)
        assert len(then) == (8 if name == "rotating" else 0)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 8)),
    each=st.integers(1, 4),
    data=st.data(),
    step=st.integers(0, 3),
)
def test_balanced_is_balanced_between_ranks_also_where_there_are_more_ranks_than_k(shape, each, data, step):
    topology = Topology(shape)
    num_ranks = topology.num_ranks
    top_k = data.draw(st.integers(1, max(1, num_ranks // 2)) | st.integers(1, num_ranks * each))
    tokens = data.draw(st.integers(0, 40) | st.lists(st.integers(0, 40), min_size=num_ranks, max_size=num_ranks))
    workload = Workload(name="w", tokens_per_rank=tokens if isinstance(tokens, list) else max(tokens, 1), seed=step)
    counts = counts_of(workload, model(num_ranks * each, top_k), topology, step=step)
    for sent in (counts, received(counts, num_ranks), received(counts, shape[0])):
        assert np.ptp(sent, axis=1).max() <= 1  # from each rank: to experts, ranks, nodes
        assert np.ptp(sent.sum(0)) <= (counts.sum() % sent.shape[1] > 0)  # in all: equal where it can be


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 8)),
    each=st.integers(1, 6),
    data=st.data(),
    layer=st.integers(0, 3),
)
def test_spread_hot_experts_are_as_many_on_every_rank_and_node(shape, each, data, layer):
    topology = Topology(shape)
    num_experts = topology.num_ranks * each
    assume(num_experts > 1)
    num_hot = data.draw(st.integers(1, num_experts - 1))
    share = num_hot / num_experts + data.draw(st.floats(0.1, 0.9)) * (1 - num_hot / num_experts)
    params = {"hot_experts": num_hot, "share": share}
    workload = Workload(name="w", tokens_per_rank=4096, generator="spread_hot_experts", params=params)
    counts = counts_of(workload, model(num_experts, 1), topology, layer=layer)
    hot = counts.sum(0) > counts.sum() / num_experts * (1 + 1e-9)
    assert hot.sum() == num_hot
    assert counts.sum(0)[hot].sum() / counts.sum() == pytest.approx(share, abs=0.01)
    for units in (topology.num_ranks, shape[0]):
        assert np.ptp(hot.reshape(units, -1).sum(1)) <= 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_ranks=st.sampled_from([2, 4, 8]))
def test_ranks_without_tokens_are_as_many_as_asked_for(data, num_ranks):
    empty_ranks = data.draw(st.integers(1, num_ranks - 1))
    left = 64 - empty_ranks * 64 // num_ranks
    top_k = data.draw(st.integers(1, left))
    num_empty = data.draw(st.integers(0, left - top_k))
    params = {"num_empty": num_empty, "empty_ranks": empty_ranks}
    workload = Workload(name="w", tokens_per_rank=512, generator="empty", params=params)
    counts = counts_of(workload, model(64, top_k), Topology((1, num_ranks)))
    idle = counts.sum(0) == 0
    assert idle.sum() == num_empty + empty_ranks * 64 // num_ranks
    assert idle.reshape(num_ranks, -1).all(1).sum() >= empty_ranks
    assert np.ptp(counts[:, ~idle], axis=1).max() <= 1


@settings(max_examples=80, deadline=None)
@given(
    num_ranks=st.integers(1, 70),
    units=st.integers(1, 500),
    multiple=st.sampled_from([1, 3, 128]),
    most=st.floats(1, 2),
)
def test_ragged_sources_fall_evenly_and_keep_the_mean(num_ranks, units, multiple, most):
    ragged = Ragged(mean=units * multiple, max_over_mean=most, multiple=multiple)
    tokens = np.array(Workload(name="w", tokens_per_rank=ragged).tokens(num_ranks)) / multiple
    assert tokens.sum() == num_ranks * units
    assert (tokens == np.rint(tokens)).all()
    assert (tokens >= 0).all()
    if num_ranks > 1:
        assert tokens[0] == pytest.approx(most * units, abs=1)
        assert np.ptp(np.diff(tokens)) <= 4  # as even as whole numbers are


def test_a_ragged_workload_has_its_own_digest_and_others_keep_theirs():
    ragged, even = presets.workload("ragged-sources"), presets.workload("balanced-2048")
    assert Workload.model_validate(ragged.model_dump(mode="json")) == ragged
    other = {"tokens_per_rank": Ragged(mean=2048, max_over_mean=1.5)}
    assert len({ragged.digest, even.digest, ragged.model_copy(update=other).digest}) == 3
    assert even.digest == "f95537496256b671"


def test_every_generator_is_described():
    assert set(WHAT) == set(KNOWN_GENERATORS)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"tokens_per_rank": {"mean": 0}}, ["workload w.tokens_per_rank", "mean: 0"]),
        ({"tokens_per_rank": {"mean": 8, "max_over_mean": 2.5}}, ["max_over_mean: 2.5", "less than or equal to 2"]),
        ({"tokens_per_rank": {"mean": 8, "multiple": 3}}, ["8 is no multiple of 3"]),
        ({"tokens_per_rank": {"mean": 8, "max_mean": 2}}, ["unknown field", "did you mean 'max_over_mean'"]),
        ({"generator": "empty", "params": {"num_empty": 0}}, ["params.num_empty: 0", "empty_ranks"]),
        ({"generator": "empty", "params": {"empty_ranks": 8}}, ["params.empty_ranks: 8", "k = 8 of 64"]),
        ({"generator": "empty", "params": {"empty_ranks": -1}}, ["params.empty_ranks: -1"]),
        ({"generator": "spread_hot_experts", "params": {"hot_experts": 65}}, ["hot_experts: 65", "64 experts"]),
        ({"generator": "spread_hot_experts", "params": {"share": 0.05}}, ["params.share: 0.05", "0.125 to 1"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields, parts):
    with pytest.raises(UserError) as error:
        counts_of(Workload.parse({"name": "w", **fields}, "workload w"), model(), NODES)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_ragged_samples_are_whole_or_the_remedy_is_named():
    text = """
name: demo
experiments:
  - model: {num_layers: 1, hidden: 16, ffn: 8, num_experts: 8, top_k: 2, seq: 16}
    cluster: local-4
    workload: {tokens_per_rank: {mean: 64, max_over_mean: 1.5, multiple: 16}}
    system: flat
    phase: train_step
"""
    (race,) = suite.parse(text, "demo.yaml").races
    assert race.first.workload.tokens(4) == (96, 80, 48, 32)
    with pytest.raises(UserError, match=r"multiple of model.seq = 16; give it as tokens_per_rank.multiple"):
        suite.parse(text.replace(", multiple: 16", ""), "demo.yaml")
