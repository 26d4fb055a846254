from __future__ import annotations

import numpy as np
import pytest

from harness.errors import UserError
from harness.plan.cost import Compute, Even, Hold
from harness.plan.graph import Plan
from harness.plan.machine import Machine
from harness.plan.simulate import schedule, simulate
from harness.specs import with_levels
from harness.topology import Topology
from tests.plan.reference import fluid

CLUSTER = with_levels(
    "c",
    [{"name": "node", "size": 2}, {"name": "rank", "size": 2}],
    kind="physical",
    collectives={
        "a2a.inter": {"alpha_s": 1.0, "beta_s_per_byte": 0.5},
        "a2a.inter@16": {"alpha_s": 2.0, "beta_s_per_byte": 0.5},
        "ag.intra": {"alpha_s": 0.0, "beta_s_per_byte": 0.25},
    },
    gemm={"alpha_s": 0.5, "beta_s_per_mac": 0.125},
)


def random_plan(seed: int, num_tasks: int) -> tuple[Plan, np.ndarray]:
    rng = np.random.default_rng(seed)
    plan = Plan()
    for i in range(num_tasks):
        before = rng.choice(i, size=min(i, int(rng.integers(0, 3))), replace=False)
        plan.add(f"t{i}", str(rng.choice(plan.lanes)), after=[f"t{j}" for j in before])
    return plan, rng.uniform(0.1, 1.0, num_tasks)


@pytest.mark.parametrize("seed", range(12))
def test_many_configurations_at_once_equal_the_slow_simulator(seed):
    contention = {"inter": {"intra": 0.3, "compute": 0.1}, "intra": {"inter": 0.5}, "compute": {"intra": 0.8}}
    plan, durations = random_plan(seed, 25)
    many = np.stack([durations, 2 * durations[::-1], np.ones(25)], axis=1)
    for slowed in ({}, contention):
        found = schedule(plan, many, slowed)
        for column in range(3):
            start, end = fluid(plan, many[:, column].tolist(), slowed)
            np.testing.assert_allclose(found.end_s[:, column], end, rtol=1e-6)
            np.testing.assert_allclose(found.start_s[:, column], start, rtol=1e-6, atol=1e-9)


def test_tasks_are_walked_in_the_order_of_adding_as_far_as_waits_allow():
    circles = 0
    for seed in range(40):
        rng, plan = np.random.default_rng(seed), Plan()
        lanes = rng.choice(plan.lanes, 12).tolist()
        waits = rng.random((12, 12)) < 0.02  # for tasks that are added later, too
        for i, lane in enumerate(lanes):
            plan.add(f"t{i}", lane, [f"t{j}" for j in np.flatnonzero(waits[i])])
            waits[i] |= [j < i and lanes[j] == lane for j in range(12)]
        found: list[int] = []
        while ready := [i for i in range(12) if i not in found and set(np.flatnonzero(waits[i])) <= set(found)]:
            found.append(ready[0])
        if len(found) == 12:
            assert plan.order == found
        else:
            circles += 1
            with pytest.raises(UserError, match="in a circle"):
                plan.order  # noqa: B018
    assert 5 < circles < 35  # both are there


def test_prices_are_linear_and_of_the_right_size():
    plan = Plan()
    plan.add("a", "inter", cost=Even("a2a", "inter", np.array([0.0, 4.0])))
    plan.add("b", "compute", cost=Compute(8.0, 2))
    plan.add("c", "compute", cost=Hold(0.75))
    np.testing.assert_allclose(Machine.published(CLUSTER).durations(plan), [[0, 3], [2, 2], [0.75, 0.75]])
    assert Machine.published(CLUSTER, num_ranks=16).seconds(Even("a2a", "inter", 4.0)) == 4.0
    with pytest.raises(
        UserError,
        match=r"cluster c.collectives: 'rs.intra': has no cost; known are .*moebench profile CLUSTER.yaml, a file of",
    ):
        Machine.published(CLUSTER).seconds(Even("rs", "intra", 1.0))


def test_a_collective_waits_for_its_group_and_for_no_other():
    plan = Plan()
    plan.add("compute", "compute", cost=Hold(np.array([1.0, 2.0, 3.0, 4.0])))  # ranks (0,0) (0,1) (1,0) (1,1)
    plan.add("intra", "intra", after=["compute"], cost=Even("ag", "intra", 4.0))
    plan.add("inter", "inter", after=["compute"], cost=Even("a2a", "inter", 2.0))
    found = simulate(plan, Machine.published(CLUSTER), Topology((2, 2)))
    np.testing.assert_allclose(found.of("intra")[0], [2, 2, 4, 4])
    np.testing.assert_allclose(found.of("inter")[0], [3, 4, 3, 4])
    np.testing.assert_allclose(found.of("inter")[1], [5, 6, 5, 6])
    assert found.total_s.shape == (4,)


def test_bad_plans_name_the_task():
    plan = Plan()
    plan.add("a", "inter", after=["b"])
    with pytest.raises(UserError, match=r"task a.after: 'b': is not in the plan"):
        plan.order  # noqa: B018
    plan.add("b", "inter")
    with pytest.raises(UserError, match=r"a -> b -> a|b -> a -> b"):  # b follows a on its lane
        plan.order  # noqa: B018
    with pytest.raises(UserError, match=r"task c.lane: 'nvlink': unknown lane; this plan has compute, inter, intra"):
        plan.add("c", "nvlink")
    with pytest.raises(UserError, match="already in the plan"):
        plan.add("a", "compute")
