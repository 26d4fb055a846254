"""MoETuner's programs against enumeration, and what its planner makes of bad input."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable

import numpy as np
import pytest

from harness import presets
from harness.errors import UserError
from harness.placing import Request, bandwidths
from harness.routing.trace import all_layers, find_trace, read_trace, split
from harness.specs import Model, with_levels
from harness.topology import Topology
from methods.moetuner import balance, joint, mapping, rivals, seconds
from methods.moetuner.objective import Problem, communication, cost_of, crossings, loads, random_owner, score
from methods.moetuner.placers import PLACERS, problem_of
from methods.moetuner.profile import Profile

FLAT3 = np.ones((3, 3))
TWO_NODES = np.where(np.arange(4)[:, None] // 2 == np.arange(4) // 2, 9.0, 1.0)


def profile(num_layers: int, num_experts: int, seed: int, num_tokens: int = 300, skew: float = 1.0) -> Profile:
    """Tokens that like some experts, and the successors of those they had."""
    rng = np.random.default_rng(seed)
    liking = rng.dirichlet(np.full(num_experts, 1 / skew), num_layers)
    ids = np.zeros((num_layers, num_tokens, 1), dtype=np.int32)
    for layer in range(num_layers):
        drawn = rng.choice(num_experts, num_tokens, p=liking[layer])
        follow = rng.permutation(num_experts)[ids[layer - 1, :, 0]]
        ids[layer, :, 0] = np.where((rng.random(num_tokens) < 0.5) & (layer > 0), follow, drawn)
    return Profile.of_ids(ids, num_experts)


def problem(made: Profile, bandwidth: np.ndarray, nodes: int = 1) -> Problem:
    num_ranks = len(bandwidth)
    return Problem(made, cost_of(bandwidth, num_ranks), Topology((nodes, num_ranks // nodes)).unit_of(0))


def partitions(num_experts: int, num_clusters: int) -> Iterable[np.ndarray]:
    for owner in itertools.product(range(num_clusters), repeat=num_experts):
        if len(set(owner)) == num_clusters:
            yield np.array(owner)


def test_profile_counts_loads_and_pairs() -> None:
    ids = np.array([[[0, 1], [2, 1]], [[1, 2], [0, 2]]])  # [L = 2, T = 2, k = 2]
    found = Profile.of_ids(ids, 4)
    assert found.load.tolist() == [[1, 2, 1, 0], [1, 1, 2, 0]]
    assert found.flow[0].tolist() == [[0, 1, 1, 0], [1, 1, 2, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert found.unused == {0: [3], 1: [3]}


def test_what_two_halves_have_in_common_repeats() -> None:
    """Tokens that choose at random leave differences that will not come back; likings and successors will."""
    rng = np.random.default_rng(0)
    chance = Profile.of_ids(rng.integers(0, 16, (6, 4096, 2)), 16)
    assert max(chance.repeats) < 0.4
    assert np.abs(chance.expected.load - 512).max() < np.abs(chance.load - 512).max() / 2
    liked = profile(6, 16, 1, num_tokens=4096)
    assert min(liked.repeats) > 0.95
    assert np.abs(liked.expected.load - liked.load).max() < 0.05 * liked.load.max()
    assert liked.expected.load.sum(1) == pytest.approx(liked.load.sum(1))
    assert Profile.of_ids(np.zeros((2, 1, 1), int), 4).repeats == (1.0, 1.0)


def test_chains_are_kept_where_loads_are_even() -> None:
    """Differences of loads that are chance must not cost the chains that are not."""
    rng = np.random.default_rng(0)
    ids = np.zeros((5, 2048, 1), dtype=int)
    ids[0, :, 0] = rng.integers(0, 8, 2048)
    for layer in range(1, 5):
        ids[layer, :, 0] = np.where(
            rng.random(2048) < 0.9, rng.permutation(8)[ids[layer - 1, :, 0]], rng.integers(0, 8, 2048)
        )
    made = problem(Profile.of_ids(ids, 8), np.ones((4, 4)))
    chained = rivals.exflow(made).owner
    found = joint.solve(made, rounds=4, starts=[chained]).owner
    assert rivals.leaving(made, found) <= 1.05 * rivals.leaving(made, chained)
    assert joint.expected(made, found) <= joint.expected(made, chained)


def test_held_out_windows_are_spread_and_nothing_is_in_both() -> None:
    ids = np.arange(1000)[None, :, None]
    own, held = split(ids, 0.25, 50)
    assert held.shape[1] == 250
    assert sorted([*own.ravel(), *held.ravel()]) == list(range(1000))
    assert set(np.diff(held.ravel())) == {1, 151}
    for share, field in ((0.0, "must lie between"), (0.01, "leaves nothing")):
        with pytest.raises(UserError, match=field):
            split(ids, share, 50)


@pytest.mark.parametrize("seed", range(6))
def test_ilp_1_is_the_enumerated_optimum(seed: int) -> None:
    made = profile(2, 7, seed, skew=1 + seed)
    best = [min(balance.deviation(load, owner, 3) for owner in partitions(7, 3)) for load in made.load]
    for load, value in zip(made.load, best, strict=True):
        assert balance.lower_bound(load, 3) <= value + 1e-9
    found = balance.solve(made.load, 3, gap=0.0)
    assert found.ended == "optimal"
    assert found.value == pytest.approx(sum(best))
    assert found.bound == pytest.approx(sum(best), abs=1e-5)
    assert all(set(owner) == {0, 1, 2} for owner in found.owner)


def test_the_program_of_ilp_1_finds_it_from_a_bad_start() -> None:
    load = np.array([90, 80, 61, 40, 39, 30, 22, 11])
    start = np.array([0, 0, 0, 0, 0, 0, 1, 2])
    owner, bound, ended = balance._program(load, 3, start, 0.0, 0.0, 20)
    best = min(balance.deviation(load, each, 3) for each in partitions(8, 3))
    assert balance.deviation(load, owner, 3) == pytest.approx(best)
    assert (bound, ended) == (pytest.approx(best), "optimal")


def enumerated(made: Problem, clusters: np.ndarray) -> float:
    """ILP 2 by trying everything: the least O2 with as many experts on every rank."""
    num_ranks, best = made.num_ranks, math.inf
    for ways in itertools.product(itertools.permutations(range(num_ranks)), repeat=len(clusters)):
        owner = np.stack([np.array(way)[layer] for way, layer in zip(ways, clusters, strict=True)])
        held = np.bincount(owner.ravel(), minlength=num_ranks)
        if made.slots[0] <= held.min() and held.max() <= made.slots[1]:
            best = min(best, communication(made, owner))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("uneven", [False, True])
def test_ilp_2_is_the_enumerated_optimum(seed: int, uneven: bool) -> None:
    made = problem(profile(4, 6, seed), np.array([[1, 9.0, 1], [9, 1, 2], [1, 2, 1]]) if seed % 2 else FLAT3)
    clusters = np.tile([0, 0, 0, 1, 1, 2] if uneven else [0, 0, 1, 1, 2, 2], (4, 1))
    found, best = mapping.solve(made, clusters, gap=0.0), enumerated(made, clusters)
    assert found.value == pytest.approx(best)
    assert found.bound == pytest.approx(best, abs=1e-4)
    assert (found.ended, found.slack) == ("optimal", 0)
    assert communication(made, found.owner) == pytest.approx(found.value)


def test_ilp_2_over_two_nodes_is_the_enumerated_optimum() -> None:
    made = problem(profile(3, 8, 3), TWO_NODES, nodes=2)
    clusters = np.array([[0, 0, 0, 1, 1, 2, 2, 3], [0, 1, 1, 2, 2, 3, 3, 3], [0, 0, 1, 2, 2, 2, 3, 1]])
    assert mapping.solve(made, clusters, gap=0.0).value == pytest.approx(enumerated(made, clusters))


def test_where_no_arrangement_is_even_the_least_slack_is_taken() -> None:
    made = problem(profile(1, 6, 0), FLAT3)
    found = mapping.solve(made, np.array([[0, 0, 0, 0, 1, 2]]))
    assert found.slack == 2
    assert sorted(np.bincount(found.owner[0])) == [1, 1, 4]
    made = problem(profile(2, 6, 0), FLAT3)  # sizes 4, 1 and 1 twice: 5, 5 and 2 at best, where 4 is wanted
    clusters = np.array([[0, 0, 0, 0, 1, 2]] * 2)
    found = mapping.solve(made, clusters, gap=0.0)
    ways = itertools.product(itertools.permutations(range(3)), repeat=2)
    every = [np.stack([np.array(way)[row] for way, row in zip(each, clusters, strict=True)]) for each in ways]
    near = [owner for owner in every if np.bincount(owner.ravel()).tolist() in ([5, 5, 2], [5, 2, 5], [2, 5, 5])]
    assert found.slack == 2
    assert found.value == pytest.approx(min(communication(made, owner) for owner in near))
    assert found.bound <= found.value


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_a_pair_of_layers_is_its_optimum_on_two_nodes(seed: int) -> None:
    made = problem(profile(2, 4, seed), TWO_NODES, nodes=2)
    clusters = np.tile(np.arange(4), (2, 1))
    (between,) = crossings(made.profile, clusters, 4)
    assert mapping.pair_bound(between, made.cost, made.node) == pytest.approx(enumerated(made, clusters))


def test_many_ranks_are_searched_and_the_bound_holds() -> None:
    made = problem(profile(5, 16, 1, num_tokens=2000), np.ones((8, 8)))
    first = balance.solve(made.profile.load, 8)
    found = mapping.solve(made, first.owner)
    assert found.bound <= found.value
    held = np.bincount(found.owner.ravel(), minlength=8)
    assert held.min() == held.max() == 10 or found.slack == max(held.max() - 10, 10 - held.min())
    assert np.array_equal(np.sort(loads(made.profile, found.owner, 8)), np.sort(loads(made.profile, first.owner, 8)))
    # with equal rates layers do not depend on each other, so the bound is the optimum where sizes are no hindrance
    if (np.bincount(first.owner.ravel()) == 10).all():
        assert found.gap < 0.05


@pytest.mark.parametrize(("bandwidth", "nodes"), [(FLAT3, 1), (TWO_NODES, 2)])
def test_both_at_once_is_never_worse_than_one_after_the_other(bandwidth: np.ndarray, nodes: int) -> None:
    made = problem(profile(6, 12, 5, num_tokens=3000), bandwidth, nodes)
    found = joint.solve(made, rounds=4)
    assert joint.expected(made, found.owner) < joint.expected(made, found.second.owner)
    assert found.after == pytest.approx(score(made, found.owner).objective)
    assert found.bound <= found.after < found.before
    assert np.array_equal(*(np.bincount(owner.ravel()) for owner in (found.owner, found.second.owner)))
    assert all(set(row) == set(range(made.num_ranks)) for row in found.owner)
    again = joint.solve(made, rounds=4)
    assert np.array_equal(found.owner, again.owner)


def test_the_annealing_knows_what_it_changed() -> None:
    from methods.moetuner import anneal

    made = problem(profile(5, 9, 2, num_tokens=1000), TWO_NODES, nodes=2)
    start = random_owner(made, np.random.default_rng(0))
    owner, weights = start.astype(np.int64), np.array([1.0, 2.0, 0.5])

    def value(of: np.ndarray) -> float:
        found = score(made, of)
        traffic = float((crossings(made.profile, of, 4) * made.cost).sum())
        return float(weights @ [found.balance, found.communication, traffic])

    given = (owner, made.profile.load.astype(float), made.profile.flow.astype(float), made.cost, weights)
    change = anneal.search(*given, 3000, 0.1, True, 0.0, np.random.default_rng(1))
    assert change < 0
    assert value(owner) - value(start) == pytest.approx(change)


def on_two_nodes(**changed: object) -> Request:
    levels = [
        {"name": "node", "size": 2, "bandwidth_bytes_per_s": 1e6},
        {"name": "gpu", "size": 2, "bandwidth_bytes_per_s": 3e6},
    ]
    rates = {"device_flops_per_s": 1e9, "device_bytes_per_s": 1e15}
    cluster = with_levels("c", levels, kind="physical", **rates)
    model = Model(name="m", num_layers=3, hidden=64, ffn=32, num_experts=8, top_k=2, num_heads=1, seq=32)
    ids = np.random.default_rng(0).choice(8, (3, 512, 2), p=np.arange(1, 9) / 36)
    given = Request(model, Topology((2, 2)), TWO_NODES, ids, ids, cluster=cluster, tokens=(24,) * 4, rounds=1)
    return dataclasses.replace(given, **changed)  # type: ignore[arg-type]


def last_home_s(matrix: np.ndarray, row_s: float, node_s: float, own_s: float, step: float = 1e-5) -> float:
    """Of one layer on 2 nodes of 2 ranks, in small steps of time: ``matrix`` rows from rank to rank."""
    node = np.arange(4) // 2
    away = np.where(node[:, None] != node, matrix, 0.0)
    near = matrix * (1 - np.eye(4))
    at_node, at_own = away.sum(0) * node_s, near.sum(0) * own_s  # seconds of each rank's rows through both ports
    came, work = np.zeros(4), at_node.copy()
    now = 0.0
    while (work > 0).any():
        now += step
        for n in (0, 1):
            waiting = np.flatnonzero((node == n) & (work > 0))
            if len(waiting):
                work[waiting] -= step / len(waiting)
        came = np.where((work <= 0) & (came == 0) & (at_node > 0), now, came)
    done = np.maximum(came, at_own) + row_s * matrix.sum(0)
    end = float((done + at_own).max())
    for n in (0, 1):
        now, left = 0.0, [(done[g], at_node[g]) for g in np.flatnonzero(node == n)]
        for ready, seconds_of in sorted(left):
            now = max(now, ready) + seconds_of
        end = max(end, now)
    out = [away[node == n].sum() * node_s * 2 for n in (0, 1)]
    return max(end, *out, 2 * float(near.sum(1).max()) * own_s)


def test_predicted_seconds_are_those_of_ranks_that_share_ports() -> None:
    given = on_two_nodes()
    prices = seconds.prices_of(given)
    assert prices.size.tolist() == [2, 1]
    row_s, node_s, own_s = prices.each
    assert node_s == pytest.approx(64 * 2 / 1e6)
    assert row_s == pytest.approx(2 * 2 * 64 * 32 / (0.5 * 1e9))
    batch, rows = given.profile[:1, :96], np.zeros((1, 1, 2, 4, 8), dtype=np.float32)
    for token, choice in np.ndindex(96, 2):
        for link, size in enumerate(prices.size):
            rows[0, 0, link, token // 24 // size, batch[0, token, choice]] += 1
    for seed in range(4):
        owner = random_owner(problem_of(given), np.random.default_rng(seed))[:1]
        matrix = np.zeros((4, 4))
        np.add.at(matrix, (np.arange(96)[:, None] // 24, owner[0][batch[0]]), 1.0)
        wanted = last_home_s(matrix, row_s, node_s, own_s)
        assert seconds.predicted_s(prices, rows, owner) == pytest.approx(wanted, abs=2e-4)


def test_one_of_two_ranks_that_share_a_port_had_better_be_done_early() -> None:
    from methods.moetuner.busiest import home_s

    size, prices = np.array([2]), np.array([1.0, 2.0])

    def until_home(*rows: float) -> float:
        return float(home_s(np.array(rows, float), np.array([rows], float), np.zeros((1, 1)), size, prices))

    assert until_home(4, 4) == 16 + 4 + 16  # there together, done together, home one after the other
    assert until_home(2, 6) == 16 + 6 + 12  # the first is there at 8, done at 10, home at 14


def test_fewer_seconds_are_found_and_every_rank_keeps_its_number() -> None:
    given = on_two_nodes()
    prices = seconds.prices_of(given)
    rows = seconds.batches(given, prices, 16, 0)
    assert rows.sum((3, 4)) == pytest.approx(np.full((3, 16, 2), 4 * 24 * 2))
    start = np.tile(np.arange(8) // 2, (3, 1))
    found, _ = seconds.solve(given, prices, [start], 1)
    searched = seconds.batches(given, prices, seconds.BATCHES, 0)
    assert seconds.predicted_s(prices, searched, found) < 0.95 * seconds.predicted_s(prices, searched, start)
    assert np.array_equal(np.bincount(found.ravel()), np.bincount(start.ravel()))
    assert all(set(row) == set(range(4)) for row in found)
    placed = PLACERS["seconds"].run(given).objective
    assert placed["predicted_s"] < placed["predicted_contiguous_s"]


def test_without_rates_there_are_no_seconds() -> None:
    with pytest.raises(UserError, match=r"bandwidths: 'a matrix'.*which ranks share a port"):
        PLACERS["seconds"].run(on_two_nodes(cluster=None))
    with pytest.raises(UserError, match="cluster: 'local-4'"):
        PLACERS["seconds"].run(on_two_nodes(cluster=presets.cluster("local-4")))


@pytest.mark.parametrize("seed", range(3))
def test_exflow_is_the_enumerated_optimum(seed: int) -> None:
    made = problem(profile(3, 4, seed), np.ones((2, 2)))
    even = [np.array(each) for each in itertools.product(range(2), repeat=4) if sum(each) == 2]
    best = min(rivals.leaving(made, np.stack(owner)) for owner in itertools.product(even, repeat=3))
    found = rivals.exflow(made, gap=0.0)
    assert found.value == pytest.approx(best)
    assert (found.ended, found.bound) == ("optimal", pytest.approx(best, abs=1e-4))


def test_rivals_put_as_many_experts_on_every_rank() -> None:
    made = problem(profile(3, 8, 0, skew=4), np.ones((4, 4)))
    for owner in (rivals.contiguous(made), rivals.chance(made), rivals.greedy(made), rivals.exflow(made).owner):
        assert all((np.bincount(row, minlength=4) == 2).all() for row in owner)
    assert rivals.contiguous(made)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# --------------------------------------------------------------------------------------------------------- the planner


def request(**changed: object) -> Request:
    ids = all_layers(read_trace(find_trace("record-l32e8k2.parquet")))
    own, held = split(ids, 0.25)
    cluster = presets.cluster("moetuner-multi")
    rates, topology = bandwidths(cluster, 4)
    model = presets.model("mixtral-8x7b")
    given = Request(model, topology, rates, own, held, rounds=3, cluster=cluster, tensor_parallel=4)
    return dataclasses.replace(given, **changed)  # type: ignore[arg-type]


@pytest.mark.long
def test_mixtral_is_solved_and_no_rival_is_better_on_held_out_tokens() -> None:
    given = request(rounds=8)
    found = {name: placer.run(given) for name, placer in PLACERS.items()}
    programs = [found["two-stage"].objective[name] for name in ("ilp1", "ilp2")]
    assert all(program["gap"] <= 0.025 and program["ended"] == "optimal" for program in programs)
    held = {name: each.scores["held-out"] for name, each in found.items()}
    assert min(held, key=lambda name: held[name]["objective"]) == "joint"
    assert held["joint"]["max_over_mean"] < held["random"]["max_over_mean"]
    assert held["joint"]["cross_node"] < held["random"]["cross_node"]
    assert held["random"]["objective"] == pytest.approx(2, abs=0.25)


def test_a_time_limit_keeps_the_best_and_says_so() -> None:
    made = problem(profile(6, 12, 5, num_tokens=3000, skew=6), FLAT3)
    found = balance.solve(made.profile.load, 3, gap=0.0, time_limit_s=0.0)
    assert found.ended == "time limit"
    assert found.bound <= found.value
    placed = PLACERS["joint"].run(request(time_limit_s=1e-3))
    assert placed.objective["ended"] == "time limit"
    assert any("time limit" in note for note in placed.notes)
    assert placed.owner.shape == (32, 8)


def test_without_a_solver_the_searches_placement_is_kept_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    placed = PLACERS["two-stage"].run(request(gap=0.0))
    assert placed.objective["ended"] == "no solver"
    assert any("HiGHS is not installed (pip install" in note for note in placed.notes)
    assert placed.scores["held-out"]["objective"] < 1.5


def test_experts_never_used_are_named_and_placed_all_the_same() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, (2, 64, 1))
    model = Model(name="m", num_layers=2, hidden=8, ffn=8, num_experts=4, top_k=1)
    placed = PLACERS["joint"].run(Request(model, Topology((1, 2)), np.ones((2, 2)), ids, ids, rounds=1))
    assert any("layer 0: 3; layer 1: 3" in note for note in placed.notes)
    assert all(set(row) == {0, 1} for row in placed.owner)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bandwidth": np.ones((3, 3))}, "must be 4 x 4"),
        ({"bandwidth": np.where(np.arange(16).reshape(4, 4) == 1, 0.0, 1.0)}, r"\[0\]\[1\].*no token could pass"),
        ({"bandwidth": np.full((4, 4), np.nan)}, "no token could pass"),
        ({"bandwidth": np.full((4, 4), np.inf)}, "no pair of ranks has a finite rate"),
        ({"topology": Topology((2, 8)), "bandwidth": np.ones((16, 16))}, "8 experts, one for each rank at least"),
    ],
)
def test_bad_input_is_named(changed: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PLACERS["joint"].run(request(**changed))
