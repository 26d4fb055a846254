from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.bench import tidy
from harness.errors import UserError
from harness.layer import gates
from harness.layer.weights import Weights
from harness.placement import Placement
from harness.routing import certify, counts_of, make_routing, sampled_routing
from harness.routing.certificate import expert_counts
from harness.specs import Experiment, Model, Workload, with_levels
from harness.topology import Topology

DEEPSEEK = Model(
    name="d", num_layers=1, hidden=128, ffn=8, num_experts=64, top_k=8, gate="sigmoid", num_groups=8, topk_groups=4
)
MOGE = DEEPSEEK.model_copy(update={"gate": "moge", "topk_groups": None})
NODES = Topology((2, 4))


def workload(generator: str, **params: float) -> Workload:
    return Workload(name="w", tokens_per_rank=300, generator=generator, params=params)


def test_a_group_limited_gate_can_choose_every_prescribed_routing() -> None:
    """Whatever the generator wanted: the real gate, given steered inputs, takes exactly the routing's experts."""
    weights = Weights(DEEPSEEK, "float64")
    for work in (workload("balanced"), workload("zipf", target=4.0), workload("hot_rank", rank=0, share=0.3)):
        routing = make_routing(work, DEEPSEEK, Topology((2, 2)))
        assert routing is not None
        assert (np.diff(np.sort(routing.ids, axis=1), axis=1) > 0).all()  # k distinct experts
        assert max(len(set(row)) for row in (routing.ids // 8).tolist()) <= 4
        ids = torch.as_tensor(routing.ids.astype(np.int64))
        x = gates.steer(torch.randn(len(ids), 128, dtype=torch.float64), weights.router, ids)
        chosen, _ = gates.route(DEEPSEEK, x @ weights.router, weights.bias)
        assert torch.equal(chosen.sort(-1).values, ids.sort(-1).values)


def test_what_was_hot_stays_hot_and_other_gates_keep_their_routing() -> None:
    free = DEEPSEEK.model_copy(update={"gate": "gshard"})
    work = workload("zipf", target=4.0)
    wanted, limited = (make_routing(work, model, Topology((2, 2))) for model in (free, DEEPSEEK))
    assert wanted is not None
    assert limited is not None
    use = [np.bincount(routing.ids.ravel(), minlength=64) for routing in (wanted, limited)]
    hottest = [set(per_expert.argsort()[-8:].tolist()) for per_expert in use]
    assert len(hottest[0] & hottest[1]) >= 6
    assert np.corrcoef(*use)[0, 1] > 0.95
    per_group = [per_expert.reshape(8, 8).sum(1) for per_expert in use]
    np.testing.assert_allclose(per_group[1], per_group[0], rtol=0.15)  # no group is favoured
    assert (wanted.ids != limited.ids).any()
    untouched = make_routing(work, DEEPSEEK.model_copy(update={"topk_groups": 8}), Topology((2, 2)))
    assert untouched is not None
    np.testing.assert_array_equal(untouched.ids, wanted.ids)


def of_groups(ids: np.ndarray) -> np.ndarray:
    """Experts of each token in each of 8 groups of 8, [T, 8]."""
    return (ids[:, :, None] // 8 == np.arange(8)).sum(1)


@pytest.mark.parametrize("target", [1.0, 3.0, 8.0])
def test_grouped_routing_is_even_over_groups_and_as_skewed_as_asked_inside_of_each(target: float) -> None:
    tokens = (300, 0, 1, 17, 64, 5, 2, 1111)
    for top_k in (8, 16):
        model = MOGE.model_copy(update={"top_k": top_k})
        given = Workload(
            name="w", tokens_per_rank=tokens, generator="grouped", params={"target": min(target, 64 / top_k)}
        )
        routing = make_routing(given, model, NODES)
        assert routing is not None
        assert (of_groups(routing.ids) == top_k // 8).all()
        assert (np.diff(np.sort(routing.ids, axis=1), axis=1) > 0).all()  # distinct
        counts = expert_counts(routing)
        assert np.array_equal(
            counts.reshape(8, 8, 8).sum(2), np.repeat(np.array(tokens)[:, None] * top_k // 8, 8, axis=1)
        )
        inside = counts.sum(0).reshape(8, 8)
        assert inside.max(1) / inside.mean(1) == pytest.approx(min(target, 64 / top_k), rel=0.03)
        if target > 1:
            assert len(set(inside.argmax(1).tolist())) > 1  # another expert is hot in each
        again = [make_routing(given, model, NODES, step=step).digest for step in (0, 1)]  # type: ignore[union-attr]
        assert again[0] == routing.digest
        assert target == 8 or again[1] != routing.digest  # there every token takes the same experts


def test_grouped_routing_is_random_in_everything_else() -> None:
    ids = make_routing(Workload(name="w", tokens_per_rank=512, generator="grouped"), MOGE, NODES).ids  # type: ignore[union-attr]
    used = np.zeros((len(ids), 64))
    np.put_along_axis(used, ids, 1, 1)
    met = (used.T @ used).reshape(8, 8, 8, 8)  # group and expert in it, twice
    expected = len(ids) / 64
    pairs = np.concatenate([met[g, :, h].ravel() for g in range(8) for h in range(8) if g != h])
    assert pairs.mean() == pytest.approx(expected)
    assert pairs.std() < 1.1 * expected**0.5
    first = np.bincount(ids[:, 0], minlength=64)  # the best expert is no special one
    assert first.max() < 1.5 * first.mean()


@pytest.mark.parametrize(
    "work",
    [
        workload("balanced"),
        workload("zipf", target=4.0),
        workload("hot_rank", rank=0, share=0.5),
        workload("empty", num_empty=50),
        workload("uniform"),
        workload("markov", strength=0.7),
        workload("grouped", target=3.0),
    ],
    ids=lambda work: work.generator,
)
def test_a_moge_gate_can_choose_every_prescribed_routing(work: Workload) -> None:
    """Whatever the generator wanted, the real gate takes it; and its groups, so ranks that hold one, are even."""
    weights = Weights(MOGE, "float64")
    routing = make_routing(work, MOGE, NODES)
    assert routing is not None
    ids = torch.as_tensor(routing.ids.astype(np.int64))
    x = gates.steer(torch.randn(len(ids), 128, dtype=torch.float64), weights.router, ids)
    chosen, _ = gates.route(MOGE, x @ weights.router)
    assert torch.equal(chosen.sort(-1).values, ids.sort(-1).values)
    found = certify(routing, Placement.contiguous(64, 8), NODES, num_groups=8).max_over_mean
    assert (found["group"], found["rank"], found["node"]) == (1, 1, 1)
    free = make_routing(work, MOGE.model_copy(update={"gate": "gshard"}), NODES)
    other = certify(free, Placement.contiguous(64, 8), NODES, num_groups=8).max_over_mean  # type: ignore[arg-type]
    assert (other["group"] > 1) == (work.generator not in ("balanced", "grouped"))
    assert other["group"] == other["rank"]
    few = sampled_routing(work, MOGE, NODES, most_tokens=32)
    assert (of_groups(few.ids) == 1).all()
    near = counts_of(work, MOGE, NODES, most_tokens=32)  # as plans of large models have it
    assert (near.reshape(8, 8, 8).sum(2) == 300).all()


def test_moge_keeps_what_fits_and_what_was_hot() -> None:
    given = workload("zipf", target=4.0)
    wanted, found = (make_routing(given, model, NODES) for model in (MOGE.model_copy(update={"gate": "gshard"}), MOGE))
    assert wanted is not None
    assert found is not None
    fits = (of_groups(wanted.ids) == 1).all(1)
    assert np.array_equal(wanted.ids[fits], found.ids[fits])
    for token in np.flatnonzero(~fits)[:50]:  # of each group that a token wanted, it keeps one of what it wanted
        kept = set(wanted.ids[token].tolist()) & set(found.ids[token].tolist())
        assert len(kept) == len(set((wanted.ids[token] // 8).tolist()))
    inside = [expert_counts(routing).sum(0).reshape(8, 8) for routing in (wanted, found)]
    assert np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(*inside, strict=True)]) > 0.9


def test_certificates_of_grouped_routings_state_the_load_per_group() -> None:
    def certificate(model: Model, generator: str, **params: float) -> dict[str, float]:
        experiment = Experiment(
            model=model,
            cluster=with_levels("c", [{"name": "rank", "size": 4}], kind="local"),
            workload=workload(generator, **params),
            system="flat",
            phase="layer",
        )
        found = tidy.certificate(experiment)
        assert found is not None
        return found.max_over_mean

    free = MOGE.model_copy(update={"gate": "gshard", "num_groups": 1})
    assert certificate(MOGE, "zipf", target=4.0)["group"] == 1
    skewed = certificate(free, "grouped", num_groups=8, target=4.0)
    assert skewed["group"] == skewed["rank"] == 1
    assert skewed["expert"] == pytest.approx(4.0, rel=0.03)
    assert "group" not in certificate(free, "zipf", target=4.0)
    assert "group" not in certificate(DEEPSEEK, "balanced")
    routing = make_routing(workload("uniform"), free, Topology((4,)))
    with pytest.raises(UserError, match=r"num_groups: 6: must divide the 64 experts"):
        certify(routing, Placement.contiguous(64, 4), Topology((4,)), num_groups=6)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("groups_of_model", "params", "message"),
    [
        (1, {}, r"workload w \(grouped\).params.num_groups: None: give 2 or more groups; the model names none"),
        (1, {"num_groups": 1}, "params.num_groups: 1: give 2 or more"),
        (1, {"num_groups": 16}, "params.num_groups: 16: must divide the 64 experts and k = 8; choose another"),
        (8, {"num_groups": 4}, "params.num_groups: 4: the model has 8 groups of experts; leave it out"),
        (8, {"target": 9.0}, "params.target: 9.*E / k = 8"),
        (8, {"groups": 8}, "params.groups: 8: unknown field"),
    ],
)
def test_bad_groups_are_named(groups_of_model: int, params: dict[str, float], message: str) -> None:
    gate = "moge" if groups_of_model > 1 else "gshard"
    model = MOGE.model_copy(update={"num_groups": groups_of_model, "gate": gate})
    for made in (make_routing, counts_of):
        with pytest.raises(UserError, match=message) as error:
            made(workload("grouped", **params), model, NODES)
        assert "\n" not in str(error.value)
