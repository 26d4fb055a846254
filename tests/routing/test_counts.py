"""Loads without tokens, and samples of tokens: what whole routings have, for less."""

from __future__ import annotations

import numpy as np
import pytest

from harness.errors import UserError
from harness.routing import KNOWN_GENERATORS, Routing, counts_of, drawn, generators, planned_routing, sampled_routing
from harness.routing.certificate import expert_counts
from harness.specs import Model, Workload
from harness.topology import Topology

NODES = Topology((2, 4))
RAGGED = (300, 0, 1, 17, 64, 5, 2, 111)
MODEL = Model(name="m", num_layers=4, hidden=8, ffn=8, num_experts=64, top_k=8)
MOGE = MODEL.model_copy(update={"gate": "moge", "num_groups": 8})
GROUPED = MODEL.model_copy(update={"gate": "sigmoid", "num_groups": 8, "topk_groups": 3})
TRACE = {"path": "record-e64k8.parquet"}
STEPS = [{"step": 0, "layer": 0}, {"step": 0, "layer": 3}, {"step": 3, "layer": 1}, {"step": 12, "layer": 2}]


def workload(generator: str, tokens: int | tuple[int, ...] = RAGGED, **params: float | str) -> Workload:
    if generator == "trace":
        params = TRACE | params
    if generator == "grouped":
        params = {"target": 3.0, "num_groups": 8} | params
    return Workload(name="w", tokens_per_rank=tokens, generator=generator, params=params, seed=3)


def met(routing: Routing) -> np.ndarray:
    """Tokens that use both of two experts, [E, E]."""
    used = np.zeros((len(routing.ids), routing.num_experts))
    np.put_along_axis(used, routing.ids, 1, 1)
    return used.T @ used


@pytest.mark.parametrize("model", [MODEL, GROUPED, MOGE], ids=["free", "limited", "moge"])
@pytest.mark.parametrize("generator", KNOWN_GENERATORS)
def test_counts_are_those_of_the_tokens(generator, model):
    for tokens in (RAGGED, 96):
        given = workload(generator, tokens)
        for at in STEPS:
            wanted = expert_counts(planned_routing(given, model, NODES, **at))
            found = counts_of(given, model, NODES, **at)
            assert found.dtype == np.int64
            assert np.array_equal(found, wanted)


def test_stated_loads_need_no_tokens(monkeypatch):
    def deal(*_):
        raise AssertionError("a token was drawn")

    monkeypatch.setattr(generators, "deal", deal)
    for generator in generators.STATED:
        assert counts_of(workload(generator, 40), MODEL, NODES, step=7).sum() == 8 * 40 * 8
    with pytest.raises(AssertionError):
        planned_routing(workload("zipf", 41), MODEL, NODES)


def test_a_layer_does_not_depend_on_those_asked_for_before():
    given = workload("markov")

    def ids(step: int, layer: int) -> bytes:
        generators._generate.cache_clear()
        return planned_routing(given, MODEL, NODES, step=step, layer=layer).ids.tobytes()

    alone = {}
    for at in ((0, 3), (0, 1), (1, 2), (0, 2)):
        drawn._drawn_layer.cache_clear()
        alone[at] = ids(*at)
    for at in ((0, 1), (0, 2), (0, 3), (1, 2), (0, 2), (0, 1), (0, 3)):
        assert ids(*at) == alone[at], at


@pytest.mark.parametrize("model", [MODEL, GROUPED], ids=["free", "limited"])
@pytest.mark.parametrize("generator", KNOWN_GENERATORS)
def test_a_sample_has_the_loads_of_the_whole_in_proportion(generator, model):
    tokens = (1024, 900, 0, 7, 1024, 128, 129, 1024)
    given, at = workload(generator, tokens), {"step": 3, "layer": 2}
    whole, found = counts_of(given, model, NODES, **at), sampled_routing(given, model, NODES, **at)
    again = sampled_routing(given, model, NODES, **at)
    assert np.array_equal(found.ids, again.ids)
    assert found.tokens == (128, 128, 0, 7, 128, 128, 128, 128)
    ordered = np.sort(found.ids, axis=1)
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert found.ids.dtype == np.int32
    counts, share = expert_counts(found), (np.array(found.tokens) / np.maximum(tokens, 1))[:, None]
    off = np.abs(counts - whole * share)
    if generator in generators.STATED and model is MODEL:
        assert off.max() < 1
    else:  # 5 standard deviations of two draws
        assert (off <= 5 * np.sqrt((1 + share) * share * whole + 1)).all()
    other = sampled_routing(given, model, NODES, step=4, layer=1)
    assert not np.array_equal(found.ids, other.ids)


