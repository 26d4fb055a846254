from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from harness.errors import UserError
from harness.placement import Placement
from harness.routing import certify
from harness.routing.types import Routing
from harness.topology import Topology

NODES = Topology((2, 2))


def routing(ids: list[list[int]], tokens: tuple[int, ...], num_experts: int = 4) -> Routing:
    return Routing(np.array(ids, np.int32), tokens, num_experts)


def test_a_hand_counted_routing():
    # rank 0: experts 0 1 | 0 2; rank 1: 0 3; rank 2: 2 3; rank 3: no token. Expert e lives on rank e.
    case = routing([[0, 1], [0, 2], [0, 3], [2, 3]], (2, 1, 1, 0))
    found = certify(case, Placement.contiguous(4, 4), NODES)
    assert found.max_over_mean["expert"] == 3 / 2  # loads 3 1 2 2
    assert found.max_over_mean["rank"] == 3 / 2
    assert found.max_over_mean["node"] == 1  # 4 and 4
    # node 0 sends rows 2 and 3 to node 1 and gets none back: ports out 2 0, in 0 2
    assert found.max_over_mean["link"] == 2
    assert found.worst_rank_expert == 2  # rank 0: 2 1 1 0, mean 1; ranks 1 and 2: 1 over 1/2
    assert found.balanced_bound == 2
    assert not found.balanced
    assert found.drop_free


def test_loads_follow_the_placement_and_replicas_share():
    case = routing([[0, 1]] * 4, (1, 1, 1, 1))
    moved = Placement(np.eye(4, dtype=bool)[[3, 2, 1, 0]])
    assert certify(case, moved, NODES).max_over_mean["node"] == 2
    shared = np.eye(4, dtype=bool)
    shared[0] = True  # expert 0 on every rank, expert 1 on rank 1 alone: loads 1 5 1 1
    found = certify(case, Placement(shared), NODES)
    assert found.max_over_mean["rank"] == 5 / 2
    assert found.max_over_mean["expert"] == 2


def test_a_port_has_two_directions():
    case = routing([[0], [1], [2], [3]], (4, 0, 0, 0))  # node 0 sends one row to each of the others
    found = certify(case, Placement.contiguous(4, 4), Topology((4, 1)))
    assert found.max_over_mean["link"] == 3 / (6 / 8)


def test_a_port_belongs_to_the_innermost_node():
    deep = Topology((2, 2, 2))
    case = routing([[0], [2], [0], [0], [0], [0], [0], [0]], (1,) * 8, 8)
    found = certify(case, Placement.contiguous(8, 8), deep)
    # nodes of two ranks: out 1 2 2 2 (node 0 sends one row to node 1), in 6 1 0 0
    assert found.max_over_mean["link"] == pytest.approx(6 / (14 / 8))


@pytest.mark.parametrize(("factor", "free"), [(None, True), (1.0, False), (1.9, True), (2.0, True)])
def test_drop_free_at_a_capacity(factor, free):
    case = routing([[0, 1], [0, 2]], (2,))  # expert 0 gets 2, the fair share is 1; ceil(1.9) = 2
    found = certify(case, Placement.contiguous(4, 1), Topology((1, 1)), factor)
    assert found.drop_free is free


def test_it_is_plain_data():
    case = routing([[0, 1], [0, 2]], (2,))
    found = certify(case, Placement.contiguous(4, 1), Topology((1, 1)))
    data = json.loads(json.dumps(found.as_dict()))
    assert data["digest"] == case.digest
    assert data["tokens"] == [2]
    assert set(data) == {field.name for field in dataclasses.fields(found)}


def test_bad_routings_and_placements_are_named():
    with pytest.raises(UserError, match=r"routing\.ids\[1\].*distinct"):
        certify(routing([[0, 1], [2, 2]], (2,)), Placement.contiguous(4, 1), Topology((1, 1)))
    with pytest.raises(UserError, match=r"placement\.hosts"):
        certify(routing([[0, 1]], (1,)), Placement.contiguous(4, 2), Topology((1, 1)))
    with pytest.raises(UserError, match="no rank holds"):
        certify(routing([[0, 1]], (1,)), Placement(np.array([[True], [True], [False], [True]])), Topology((1, 1)))


def test_no_token_at_all():
    empty = Routing(np.empty((0, 2), np.int32), (0, 0), 4)
    found = certify(empty, Placement.contiguous(4, 2), Topology((2, 1)))
    assert set(found.max_over_mean.values()) == {1.0}
