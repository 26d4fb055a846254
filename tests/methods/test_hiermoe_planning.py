"""HierMoE's planners: counts, time model, choice of d, and swaps, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import presets
from harness.errors import UserError
from harness.placement import Placement
from harness.routing.types import Routing
from harness.topology import Topology
from methods.hiermoe.counts import Stage, count, counted_duplication, duplication, stages
from methods.hiermoe.planner import PlannerModel, choose, stage_costs
from methods.hiermoe.swap import Objective, Statistics, best_swap, collect, groups

SHAPES = [(2, 4), (4, 2), (2, 2, 2), (2, 2, 2, 2)]


def random_routing(seed: int, num_ranks: int, num_experts: int, top_k: int, most: int = 6) -> Routing:
    rng = np.random.default_rng(seed)
    tokens = tuple(rng.integers(0, most, num_ranks).tolist())
    popular = rng.gamma(0.5, size=num_experts) + 1e-3
    keys = rng.exponential(size=(sum(tokens), num_experts)) / popular
    return Routing(np.argsort(keys, axis=1)[:, :top_k].astype(np.int32), tokens, num_experts)


def walked_rows(routing: Routing, owner: np.ndarray, topology: Topology, dimension: int, deduplicated: bool) -> list:
    """Rows per stage, token by token: every copy walks from rank to rank."""
    found = []
    at = {(t, e): int(routing.source[t]) for t, ids in enumerate(routing.ids) for e in ids.tolist()}
    for stage in stages(dimension, topology.num_levels):
        rows = np.zeros((topology.num_ranks,) * 2, dtype=np.int64)
        sent = set()
        for (t, e), here in at.items():
            there = topology.coordinates[here].copy()
            there[: stage.b] = topology.coordinates[owner[e]][: stage.b]
            to = int(np.ravel_multi_index(tuple(there), topology.shape))
            if not deduplicated or (t, here, to) not in sent:
                rows[here, to] += 1
                sent.add((t, here, to))
            at[t, e] = to
        found.append(rows)
    assert all(owner[e] == rank for (_, e), rank in at.items())
    return found


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES), st.integers(1, 4))
def test_counted_rows_are_those_of_a_walk_token_by_token(seed, shape, top_k):
    topology = Topology(shape)
    routing = random_routing(seed, topology.num_ranks, 16, top_k)
    owner = np.random.default_rng(seed).permutation(Placement.contiguous(16, topology.num_ranks).owner)
    counts = count(routing, owner, topology)
    for dimension, deduplicated in itertools.product(range(1, topology.num_levels + 1), (True, False)):
        walked = walked_rows(routing, owner, topology, dimension, deduplicated)
        for stage, rows in zip(stages(dimension, topology.num_levels), walked, strict=True):
            np.testing.assert_array_equal(counts.rows(stage, deduplicated=deduplicated), rows)


TABLE_2 = {32: (2, 4, 7, 9), 16: (3, 9, 14, 18), 8: (6, 17, 27, 34), 4: (12, 32, 46, 55)}


@pytest.mark.parametrize("num_groups", TABLE_2)
def test_duplication_is_that_of_table_2_and_is_what_uniform_routing_has(num_groups):
    rng = np.random.default_rng(0)
    for top_k, printed in zip((2, 4, 6, 8), TABLE_2[num_groups], strict=True):
        rate = duplication(top_k, 256, num_groups)
        assert 100 * rate == pytest.approx(printed, abs=1.1)  # printed without decimals
        ids = rng.random((20000, 256)).argpartition(top_k, axis=1)[:, :top_k]
        assert counted_duplication(ids, 256, num_groups) == pytest.approx(rate, abs=0.005)


def test_the_time_is_the_sum_over_stages_of_alpha_and_the_largest_message():
    model = PlannerModel(presets.cluster("hiermoe"))
    topology = Topology(model.cluster.shape)
    routing = random_routing(1, 32, 64, 4, most=60)
    counts = count(routing, Placement.contiguous(64, 32).owner, topology)
    times = model.times(counts, 7168)
    constants = model.cluster.collectives

    def cost(key: str, size: int, stage: Stage) -> float:
        return constants[key].alpha_s + constants[key].beta_s_per_byte * size * counts.rows(stage).max() * 7168

    assert times[0] == pytest.approx(cost("a2a.flat", 32, Stage(0, 4)))
    assert times[1] == pytest.approx(cost("a2a.inter1", 4, Stage(0, 1)) + cost("a2a.intra1", 8, Stage(1, 4)))
    three = [("a2a.inter1", 4, Stage(0, 1)), ("a2a.inter2", 2, Stage(1, 2)), ("a2a.intra2", 4, Stage(2, 4))]
    assert times[2] == pytest.approx(sum(cost(*each) for each in three))
    four = [*three[:2], ("a2a.inter3", 2, Stage(2, 3)), ("a2a.intra3", 2, Stage(3, 4))]
    assert times[3] == pytest.approx(sum(cost(*each) for each in four))
    piped = model.times(counts, 7168, chunks=4)
    alone = model.times(counts, 7168)
    assert (piped[1:] > alone[1:] / 2).all()


def test_the_paper_s_constants_choose_three_dimensions_for_uniform_routing():
    """With 1,024 tokens a rank and k = 8: HD3 is best, and by little (the two models' times: derived from Fig. 9)."""
    model = PlannerModel(presets.cluster("hiermoe"))
    rng = np.random.default_rng(0)
    for num_experts, hidden, wanted in ((256, 3584, (31.1, 21.9, 20.9, 21.6)), (128, 2048, (18.3, 13.0, 12.4, 12.9))):
        ids = rng.random((32 * 1024, num_experts)).argpartition(8, axis=1)[:, :8].astype(np.int32)
        routing = Routing(ids, (1024,) * 32, num_experts)
        counts = count(routing, Placement.contiguous(num_experts, 32).owner, Topology(model.cluster.shape))
        times = model.times(counts, 2 * hidden)
        assert choose(times) == 3
        means = []  # with the mean of p in place of its maximum, as those figures were computed
        for dimension in range(1, 5):
            total = 0.0
            for stage in stages(dimension, 4):
                rows, cost = counts.rows(stage), model.cost(stage)
                total += cost.alpha_s + cost.beta_s_per_byte * rows.sum() / 32 * 2 * hidden
            means.append(total)
        assert 1e3 * np.array(means) == pytest.approx(wanted, rel=0.02)
        assert (times > means).all()


def test_d_is_one_only_if_it_is_less_than_all_others():
    assert choose(np.array([1.0])) == 1
    assert choose(np.array([1.0, 2.0, 3.0])) == 1
    assert choose(np.array([2.0, 2.0, 3.0])) == 2
    assert choose(np.array([5.0, 3.0, 2.0, 2.0])) == 3


def test_costs_by_level_are_costs_by_stage():
    cluster = presets.cluster("emulated-2x4").model_copy(update={"collectives": presets.cluster("hiermoe").collectives})
    assert stage_costs(presets.cluster("emulated-2x4")) is None
    costs = {"a2a.node": cluster.collectives["a2a.inter1"], "a2a.rank": cluster.collectives["a2a.intra1"]}
    known = stage_costs(cluster.model_copy(update={"collectives": costs | {"a2a.flat": costs["a2a.node"]}}))
    assert known.collectives["a2a.inter1"] == costs["a2a.node"]
    assert known.collectives["a2a.intra1"] == costs["a2a.rank"]
    with pytest.raises(UserError, match="moebench profile emulated-2x4"):
        PlannerModel(presets.cluster("emulated-2x4")).cost(Stage(0, 1))


# ---- swaps ----------------------------------------------------------------------------------------------------------


def brute_force(routing: Routing, owner: np.ndarray, topology: Topology, objective: Objective) -> np.ndarray:
    """The objective [E, E] after every swap, by counting all tokens anew."""

    def value(placed: np.ndarray) -> float:
        counts = count(routing, placed, topology)
        filled = [counts.distinct[b - 1].sum(0) for b in objective.levels]
        return objective.value_s(filled, routing.ids.size, topology.num_ranks)

    num_experts = len(owner)
    found = np.full((num_experts, num_experts), value(owner))
    for r, c in itertools.combinations(range(num_experts), 2):
        swapped = owner.copy()
        swapped[[r, c]] = owner[[c, r]]
        found[r, c] = found[c, r] = value(swapped)
    return found


SWAPS = given(
    st.integers(0, 10**6),
    st.sampled_from(SHAPES),
    st.integers(1, 4),
    st.sampled_from(["smooth", "plain", "log-sum-exp"]),
    st.data(),
)


@settings(max_examples=12, deadline=None, derandomize=True)
@SWAPS
def test_the_best_swap_is_that_of_brute_force(seed, shape, top_k, function, data):
    compare_with_brute_force(seed, shape, top_k, function, data)


@pytest.mark.long
@settings(max_examples=200, deadline=None, derandomize=True)
@SWAPS
def test_the_best_swap_is_that_of_brute_force_in_200_cases(seed, shape, top_k, function, data):
    compare_with_brute_force(seed, shape, top_k, function, data)


def compare_with_brute_force(seed, shape, top_k, function, data):
    topology = Topology(shape)
    dimension = data.draw(st.integers(1, topology.num_levels))
    objective = Objective(
        tuple(stage.b for stage in stages(dimension, topology.num_levels)),
        tuple(np.random.default_rng(seed).uniform(1e-6, 1e-5, dimension).tolist()),
        1e-3,
        function,
        data.draw(st.sampled_from([5.0, 10.0, 19.0])),
    )
    routing = random_routing(seed, topology.num_ranks, 16, top_k)
    owner = np.random.default_rng(seed).permutation(Placement.contiguous(16, topology.num_ranks).owner)
    group = groups(owner, topology, objective.levels)
    parts = [collect(routing.of_rank(rank), group, topology.num_ranks) for rank in range(topology.num_ranks)]
    total = parts[0].unflat(np.sum([part.flat() for part in parts], axis=0, dtype=np.int32))  # as one all-reduce would
    found = best_swap(total, group, objective, topology.num_ranks)
    every = brute_force(routing, owner, topology, objective)
    assert found.before_s == pytest.approx(every[0, 0])
    assert found.after_s == pytest.approx(every.min(), rel=1e-9)
    if found.r >= 0:
        assert every[found.r, found.c] == pytest.approx(every.min(), rel=1e-9)
    else:
        assert every.min() == pytest.approx(every[0, 0], rel=1e-9)


def test_the_paper_s_example():
    """Fig. 7: four experts in two groups; tokens per group after each swap across them. The paper's counts fix its four
    tokens but for one, which needs the first two experts or the last two."""
    printed = {(0, 2): [4, 4], (1, 3): [4, 4], (1, 2): [3, 2], (0, 3): [2, 3]}
    for first in ([0, 1], [2, 3]):
        ids = np.array([first, [0, 2], [0, 2], [1, 3]], dtype=np.int32)
        for (r, c), wanted in printed.items():
            owner = np.array([0, 0, 1, 1])
            owner[[r, c]] = owner[[c, r]]
            counts = count(Routing(ids, (4, 0), 4), owner, Topology((2,)))
            assert counts.distinct[0].sum(0).tolist() == wanted


def test_no_swap_is_proposed_where_none_pays_and_bad_options_are_named():
    topology = Topology((2, 2))
    ids = np.arange(8, dtype=np.int32)[:, None] % 4  # one expert a rank, all alike
    group = groups(np.arange(4), topology, (1, 2))
    objective = Objective((1, 2), (1e-6, 1e-6), 0.0)
    found = best_swap(collect(ids, group, 4), group, objective, 4)
    assert (found.r, found.c) == (-1, -1)
    assert found.before_s == found.after_s
    empty = best_swap(Statistics.empty(4, 2, 4), group, objective, 4)
    assert (empty.r, empty.before_s) == (-1, 0)
    with pytest.raises(UserError, match=r"options.max: 'median'"):
        Objective((1,), (1e-6,), 0.0, "median")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"options.gamma: 0"):
        Objective((1,), (1e-6,), 0.0, "smooth", 0)