@pytest.mark.parametrize("generator", KNOWN_GENERATORS)
def test_a_sample_of_all_is_the_whole(generator):
    given = workload(generator)
    found = sampled_routing(given, MODEL, NODES, step=1, layer=1, most_tokens=300)
    assert np.array_equal(found.ids, planned_routing(given, MODEL, NODES, step=1, layer=1).ids)


@pytest.mark.parametrize("generator", ["balanced", "zipf"])
def test_experts_meet_in_a_sample_as_often_as_in_the_whole(generator):
    """Pairs, which nothing but chance decides: as many as in the whole, and no more scattered than they may be."""
    given = workload(generator, 1024)
    pairs = ~np.eye(64, dtype=bool)
    whole = met(planned_routing(given, MODEL, NODES))[pairs] / 8
    found = met(sampled_routing(given, MODEL, NODES))[pairs]
    assert found.sum() == pytest.approx(whole.sum())
    assert np.sqrt(np.mean((found - whole) ** 2 / whole)) == pytest.approx(1, abs=0.12)


def test_a_sample_holds_the_same_tokens_in_every_layer():
    def layers(generator: str, tokens: int, **params: float) -> list[Routing]:
        given = workload(generator, tokens, **params)
        return [sampled_routing(given, MODEL, NODES, layer=layer, most_tokens=50) for layer in (0, 1)]

    first, second = layers("markov", 400, strength=1.0)
    follows = [set(second.ids[(first.ids == expert).any(1)].ravel().tolist()) for expert in range(64)]
    successors = [
        {e for e in found if (second.ids[(first.ids == expert).any(1)] == e).any(1).all()}
        for expert, found in enumerate(follows)
    ]
    assert all(successors)  # some expert comes with each one of the layer before, whatever the token
    recorded = layers("trace", 400)
    whole = [planned_routing(workload("trace", 400), MODEL, NODES, layer=layer).ids for layer in (0, 1)]
    both = {row.tobytes() for row in np.concatenate(whole, axis=1)}
    assert all(row.tobytes() in both for row in np.concatenate([each.ids for each in recorded], axis=1))


@pytest.mark.parametrize("generator", ["markov", "zipf", "natural", "empty", "hot_rank"])
def test_counts_from_a_sample_are_near_the_true_ones(generator):
    """Nearer than chance has it in the sample: sums over ranks to 4 standard deviations of what was drawn."""
    tokens = np.array((1000, 0, 3, 500, 1000, 1000, 1000, 1000))
    given = workload(generator, tuple(tokens.tolist()))
    found = counts_of(given, GROUPED, NODES, layer=1, most_tokens=128)
    whole = counts_of(given, GROUPED, NODES, layer=1)
    assert np.array_equal(found.sum(1), 8 * tokens)
    assert (found <= tokens[:, None]).all()
    share = np.minimum(tokens, 128).sum() / tokens.sum()
    drawn = whole.sum(0) * share
    assert (np.abs(found.sum(0) * share - drawn) <= 4 * np.sqrt(drawn + 1)).all()
    busy = tokens > 100
    off = np.abs(found - whole)[busy] / np.sqrt(whole[busy] + 1)  # of a rank: as far as two draws lie apart
    assert np.sqrt(np.mean(off**2)) < 2.5


def test_loads_are_refused_as_tokens_are():
    for params, text in (({"target": 99.0}, "params.target: 99"), ({"x": 1}, "params.x")):
        for made in (planned_routing, counts_of, sampled_routing):
            with pytest.raises(UserError, match=text):
                made(workload("zipf", **params), MODEL, NODES)
    with pytest.raises(UserError, match=r"uniform.*params.x"):
        counts_of(workload("uniform", x=1.0), MODEL, NODES)
