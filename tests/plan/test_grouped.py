"""The price of several expert-parallel groups: what each sends and computes, all of them at once."""

from __future__ import annotations

import numpy as np
import pytest

from harness.case import case_of, system_of
from harness.errors import Unplanned
from harness.groups import Groups
from harness.plan.cost import Compute, Even, Hold, InTurn, Transfer
from harness.plan.grouped import cluster_of, merged
from harness.plan.machine import Machine
from harness.simulation import layer_plans, simulate, training_plan
from harness.specs import Cluster, Collective, Experiment, Model, Workload, with_levels
from harness.topology import Topology
from harness.traffic import port_load

SHAPE, NODE_RATE = (2, 4), 1e6
INSIDE = {"expert_parallel": 4}
ACROSS = {"expert_parallel": 2, "expert_placement_order": "across_nodes"}
ACROSS4 = {"expert_parallel": 4, "expert_placement_order": "across_nodes"}


def cluster(**collectives: Collective) -> Cluster:
    levels = [
        {"name": "node", "size": 2, "bandwidth_bytes_per_s": NODE_RATE},
        {"name": "rank", "size": 4, "bandwidth_bytes_per_s": 1e15},
    ]
    known = {key.replace("_", "."): each for key, each in collectives.items()}
    return with_levels("two", levels, kind="physical", device_flops_per_s=1e18, collectives=known)


def experiment(system: str, phase: str, layout: dict) -> Experiment:
    model = Model(name="m", num_layers=2, hidden=32, ffn=48, num_experts=16, top_k=2, num_heads=4, seq=8, vocab=64)
    workload = Workload(name="skewed", generator="zipf", params={"target": 4}, tokens_per_rank=64)
    return Experiment(
        model=model, cluster=cluster(), workload=workload, system=system, phase=phase, dtype="float32", layout=layout
    )


def seconds(each: Experiment) -> float:
    return simulate(each, Machine.data_sheet(each.cluster, 1.0)).samples["forward"][0]


@pytest.mark.parametrize("layout", [{}, ACROSS, ACROSS4])
@pytest.mark.parametrize("system", ["flat", "megatron"])
def test_all_groups_go_through_a_nodes_port_at_once(system, layout):
    each = experiment(system, "exchange", layout)
    case, alone, there = case_of(each), system_of(each).alone(), 0.0
    for name in ("metadata", "dispatch", "combine"):
        matrix = np.zeros((8, 8))
        for ranks, part in zip(each.groups or [np.arange(8)], case.parts, strict=True):
            matrix[np.ix_(ranks, ranks)] += alone.planned_bytes(part)[name]
        there += port_load(matrix, Topology(SHAPE), 0).max()
    assert seconds(each) == pytest.approx(there / NODE_RATE, rel=1e-6)


def test_groups_inside_of_nodes_leave_their_ports_alone():
    assert seconds(experiment("flat", "exchange", INSIDE)) < 1e-6
    assert seconds(experiment("flat", "exchange", {})) > 1e-3


@pytest.mark.parametrize("layout", [INSIDE, ACROSS4])
def test_each_group_computes_the_rows_of_its_own_tokens(layout):
    each = experiment("flat", "layer", layout)
    case, system = case_of(each), system_of(each)
    groups, rows = each.groups, system.planned_rows(case)
    assert groups is not None
    for ranks, part in zip(groups, case.parts, strict=True):
        assert (rows[ranks].sum(0) == part.routing.counts.sum(0)).all()
        assert part.routing.tokens == tuple(np.array(case.routing.tokens)[ranks])
    (task,) = (task for task in layer_plans(each)["forward"].tasks if task.kind == "experts")
    assert task.cost.macs.tolist() == (rows.sum(1) * 2 * 32 * 48).tolist()


@pytest.mark.parametrize(("layout", "scope"), [(INSIDE, "inter1"), (ACROSS, "intra1"), (ACROSS4, "2by1.intra1")])
def test_a_training_sums_experts_over_their_replicas(layout, scope):
    (tail,) = (
        task.cost
        for task in training_plan(experiment("flat", "train_step", layout)).tasks
        if task.name == "gradients-tail"
    )
    sums = [part for part in tail.parts if isinstance(part, Even) and part.scope == scope]
    of_rank = 2 * 16 // layout["expert_parallel"] * 2 * 32 * 48 * 4  # layers, experts of a rank, numbers, bytes
    assert [np.unique(part.num_bytes).tolist() for part in sums] == [[of_rank]]


def test_what_groups_cost_apart_is_one_cost_on_all_ranks():
    groups = Groups.of(Topology(SHAPE), 4, across=True)
    ranks, whole = np.arange(8.0), Even("ar", "flat", 7)
    assert merged(groups, [None, None]) is None
    assert merged(groups, [whole, whole]) is whole
    held = merged(groups, [Hold(ranks[of]) for of in groups])
    assert isinstance(held, Hold)
    assert held.seconds.tolist() == ranks.tolist()
    work = merged(groups, [Compute(ranks[groups.members[0]], 2), None])
    assert isinstance(work, Compute)
    assert work.macs.tolist() == [0, 0, 2, 0, 4, 0, 6, 0]
    each = [InTurn((Transfer("a2a", "flat", np.ones((4, 4))), Hold(1.0))) for _ in groups]
    both = merged(groups, each)
    assert isinstance(both, InTurn)
    assert (both.parts[0].scope, both.parts[1].seconds) == ("4by2.flat", 1.0)
    with pytest.raises(Unplanned, match=r"layout.expert_parallel: 4: a task costs Compute, Hold in groups"):
        merged(groups, [Hold(1.0), Compute(1.0)])


def test_a_group_has_its_share_of_ports_and_the_costs_of_its_scopes():
    own = Collective(alpha_s=1e-6, beta_s_per_byte=1e-9)
    whole = cluster(a2a_flat=own, a2a_intra1=own.model_copy(update={"alpha_s": 2e-6}))
    inside, across = (cluster_of(whole, Groups.of(Topology(SHAPE), 4, order)) for order in (False, True))
    assert (inside.shape, across.shape) == ((1, 4), (2, 2))
    assert [level.bandwidth_bytes_per_s for level in across.levels] == [NODE_RATE / 2, 1e15]
    assert inside.collectives["a2a.flat"].alpha_s == 2e-6
    assert "a2a.flat" not in across.collectives


def test_replicas_are_summed_when_a_groups_copies_are():
    tasks = {task.name: task for task in training_plan(experiment("eplb", "train_step", INSIDE)).tasks}
    awaited = {name for name in tasks["optimizer"].after if name != "gradients-tail"}
    assert awaited
    assert awaited <= set(tasks["gradients-tail"].after)
