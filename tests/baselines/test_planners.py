"""Planners of the rivals (FasterMoE, FlexMoE, EPLB) against brute force, bounds and their own examples."""

from __future__ import annotations

import doctest
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines import eplb, fastermoe, flexmoe
from harness.errors import UserError

MODEL = fastermoe.LatencyModel(hidden=64, ffn=128, flops_per_s=1e9, net_bytes_per_s=1e8)


@pytest.mark.parametrize("module", [eplb, fastermoe, flexmoe])
def test_worked_examples(module):
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def skewed(seed: int, num_ranks: int, num_experts: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    popular = rng.gamma(0.4, size=num_experts) + 1e-3
    return rng.multinomial(500, popular / popular.sum(), size=num_ranks)


# ------------------------------------------------------------------------------------------------------- FasterMoE


def latency(counts: np.ndarray, owner: np.ndarray, shadows: set[int], as_printed: bool) -> float:
    """Token by token, as the paper's formulas say."""
    num_ranks, num_experts = counts.shape
    computed, arriving = np.zeros(num_ranks), np.zeros(num_ranks)
    for worker, expert in itertools.product(range(num_ranks), range(num_experts)):
        at = worker if expert in shadows else owner[expert]
        computed[at] += counts[worker, expert]
        arriving[at] += counts[worker, expert] * (at != worker)
    comp = 4 * computed * MODEL.hidden * MODEL.ffn / MODEL.flops_per_s
    comm = arriving * MODEL.hidden * 2 / MODEL.net_bytes_per_s
    if as_printed and shadows:
        comm[:] = 0
    expert_s = 2 * MODEL.hidden * MODEL.ffn * 2 / MODEL.net_bytes_per_s
    return float((3 * comp + 4 * comm).max() + 2 * len(shadows) * expert_s)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.booleans())
def test_latencies_are_the_papers(seed, as_printed):
    counts = np.stack([skewed(seed, 4, 8), skewed(seed + 1, 4, 8)])
    owner = np.repeat(np.arange(4), 2)
    found = fastermoe.latencies(counts, owner, MODEL, as_printed=as_printed)
    chosen = fastermoe.shadowed(counts, owner, MODEL, as_printed=as_printed)
    for own, of_prefix, shadows in zip(counts, found, chosen, strict=True):
        order = fastermoe.popular(own).tolist()
        wanted = [latency(own, owner, set(order[:r]), as_printed) for r in range(9)]
        np.testing.assert_allclose(of_prefix, wanted)
        r = next((i for i in range(8) if wanted[i + 1] >= wanted[i]), 8)  # one by one, as long as it falls
        assert set(np.flatnonzero(shadows)) == set(order[:r])


def test_shadows_are_experts_and_not_ranks_that_send_much():
    """The bug of the public default policy: with as many tokens on every rank it shadows nothing."""
    counts = np.full((4, 8), 10)
    counts[:, 6] = 400
    chosen = fastermoe.shadowed(counts, np.repeat(np.arange(4), 2), MODEL)
    assert np.flatnonzero(chosen).tolist() == [6]
    assert not fastermoe.shadowed(np.full((4, 8), 10), np.repeat(np.arange(4), 2), MODEL).any()


# --------------------------------------------------------------------------------------------------------- FlexMoE


def estimate(load: np.ndarray, slots: np.ndarray, costs: flexmoe.Costs) -> float:
    hosts = flexmoe.hosts_of(slots, len(load))
    copies = hosts.sum(1)
    carried = (load / copies) @ hosts
    reduced = (2 * (copies - 1) / copies) @ hosts
    return float(carried.max() * costs.token_s + reduced.max() * costs.reduce_s)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.floats(0, 30))
def test_flexmoe_only_does_what_pays(seed, num_slots, move_s):
    load = skewed(seed, 8, 16).sum(0).astype(float)
    costs = flexmoe.Costs(1.0, 20.0, move_s)
    slots = flexmoe.start(16, 8, num_slots)
    found = flexmoe.adjust(load, slots, costs, steps=5)
    assert found.before_s == pytest.approx(estimate(load, slots, costs))
    assert found.after_s == pytest.approx(estimate(load, found.slots, costs))
    moves = sum(name != "shrink" for name, *_ in found.operations)
    assert found.after_s + moves * move_s / 5 <= found.before_s + 1e-9
    assert flexmoe.hosts_of(found.slots, 16).any(1).all()  # every expert somewhere
    for own in found.slots:
        held = own[own >= 0]
        assert len(set(held.tolist())) == len(held)  # at most one copy on a rank
    assert (slots == flexmoe.start(16, 8, num_slots)).all()  # what came in is left alone


