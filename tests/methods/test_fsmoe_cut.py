"""From costs to how a layer is cut, and what the simulator says of it."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from harness import presets
from harness.bench import suite
from harness.case import case_of
from harness.comm.journey import Cut
from harness.errors import UserError
from harness.plan.agreement import agreement
from harness.plan.graph import Plan
from harness.plan.machine import Machine
from harness.plan.schedule import Chunks
from harness.plan.simulate import simulate
from harness.registry import system
from harness.specs import Cluster, Experiment
from harness.system import Case, GradientSlices
from methods.fsmoe.chunks import weigh_slots
from methods.fsmoe.costs import layer_costs
from methods.fsmoe.sizes import PricedSlots, layer_sizes, planned_capacity
from methods.fsmoe.step import POLICIES
from tests.methods.fsmoe_grid import pipeline_time

SUITE = suite.load("fsmoe-emulated")
COSTS = {
    "a2a.inter": {"alpha_s": 5e-4, "beta_s_per_byte": 8e-8},
    "ag.intra": {"alpha_s": 3e-3, "beta_s_per_byte": 1.2e-8},
    "rs.intra": {"alpha_s": 3e-3, "beta_s_per_byte": 1.2e-8},
    "ar.inter": {"alpha_s": 4e-4, "beta_s_per_byte": 1.7e-7},
}


def case_and_costs(experiment: Experiment) -> tuple:
    case = case_of(experiment)
    return case, Cluster.model_validate({**experiment.cluster.model_dump(), "collectives": COSTS})


def decided(name: str, case: Case, costs: Cluster) -> tuple[Cut, GradientSlices]:
    of = system(name)
    return of.schedule.decide(case, of.exchange, weigh_slots(case, of.exchange, costs))


def cell(model: str, name: str) -> Experiment:
    return next(
        e for e in SUITE.experiments if e.model.name == model and e.system == name and e.workload.name == "balanced-256"
    )


def test_the_emulated_grid_has_24_layers_under_six_schedules_and_flat_with_stand_in_compute():
    assert len(SUITE.races) == 24
    for race in SUITE.races:
        *own, flat = race.experiments
        assert {system(e.system).schedule.policy for e in own} == set(POLICIES.values())
        assert flat.system == "flat"
        assert {e.compute for e in race.experiments} == {"stand-in"}


def test_gradients_go_where_the_policy_says_and_none_is_lost():
    for name, filled in {
        "": (0,),
        "-no-iio": (0,),
        "-tutel": (2,),
        "-tutel-improved": (1,),
        "-no-overlap": (2,),
    }.items():
        case, costs = case_and_costs(cell("m512-h1024-swiglu", f"fsmoe{name}"))
        _, slices = decided(f"fsmoe{name}", case, costs)
        assert sum(slices.num_bytes) == layer_sizes(case, 1).gradient_bytes > 0
        assert slices.num_bytes[filled[0]] > 0
    case, costs = case_and_costs(cell("m512-h1024-swiglu", "fsmoe-lina"))
    _, slices = decided("fsmoe-lina", case, costs)
    assert sum(slices.messages[:2]) >= 2


def test_a_longer_layer_is_cut_finer_and_a_rival_has_one_degree():
    degrees = []
    for model in ("m512-h1024-gpt", "m1024-h2048-swiglu"):
        case, costs = case_and_costs(cell(model, "fsmoe"))
        cut, _ = decided("fsmoe", case, costs)
        degrees.append(cut.forward)
        assert planned_capacity(case, case.routing, cut.pieces) % cut.pieces == 0
        tutel, _ = decided("fsmoe-tutel", case, costs)
        assert tutel.forward == tutel.backward
    assert degrees[0] < degrees[1]


def test_the_simulated_walk_is_the_formula_where_gather_and_scatter_take_as_long():
    case, costs = case_and_costs(cell("m1024-h2048-gpt", "fsmoe"))
    sizes = layer_sizes(case, 64).forward
    for degree in (1, 2, 4, 8):
        plan, way = Plan(), PricedSlots()
        way.schedule, way.cut, way.sizes = Chunks(), Cut(degree, degree, whole=False), {"forward": sizes}
        way.there_and_back(plan)
        found = float(simulate(plan, Machine.published(costs)).total_s)
        assert found == pytest.approx(float(pipeline_time(layer_costs(sizes, costs), degree)), rel=1e-9)


def test_one_degree_alone_is_refused_and_bad_ones_name_the_remedy():
    case, costs = case_and_costs(cell("m512-h1024-gpt", "fsmoe"))
    for options in ({"degree_forward": 2}, {"degree_forward": 2, "degree_backward": 3}):
        case.options.clear()
        case.options.update(options)
        with pytest.raises(UserError, match=r"options.degree_backward: .*must be one of 1, 2, 4, 8; give both"):
            decided("fsmoe", case, costs)


def test_packages_have_no_stand_in():
    from harness.bench.race import no_stand_in

    case, _ = case_and_costs(cell("m512-h1024-gpt", "fsmoe"))
    assert no_stand_in(system("megatron"), case) == "megatron has no stand-in for its computation"
    assert no_stand_in(system("fsmoe"), case) is None
    for name in ("fsmoe", "flat", "hecate"):
        on_gpu = dataclasses.replace(case, device="cuda:0")
        assert "on a GPU give compute: real" in no_stand_in(system(name), on_gpu)
        assert "gemm constants" in no_stand_in(system(name), dataclasses.replace(case, cluster=None))
    assert presets.cluster("emulated-2x4-balanced").loopback_bytes_per_s


def test_agreement_counts_errors_and_orders():
    cells = pd.DataFrame(
        {
            "race": ["a"] * 3 + ["b"] * 3,
            "measured_s": [1.0, 2.0, 3.0, 1.0, 2.0, 4.0],
            "predicted_s": [1.1, 2.0, 3.0, 2.0, 1.8, 4.0],
        }
    )
    found = agreement(cells)
    assert found.mean_error == pytest.approx((0.1 + 1.0 + 0.1) / 6)
    assert found.largest_error == pytest.approx(1.0)
    assert (found.mean_tau, found.least_tau) == pytest.approx(((1 + 1 / 3) / 2, 1 / 3))
