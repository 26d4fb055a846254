"""FSMoE's gradient partition: no byte lost, none sent before it exists, and near the best there is."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest

from harness import presets
from harness.errors import UserError
from methods.fsmoe.costs import Array, LayerCosts, Reduce, reduce_costs
from methods.fsmoe.degree import degree_terms, overlappable, scan_degree
from methods.fsmoe.partition import Partition, adaptive_partition, greedy_fill, remaining_room, within_room
from tests.methods.fsmoe_grid import grid


def model(testbed: str, num_layers: int, seed: int, times: int = 1) -> tuple[LayerCosts, Reduce, Array, Array]:
    """Backward costs of ``num_layers`` layers of the grid, the all-reduce, their gradient bytes, dense seconds."""
    costs, gradient, _ = grid(testbed)
    rng = np.random.default_rng(seed)
    index = rng.choice(len(gradient), num_layers)
    reduce = reduce_costs(presets.cluster(testbed))
    return costs.backward()[index], reduce, gradient[index] * times, rng.uniform(0, 3e-3, num_layers)


def step_one(costs: LayerCosts, reduce: Reduce, gradient: Array, dense_s: Array) -> tuple[Array, Array, Array]:
    """Bytes [n] of both parts after step 1, and the room [n] that step 2 has."""
    moe, dense = greedy_fill(gradient, overlappable(costs, scan_degree(costs)[0]), dense_s, reduce)
    return moe, dense, remaining_room(gradient, moe + dense)


def seconds(costs: LayerCosts, reduce: Reduce, gradient: Array, dense: Array, slices: Array) -> float:
    """All MoE parts and the tail, if the MoE parts carry ``slices`` [n] bytes."""
    tail = gradient.sum() - dense.sum() - slices.sum()
    return float(scan_degree(costs, reduce.time_s(slices))[1].sum() + reduce.time_s(tail))


@pytest.mark.parametrize("testbed", ["fsmoe-a", "fsmoe-b"])
@pytest.mark.parametrize("num_layers", [1, 2, 9, 24])
def test_no_byte_is_lost_or_sent_before_it_exists(testbed: str, num_layers: int) -> None:
    costs, reduce, gradient, dense_s = model(testbed, num_layers, seed=num_layers)
    found = adaptive_partition(costs, reduce, gradient, dense_s)
    sent = found.moe_bytes + found.dense_bytes
    assert sent.dtype == np.int64
    assert sent.sum() + found.tail_bytes == gradient.sum()
    assert not np.any([found.moe_bytes % 4, found.dense_bytes % 4])
    assert (np.cumsum(sent) <= np.cumsum(gradient) - gradient).all()
    assert found.tail_bytes >= gradient[-1] > 0  # the last gradient has nothing left to hide behind
    assert (reduce.time_s(found.dense_bytes) <= dense_s * (1 + 1e-9)).all()
    degree, moe_s = scan_degree(costs, reduce.time_s(found.moe_bytes))
    np.testing.assert_array_equal(found.degree, degree)
    assert found.exposed_s == pytest.approx(moe_s.sum() + reduce.time_s(found.tail_bytes), rel=1e-12)


@pytest.mark.parametrize("testbed", ["fsmoe-a", "fsmoe-b"])
@pytest.mark.parametrize("times", [1, 8])
def test_never_worse_than_step_one_with_the_rest_in_its_own_layer(testbed: str, times: int) -> None:
    gains = []
    for seed in range(3):
        costs, reduce, gradient, dense_s = model(testbed, 12, seed, times)
        moe, dense, room = step_one(costs, reduce, gradient, dense_s)
        own = np.diff(room, prepend=0)
        found = adaptive_partition(costs, reduce, gradient, dense_s)
        np.testing.assert_array_equal(found.dense_bytes, dense)
        for other in (moe + own, moe):
            gains.append(seconds(costs, reduce, gradient, dense, other) / found.exposed_s)
    assert min(gains) >= 1
    assert max(gains) > 1.001


@pytest.mark.parametrize("testbed", ["fsmoe-a", "fsmoe-b"])
def test_near_the_best_of_all_splits(testbed: str) -> None:
    """Four layers with room, every split of it in sixteenths: evolution comes as near as 1e-4, and gains by it."""
    steps = np.linspace(0, 1, 17)
    shares = np.array([(0.0, *rest) for rest in itertools.product(steps, repeat=4)]).T  # [n, S]
    gains = []
    for seed in (0, 1, 3):
        costs, reduce, gradient, dense_s = model(testbed, 5, seed, times=2)
        moe, dense, room = step_one(costs, reduce, gradient, dense_s)
        slices = moe[:, None] + within_room(shares * room[-1], room)
        link, olp = (table[:, :, None] for table in degree_terms(costs))
        moe_s = (link + np.maximum(olp, reduce.time_s(slices))).min(axis=0).sum(axis=0)
        best = float((moe_s + reduce.time_s(gradient.sum() - dense.sum() - slices.sum(axis=0))).min())
        found = adaptive_partition(costs, reduce, gradient, dense_s)
        assert found.exposed_s <= best * (1 + 1e-4)
        gains.append(seconds(costs, reduce, gradient, dense, moe + np.diff(room, prepend=0)) / found.exposed_s)
    assert max(gains) > 1.01


def test_candidates_are_cut_layer_by_layer() -> None:
    rng = np.random.default_rng(0)
    room = np.sort(rng.uniform(0, 10, 7))
    extra = rng.uniform(0, 5, (7, 50))
    cut = within_room(extra, room)
    total = np.zeros(50)
    for layer in range(7):
        np.testing.assert_allclose(cut[layer], np.minimum(extra[layer], room[layer] - total), atol=1e-12)
        total += cut[layer]


def test_room_leaves_later_slices_their_gradient() -> None:
    """Layer 2 already sends 8 of the 10 bytes that exist then, so layer 1 may add 2 only."""
    room = remaining_room(np.array([6, 4, 1, 0]), np.array([0, 0, 8, 0]))
    np.testing.assert_array_equal(room, [0, 2, 2, 3])


def test_step_one_fills_what_is_free_and_carries_the_rest_on() -> None:
    reduce = Reduce(alpha_s=1.0, beta_s_per_byte=1.0)
    moe, dense = greedy_fill([40, 40, 40], [9.0, 9.0, 30.0], [9.0, 0.5, 100.0], reduce)
    np.testing.assert_array_equal(moe, [0, 8, 28])
    np.testing.assert_array_equal(dense, [0, 0, 44])  # half a second is less than the start-up


def test_same_seed_same_partition() -> None:
    case = model("fsmoe-a", 12, 3)
    one, two = adaptive_partition(*case), adaptive_partition(*case)
    np.testing.assert_array_equal(one.moe_bytes, two.moe_bytes)


@pytest.mark.timed
def test_faster_than_the_papers_solver() -> None:
    """193 ms a layer is the paper's time for a degree alone."""
    case = model("fsmoe-a", 24, 4)
    begin = time.perf_counter()
    adaptive_partition(*case)
    assert time.perf_counter() - begin < 0.193 * 24