def test_flexmoe_uses_each_of_its_operations():
    load = np.array([100.0, 1, 1, 1, 50, 49, 1, 1])
    names = {name for name, *_ in flexmoe.adjust(load, flexmoe.start(8, 4, 3), flexmoe.Costs(1.0, 0.1, 0.1)).operations}
    assert "expand" in names
    packed = np.array([[0, 1], [2, 3]])
    found = flexmoe.adjust(np.array([5.0, 5, 1, 1]), packed, flexmoe.Costs(1.0, 0.1, 0.1))
    assert {name for name, *_ in found.operations} == {"migrate"}
    taken = np.array([[0, 2], [1, 2], [3, 2]])  # expert 0 is hot, all slots are taken, 2 has copies to spare
    found = flexmoe.adjust(np.array([60.0, 1, 1, 1]), taken, flexmoe.Costs(1.0, 0.1, 0.1))
    assert {name for name, *_ in found.operations} >= {"shrink", "expand"}


def test_flexmoe_leaves_balance_and_dear_moves_alone():
    slots = flexmoe.start(8, 4, 3)
    assert not flexmoe.adjust(np.ones(8), slots, flexmoe.Costs(1.0, 0.1, 0.0)).operations
    assert not flexmoe.adjust(np.arange(8.0), slots, flexmoe.Costs(1.0, 0.1, 1e6)).operations
    assert not flexmoe.adjust(np.arange(8.0), slots, flexmoe.Costs(1.0, 0.1, 0.0), threshold=99).operations


@pytest.mark.timed
@pytest.mark.parametrize(("num_experts", "num_ranks", "limit_s"), [(64, 32, 0.002), (256, 1024, 0.02)])
def test_flexmoe_plans_in_time(num_experts, num_ranks, limit_s):
    rng = np.random.default_rng(0)
    loads = [rng.permutation(1e6 / np.arange(1, num_experts + 1)) for _ in range(8)]
    slots = flexmoe.start(num_experts, num_ranks, 4)
    costs = flexmoe.Costs(1.0, 1e3, 1e3)
    flexmoe.adjust(loads[0], slots, costs)  # compiled
    began = time.process_time()
    found = [flexmoe.adjust(load, slots, costs) for load in loads]
    assert all(each.operations for each in found)
    assert (time.process_time() - began) / len(loads) < limit_s


def test_flexmoe_refuses_what_does_not_fit():
    with pytest.raises(UserError, match="slots"):
        flexmoe.start(16, 4, 3)
    with pytest.raises(UserError, match="num_experts"):
        flexmoe.start(16, 6, 3)


# ------------------------------------------------------------------------------------------------------------ EPLB


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]))
def test_eplb_places_every_expert_and_keeps_its_bounds(seed, num_slots):
    load = skewed(seed, 8, 16).sum(0)
    slots = eplb.balance(load, 2, 4, num_slots)
    assert slots.shape == (8, num_slots)
    hosts = flexmoe.hosts_of(slots, 16)
    assert hosts.any(1).all()
    nodes = hosts.reshape(16, 2, 4).any(2)
    assert (nodes.sum(1) == 1).all()  # all copies of an expert in one node
    assert (nodes.sum(0) == 8).all()
    if num_slots == 4:  # a slot for half of a node's experts on every rank
        contiguous = np.repeat(np.arange(8), 2)
        assert ((load / hosts.sum(1)) @ hosts).max() <= np.bincount(contiguous, load).max()


def test_eplb_copies_follow_the_load_per_copy():
    rng = np.random.default_rng(3)
    load = rng.integers(1, 1000, 32)
    greedy = np.ones(32, dtype=int)
    for _ in range(40):
        greedy[(load / greedy).argmax()] += 1
    assert eplb.copies(load, 72).tolist() == greedy.tolist()


def test_eplb_takes_the_cluster_as_one_node_where_groups_do_not_divide():
    load = np.array([50, 1, 1, 1, 1, 1])
    slots = eplb.balance(load, 4, 1, 2)  # 6 groups on 4 nodes
    assert flexmoe.hosts_of(slots, 6).sum(1).tolist() == [3, 1, 1, 1, 1, 1]
    with pytest.raises(UserError, match="slots"):
        eplb.balance(load, 1, 2, 2)
    with pytest.raises(UserError, match="num_groups"):
        eplb.balance(load, 1, 2, 3, num_groups=4)
