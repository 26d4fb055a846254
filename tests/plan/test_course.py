"""What a simulated training decides from step to step is what the executed one does, on the same routing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from harness import registry
from harness.memory import expert_bytes
from harness.placement import Placement
from harness.plan.cost import Cost, InTurn, Transfer
from harness.plan.machine import Machine
from harness.plan.moving import Move
from harness.plan.priced import PricedReplicated
from harness.routing.outline import Outlined
from harness.simulation import Training, simulate
from harness.specs import Experiment, with_levels
from harness.topology import Topology
from methods.hecate.between import Between, Reshards
from tests.methods.test_fsmoe_training import training

SHAPE, NUM_STEPS, LAYERS = (2, 2), 6, 3
#: of systems whose experts or copies move, at intervals that make them
MOVING: dict[str, dict[str, Any]] = {
    "smartmoe": {"place_every": 2},
    "hiermoe-hd2-smart": {"place_every": 3},
    "eplb": {"rearrange_every": 2},
    "flexmoe": {"rearrange_every": 2},
    "hecate": {"t": 3, "window": 2, "reshard_every": 3},
    "hecate-rm": {"t": 5, "m": 1, "window": 3, "reshard_every": 2, "calibrate": True},
    "hiermoe": {"swap_every": 2, "swap_pairs": 2},
    "hecate+smartmoe": {"t": 3, "window": 2, "place_every": 2},
    "hiermoe-hd2+fsmoe+hecate-rm+smartmoe": {"t": 4, "m": 2, "place_every": 3},
    "hiermoe-hd2+fsmoe+hiermoe": {"swap_every": 2},
    "hiermoe-hd2+fsmoe+eplb": {"rearrange_every": 2},
}
STILL = ("flat", "fastermoe", "fsdp-experts")


def experiment_of(system: str, **options: Any) -> Experiment:
    levels = [{"name": f"l{i}", "size": size, "bandwidth_bytes_per_s": 1e6} for i, size in enumerate(SHAPE)]
    burst = {"name": "w", "tokens_per_rank": 64, "generator": "rotating", "params": {"hot_experts": 2, "period": 2}}
    on = with_levels("slow", levels, kind="local", device_flops_per_s=1e12)
    made = training(system, on, options=options, workload=burst)
    return Experiment.model_validate(made["experiment"])


@pytest.fixture(scope="module")
def on_ranks(session) -> list[dict[str, dict[str, Any]]]:
    """All trainings on the same ranks, one after another; by rank and system."""
    wanted = {name: experiment_of(name, **options) for name, options in MOVING.items()}
    wanted |= {name: experiment_of(name) for name in STILL}
    payload = {"experiments": [each.model_dump(mode="json") for each in wanted.values()], "num_steps": NUM_STEPS}
    on = next(iter(wanted.values())).cluster
    answers = session(on).call("tests.plan.course_on_ranks:trained", payload, timeout_s=200)
    return [dict(zip(wanted, answer, strict=True)) for answer in answers]


@pytest.fixture(scope="module")
def executed(on_ranks) -> dict[str, dict[str, Any]]:
    return on_ranks[0]


@pytest.mark.parametrize("system", [*MOVING, *STILL])
def test_what_each_step_moves_is_foretold_to_the_byte(on_ranks, system):
    experiment = experiment_of(system, **MOVING.get(system, {}))
    foretold = simulate(experiment, Machine.data_sheet(experiment.cluster), steps=NUM_STEPS - 1, warm=1)
    assert foretold.first == 1
    ran = [sum((Counter(rank[system]["sent"][step]) for rank in on_ranks), Counter()) for step in range(1, NUM_STEPS)]
    assert list(foretold.moved) == ran
    assert any(ran) == (system != "flat")


@pytest.mark.parametrize("system", [*MOVING, *STILL])
def test_a_simulated_training_decides_as_the_executed_one(executed, system):
    ran, simulated = executed[system], Training(experiment_of(system, **MOVING.get(system, {})))
    course = simulated.course
    assert course.moves == ran["moves"]
    owners = [case.placement.hosts for case in course.cases(simulated.cases)]
    assert [each.tolist() for each in owners] == ran["first"]
    moved_bytes, changes = 0.0, 0
    for step in range(NUM_STEPS):
        if step:
            simulated.come_to(step, priced=True)
        passages = course.passages(simulated.cases)
        for passage, used in zip(passages, ran["used"][step], strict=True):
            if isinstance(passage, PricedReplicated):
                np.testing.assert_array_equal(passage.hosts, used, err_msg=f"copies in step {step}")
        cost = simulated.saw(step, None)
        now = [case.placement.hosts for case in course.cases(simulated.cases)]
        for layer, (found, there) in enumerate(zip(now, ran["hosts"][step], strict=True)):
            np.testing.assert_array_equal(found, there, err_msg=f"layer {layer} behind step {step}")
        here = sum(float(part.matrix.sum()) for part in transfers(cost))
        assert (here > 0) == any((a & ~b).any() for a, b in zip(now, owners, strict=True))
        moved_bytes, changes, owners = moved_bytes + here, changes + (here > 0), now
    assert (changes > 1) == (system in MOVING)
    model = simulated.experiment.model
    assert moved_bytes % (3 * expert_bytes(model, "float64")) == 0  # with both moments


def transfers(cost: Cost | None) -> list[Transfer]:
    parts = cost.parts if isinstance(cost, InTurn) else ()
    return [part for part in parts if isinstance(part, Transfer)]


def test_what_moves_is_what_changes_of_all_ranks():
    rng = np.random.default_rng(2)
    before = Placement.contiguous(16, 4)
    for _ in range(5):
        hosts = before.hosts & (rng.random(before.hosts.shape) < 0.7) | (rng.random(before.hosts.shape) < 0.2)
        hosts[np.arange(16), rng.integers(0, 4, 16)] = True
        made = Move((), before, Placement.of_hosts(hosts, before))
        wanted = np.zeros((4, 4))
        for rank in range(4):
            for _, source, _ in made.changes(rank):
                wanted[source, rank] += 2.0 * (source != rank)
        np.testing.assert_array_equal(made.matrix(2.0), wanted)
        before = made.after


def test_a_placement_meets_the_routing_of_the_step_behind_it():
    """Experts are where the load of the steps before would have them: the busiest rank has more than it would."""
    stale = Training(experiment_of("eplb", rearrange_every=2))
    loads = []
    for step in range(3):
        if step:
            stale.come_to(step, priced=True)
        busiest = [passage.rows.sum(1).max() for passage in stale.course.passages(stale.cases)]
        loads.append(np.sum(busiest))
        stale.saw(step, None)
    fresh = registry.system("eplb")
    at_once = sum(fresh.layout(case).rows.sum(1).max() for case in stale.cases)  # planned by what it meets
    assert loads[2] > at_once  # hot experts have rotated


def test_the_overlap_degree_is_found_by_the_second_step_and_used_behind_the_third():
    experiment = experiment_of("hecate", reshard_every=0)
    simulated = Training(experiment)
    course, machine = simulated.course, Machine.data_sheet(experiment.cluster)
    assert isinstance(course, Reshards)
    degrees = []
    for step in range(4):
        if step:
            simulated.come_to(step, priced=True)
        timeline = None
        if course.watches(step):
            from harness.plan.simulate import simulate as schedule

            assert step == 1
            timeline = schedule(simulated.lay_out(machine.priced), machine, Topology(SHAPE))
        simulated.saw(step, timeline)
        degrees.append(course.policies[0].t)
    between = course.between
    assert isinstance(between, Between)
    assert course.attention_s > 0
    wanted = min(8, int(course.attention_s * 1e6 / expert_bytes(experiment.model, "float64")))
    assert degrees == [2, 2, wanted, wanted]
    assert between.profiled


def test_the_last_step_is_priced_with_what_it_moves():
    experiment = experiment_of("smartmoe", place_every=3)
    machine = Machine.data_sheet(experiment.cluster)
    still = simulate(experiment, machine, warm=1).samples["total"][0]
    moving = simulate(experiment, machine, warm=2)
    begin, end = moving.timelines["step"].of("after-step")
    alone = float((end - begin).max())
    assert alone > 0
    assert moving.samples["total"][0] == pytest.approx(still + alone, rel=0.2)


def test_what_a_sample_tells_comes_near_to_all_tokens(monkeypatch):
    """On 8 ranks with 2,048 tokens each: 128 of them, with the loads of all."""
    levels = [{"name": f"l{i}", "size": size, "bandwidth_bytes_per_s": 1e9} for i, size in enumerate((2, 4))]
    on = with_levels("eight", levels, kind="physical", device_flops_per_s=1e12)
    wide = {"num_experts": 32, "top_k": 4, "hidden": 256}
    base = experiment_of("hiermoe-hd2")
    model = base.model.model_copy(update=wide)
    zipf = base.workload.model_copy(update={"tokens_per_rank": 2048, "generator": "zipf", "params": {"target": 4.0}})
    experiment = base.model_copy(update={"model": model, "cluster": on, "workload": zipf, "dtype": "bfloat16"})
    machine = Machine.data_sheet(on)
    whole = simulate(experiment, machine, whole=True)
    monkeypatch.setattr("harness.routing.outline.MOST_IDS", 1)
    some = simulate(experiment, machine)
    assert whole.notes == ()
    assert "128 of 2048 tokens a rank" in some.notes[0]
    assert some.samples["total"][0] == pytest.approx(whole.samples["total"][0], rel=0.03)
    assert some.samples != whole.samples
    flat = experiment.model_copy(update={"system": "flat"})
    training = Training(flat)
    training.lay_out()
    assert all(isinstance(case.routing, Outlined) and "ids" not in vars(case.routing) for case in training.cases)
    found = simulate(flat, machine)
    assert found.notes == ()
    assert found.samples == simulate(flat, machine, whole=True).samples  # loads alone decide