def partition(**changed: Any) -> Partition:
    fields = {
        "gradient_bytes": np.array([8, 8, 8]),
        "moe_bytes": np.array([0, 4, 0]),
        "dense_bytes": np.array([0, 4, 8]),
    }
    ones = np.ones(3)
    return Partition(**{**fields, **changed}, degree=ones, moe_s=ones, tail_s=1.0)


def test_a_slice_larger_than_the_gradient_names_the_layer() -> None:
    assert partition().tail_bytes == 8
    with pytest.raises(UserError, match=r"layer 0 \(backward order\)\.moe_bytes: 4: must be 0 to 0"):
        partition(moe_bytes=np.array([4, 4, 0]))
    with pytest.raises(UserError, match=r"layer 2 \(backward order\)\.dense_bytes: 12: must be 0 to 8"):
        partition(dense_bytes=np.array([0, 4, 12]))
    with pytest.raises(UserError, match=r"layer 1 \(backward order\)\.dense_bytes: -4"):
        partition(dense_bytes=np.array([0, -4, 8]))


def test_bad_gradients_are_named() -> None:
    costs, reduce, gradient, dense_s = model("fsmoe-a", 3, 0)
    with pytest.raises(UserError, match=r"layer 1 \(backward order\)\.gradient_bytes: 6"):
        adaptive_partition(costs, reduce, [4, 6, 8], dense_s)
    with pytest.raises(UserError, match=r"costs: \(3,\)"):
        adaptive_partition(costs, reduce, np.append(gradient, 4), 0.0)
