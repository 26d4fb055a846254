"""Expert swap in training: weights and optimizer state move, and the loss curve does not."""

from __future__ import annotations

import numpy as np
import pytest

from baselines.smartmoe import greedy
from harness.errors import UserError
from harness.placement import Placement
from harness.specs import Cluster
from tests.methods.test_fsmoe_training import training
from tests.methods.test_hiermoe import cluster

ON_RANKS = "tests.methods.hiermoe_on_ranks:"


@pytest.mark.parametrize(
    ("shape", "num_steps"),
    [((2, 2), 12), *(pytest.param(*each, marks=pytest.mark.long) for each in [((2, 2), 50), ((2, 2, 2), 12)])],
    ids=str,
)
def test_steps_with_swaps_equal_as_many_without(session, shape, num_steps):
    curves = {}
    for system in ("hiermoe-hd", "hiermoe"):
        payload = training(system, cluster(shape)) | {"num_steps": num_steps}
        found = session(cluster(shape)).call(ON_RANKS + "trained", payload, timeout_s=200)
        assert all(each == found[0] for each in found)  # every rank decides alike
        curves[system] = found[0]
    assert curves["hiermoe"]["losses"] == pytest.approx(curves["hiermoe-hd"]["losses"], rel=1e-9)
    swaps, contiguous = curves["hiermoe"]["swaps"], Placement.contiguous(8, int(np.prod(shape))).owner.tolist()
    assert curves["hiermoe-hd"]["swaps"] == []
    assert curves["hiermoe-hd"]["owners"] == [contiguous] * 3
    assert len(swaps) >= num_steps / 2
    assert {layer for _, layer, _, _ in swaps} == {0, 1, 2}
    assert curves["hiermoe"]["better"]
    assert contiguous not in curves["hiermoe"]["owners"]
    assert curves["hiermoe"]["kinds"][-1] == "after-step"


def test_interval_pairs_and_function_are_options(session):
    shape = (2, 2)
    options = {"swap_every": 3, "swap_pairs": 2, "max": "plain", "gamma": 5}
    payload = training("hiermoe", cluster(shape), options=options) | {"num_steps": 7}
    found = session(cluster(shape)).call(ON_RANKS + "trained", payload)[0]
    steps = [step for step, _, _, _ in found["swaps"]]
    assert set(steps) <= {2, 5}
    assert max(steps.count(step) for step in set(steps)) <= 2 * 3


@pytest.mark.timed
def test_where_costs_are_known_an_update_is_made_only_if_the_steps_that_it_serves_are_long_enough(session):
    """These steps take milliseconds, and an update as long."""
    one = {"alpha_s": 1e-6, "beta_s_per_byte": 1e-9}
    known = Cluster.model_validate(
        cluster((2, 2)).model_dump() | {"collectives": dict.fromkeys(("a2a.flat", "a2a.inter1", "a2a.intra1"), one)}
    )
    payload = training("hiermoe", known) | {"num_steps": 12}
    found = session(known).call(ON_RANKS + "trained", payload)
    assert all(each["swaps"] == found[0]["swaps"] for each in found)
    assert found[0]["skipped"] == 1  # and then not asked again
    assert found[0]["swaps"] == []


@pytest.mark.parametrize("system", ["smartmoe", pytest.param("hiermoe-hd2-smart", marks=pytest.mark.long)])
def test_smart_placement_changes_training_only_where_states_stay_behind(session, system):
    shape, curves = (2, 2), {}
    for states in (True, False):
        options = {"place_every": 3, "optimizer_state": states}
        payload = training(system, cluster(shape), options=options) | {"num_steps": 12}
        found = session(cluster(shape)).call(ON_RANKS + "trained", payload)[0]
        assert found["placed"] > 0
        curves[states] = found["losses"]
    payload = training("flat", cluster(shape)) | {"num_steps": 12}
    still = session(cluster(shape)).call(ON_RANKS + "trained", payload)[0]["losses"]
    assert curves[True] == pytest.approx(still, rel=1e-9)
    assert curves[False] != pytest.approx(still, rel=1e-9)


def test_greedy_placement_is_longest_first_and_only_if_it_helps():
    placement = Placement.contiguous(6, 3)
    found = greedy(np.array([9, 8, 1, 1, 1, 1]), placement)
    assert found.owner[0] != found.owner[1]
    assert np.bincount(found.owner, [9, 8, 1, 1, 1, 1]).max() == 10
    assert greedy(np.array([5, 1, 5, 1, 5, 1]), placement) is placement


@pytest.mark.parametrize("states", [True, False], ids=["with-states", "parameters-only"])
def test_experts_and_their_states_are_where_they_were_sent(session, states):
    payload = {"seed": 0, "rounds": 5, "states": states}
    every = session(cluster((2, 4))).call(ON_RANKS + "moved", payload)
    assert all(found["wrong"] == [] and found["sent"] > 0 for found in every)
    assert all(found["along"] for found in every) == states


def test_placements_keep_slots_and_say_what_is_wrong():
    placement = Placement.contiguous(8, 4).swapped([(0, 7), (2, 3), (0, 1)])
    assert [placement.local(rank).tolist() for rank in range(4)] == [[7, 0], [3, 2], [4, 5], [6, 1]]
    assert placement.owner.tolist() == [0, 3, 1, 1, 2, 2, 3, 0]
    moved = Placement.of_owner(np.array([0, 3, 1, 1, 2, 0, 3, 2]), placement)
    assert [moved.local(rank).tolist() for rank in range(4)] == [[5, 0], [3, 2], [4, 7], [6, 1]]
    with pytest.raises(UserError, match="placement of rank 0: 3: experts; it has 2 slots"):
        Placement.of_owner(np.array([0, 0, 1, 1, 0, 2, 3, 3]), Placement.contiguous(8, 4))
    with pytest.raises(UserError, match="placement: 1: is an expert that no rank holds"):
        Placement.of_slots([[0], [2]])
