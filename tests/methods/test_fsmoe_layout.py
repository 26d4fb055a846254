"""FSMoE's layer, priced: what it costs, what it is planned by, and what a step settles."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from harness import presets
from harness.case import case_of, cases_of
from harness.comm.journey import Cut
from harness.plan.machine import Machine
from harness.plan.passage import plan_alone
from harness.plan.priced_step import gradient_bytes
from harness.registry import system
from harness.simulation import simulate
from harness.specs import Cluster, Experiment, with_levels
from harness.system import Case
from methods.fsmoe.chunks import calibrated, cost_keys
from methods.fsmoe.costs import START_S
from tests.methods.test_fsmoe_cut import COSTS

RATES = {"node": 1e9, "gpu": 1e10}


def cluster(kind: str = "physical", shape: tuple[int, int] = (2, 4), **stated: Any) -> Cluster:
    levels = [
        {"name": name, "size": size, "bandwidth_bytes_per_s": rate}
        for (name, rate), size in zip(RATES.items(), shape, strict=True)
    ]
    return with_levels("mine", levels, kind=kind, **{"device_flops_per_s": 1e14, **stated})


def costs_of(case: Case) -> Cluster | None:
    return calibrated(case, cost_keys(case, system("fsmoe").exchange))[0]


def cut_of(case: Case) -> Cut:
    return system("fsmoe").cut(case)


def experiment(on: Cluster, phase: str = "layer", name: str = "fsmoe", **changes: Any) -> Experiment:
    model = presets.model("gpt-tiny-moe").model_copy(update={"hidden": 512, "ffn": 1024, "num_layers": 3})
    workload = {"name": "w", "tokens_per_rank": 256, "generator": "zipf", "params": {"target": 3}}
    fixed = {"model": model, "cluster": on, "workload": workload, "system": name, "phase": phase, "dtype": "float32"}
    return Experiment.parse(fixed | changes, "test")


@pytest.mark.parametrize("all_to_all", ["sharded", "flat", "1dh", "2dh"])
@pytest.mark.parametrize("shape", [(2, 4), (1, 4)])
def test_every_way_between_experts_lasts_as_long_as_its_bytes(all_to_all, shape):
    """On one node, ranks with a port each: a rank's own bytes over its rate; between two, a node's."""
    options = {} if all_to_all == "sharded" else {"experts": "whole", "all_to_all": all_to_all}
    given = experiment(cluster(shape=shape), options=options)
    case = case_of(given)
    sent = system("fsmoe").planned_bytes(case)["dispatch"]
    plan = plan_alone(system("fsmoe").layout(case), "forward")
    machine = Machine.data_sheet(given.cluster)
    took = sum(
        np.max(machine.seconds(task.cost))
        for task in plan.tasks
        if task.name.split("[")[0][8:] in ("dispatch", "gather")
    )
    node = np.arange(len(sent)) // 4
    across = sent * (node[:, None] != node)
    inside = (sent - across).sum(1).max() / RATES["gpu"]
    between = max(across[:4].sum() / RATES["node"], across.sum(1).max() / RATES["gpu"])
    if all_to_all == "flat":
        assert took == pytest.approx(max((sent.sum(1).max()) / RATES["gpu"], between))
    elif all_to_all == "1dh":  # what the first rank gets, and then hands out
        assert took == pytest.approx(2 * sent[1:4, 0].sum() / RATES["gpu"] + between)
    else:
        assert took == pytest.approx(inside + between)


def test_identity_experts_cost_nothing_and_an_expert_s_shards_what_it_costs():
    macs = {}
    for phase in ("exchange", "layer"):
        way = system("fsmoe").layout(case_of(experiment(cluster(), phase)))
        for direction in ("forward", "backward"):
            plan = plan_alone(way, direction)
            (*experts,) = (task.cost for task in plan.tasks if ".experts[" in task.name)
            macs[phase, direction] = sum(float(cost.macs) for cost in experts)
            rows = sum(cost.experts.rows.sum() for cost in experts) if phase == "layer" else 0
            if phase == "layer":
                assert rows * sum(k * n for k, n in experts[0].experts.products) == macs[phase, direction]
    assert macs["exchange", "forward"] == macs["exchange", "backward"] == 0
    assert macs["layer", "backward"] == 2 * macs["layer", "forward"] > 0


def test_a_stand_in_waits_as_long_as_the_cluster_s_products_take():
    on = cluster(collectives=COSTS, gemm={"alpha_s": 1e-3, "beta_s_per_mac": 1e-11})
    given = experiment(on, compute="stand-in")
    cut = cut_of(case_of(given))
    assert cut.forward > 1
    found = simulate(given, Machine.published(on)).timelines["forward"]
    start, end = found.of("forward.experts[0]")
    sizes = system("fsmoe").layout(case_of(given)).of_layer
    np.testing.assert_allclose(end - start, 2 * 1e-3 + sizes.forward.macs * 1e-11 / cut.forward)
    start, end = found.of("forward.attention")
    np.testing.assert_allclose(end - start, sizes.dense_s[0])


# ------------------------------------------------------------------------------------------------------- planned by


def test_a_real_cluster_without_costs_is_planned_by_its_data_sheet():
    case = case_of(experiment(cluster()))
    costs = costs_of(case)
    alpha, beta = costs.linear("a2a.inter")
    assert (alpha, beta) == (START_S, pytest.approx(4 / 2 / RATES["node"]))  # 4 ranks share a port, half goes through
    assert costs.linear("ag.intra")[1] == pytest.approx(3 / 4 / RATES["gpu"])
    assert cut_of(case).forward > 1


@pytest.mark.parametrize(
    "on",
    [
        cluster("emulated"),  # what its processes reach is measured, or not known
        cluster(device_flops_per_s=None),
        cluster(
            "emulated", collectives={"a2a.inter": COSTS["a2a.inter"]}, gemm={"alpha_s": 0, "beta_s_per_mac": 1e-12}
        ),
    ],
    ids=["emulated", "no device", "half the costs"],
)
def test_where_nothing_can_be_weighed_there_is_one_chunk(on):
    case = case_of(experiment(on))
    assert costs_of(case) is None
    assert cut_of(case).forward == 1


def test_costs_that_are_stated_come_before_rates():
    on = cluster(collectives={**COSTS, "ar.inter": COSTS["ar.inter"]}, gemm={"alpha_s": 0, "beta_s_per_mac": 1e-12})
    costs = costs_of(case_of(experiment(on)))
    assert costs is on
    half = dataclasses.replace(case_of(experiment(on)), options={"experts": "whole"})  # a2a.flat is not stated
    assert costs_of(half).linear("ar.inter") == on.linear("ar.inter")
    assert costs_of(half).linear("a2a.flat")[0] == START_S


# -------------------------------------------------------------------------------------------------------- whole steps


@pytest.mark.parametrize("name", ["fsmoe", "fsmoe-tutel-improved", "fsmoe-lina"])
def test_a_step_settles_degrees_and_slices_once(name):
    given = experiment(cluster(), "train_step", name)
    stream = gradient_bytes(given)
    cases, slices = system(name).settle(cases_of(given), stream.part_bytes, stream.scope)
    assert {"degree_forward", "degree_backward"} <= set(cases[0].options)
    assert sum(sum(each.num_bytes) for each in slices) > 0
    uniform = {"name": "w", "tokens_per_rank": 256, "generator": "uniform"}
    later = cases_of(experiment(cluster(), "train_step", name, workload=uniform))
    moved = [dataclasses.replace(a, routing=b.routing) for a, b in zip(cases, later, strict=True)]
    for before, after in zip(cases, moved, strict=True):  # another routing makes other buffers, cut alike
        ways = system(name).layout(before), system(name).layout(after)
        assert [way.cut.forward for way in ways] == [before.options["degree_forward"]] * 2
        assert ways[0].of_layer.forward.slot_bytes != ways[1].of_layer.forward.slot_bytes


def test_long_slices_lower_the_degrees_of_the_layers_that_send_them():
    costs = {**COSTS, "ar.flat": {"alpha_s": 1e-5, "beta_s_per_byte": 1e-7}}
    given = experiment(cluster(collectives=costs, gemm={"alpha_s": 1e-4, "beta_s_per_mac": 1e-10}), "train_step")
    stream = gradient_bytes(given)
    cases, slices = system("fsmoe").settle(cases_of(given), stream.part_bytes, stream.scope)
    assert [case.options["degree_backward"] for case in cases] == [2, 2, 8]  # the last layer's backward is the first
    assert [each.num_bytes[0] > 0 for each in slices] == [False, True, True]


def test_overlap_of_links_pays_on_anybody_s_cluster():
    took = {
        name: simulate(experiment(cluster(), "train_step", name), Machine.data_sheet(cluster())).samples["total"][0]
        for name in ("fsmoe", "fsmoe-no-iio", "fsmoe-no-overlap")
    }
    assert took["fsmoe"] < took["fsmoe-no-iio"] < took["fsmoe-no-overlap"]
