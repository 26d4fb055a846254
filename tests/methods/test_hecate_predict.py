"""What the simulator says of emulated training steps: tasks, orders and bounds, from planned bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness import ledger, presets
from harness.comm.job import Job
from harness.layer.weights import Weights
from harness.plan.graph import COMPUTE, INTER, INTRA, Plan, Timeline
from harness.plan.host import beside, merged
from harness.plan.machine import Machine
from harness.plan.passage import backward_layer, forward_layer, passage
from harness.plan.simulate import simulate
from harness.registry import system as named
from harness.specs import Experiment
from harness.topology import Topology
from harness.traffic import port_load
from methods.hecate import predict

SYSTEMS = ["flat", "smartmoe", "fastermoe", "flexmoe", "eplb", "fsdp-experts", "hecate", "hecate-rm"]
MODEL = {
    "name": "m",
    "num_layers": 2,
    "hidden": 512,
    "ffn": 256,
    "num_experts": 16,
    "top_k": 2,
    "seq": 512,
    "vocab": 256,
}


def experiment(system: str, **changes) -> Experiment:
    fields = {
        "model": MODEL,
        "cluster": presets.cluster("emulated-2x4-balanced"),
        "workload": {"name": "w", "tokens_per_rank": 1024, "generator": "zipf", "params": {"target": 4.0}},
        "system": system,
        "phase": "train_step",
        "compute": "stand-in",
    }
    return Experiment.parse(fields | changes, "test")


@pytest.fixture(scope="module")
def links() -> predict.Links:
    found = ledger.latest(presets.cluster("emulated-2x4-balanced"))
    assert found is not None
    return predict.Links.of(found)


@pytest.fixture(scope="module")
def timelines() -> dict:
    simulator = predict.Simulator()
    return {system: simulator._timelines(experiment(system))["step"] for system in SYSTEMS}


def test_links_have_about_the_rates_that_were_shaped(links):
    assert 0.85 * 25e6 < links.port < 1.05 * 25e6
    assert 0.85 * 250e6 < links.inside < 1.05 * 250e6
    matrix = np.zeros((8, 8))
    matrix[0, 4] = matrix[1, 5] = 1e6  # one port, out
    matrix[2, 3] = 1e6
    assert links.seconds(matrix) == pytest.approx((2e6 / links.port, 1e6 / links.inside))
    assert Topology((2, 4)) == links.topology


def test_every_system_has_its_tasks(timelines):
    kinds = {
        system: {task.name.split(".")[2] for task in t.plan.tasks if t.plan and task.name.count(".") > 1}
        for system, t in timelines.items()
    }
    assert {"attention", "metadata"} <= kinds["flat"]
    assert not {"gather", "late", "reduce"} & kinds["flat"]
    assert {"gather", "reduce"} <= kinds["hecate"]
    assert "regather" not in kinds["hecate"]
    assert {"gather", "regather", "reduce"} <= kinds["hecate-rm"] & kinds["fsdp-experts"]
    assert {"late", "dispatch[3]"} <= kinds["fastermoe"]
    assert "gather" not in kinds["fastermoe"]
    assert "reduce" in kinds["flexmoe"] & kinds["eplb"]


def test_skew_costs_those_who_do_nothing_about_it(timelines, links):
    seconds = {system: float(t.total_s) for system, t in timelines.items()}
    assert seconds["smartmoe"] == seconds["flat"]  # it moves nothing in its first steps
    placed = predict.Simulator()._timelines(experiment("smartmoe", options={"place_every": 5}))["step"]
    assert float(placed.total_s) < seconds["flat"]
    sharded = predict.Simulator()._timelines(experiment("hecate", options={"reshard_every": 5}))["step"]
    assert float(sharded.total_s) != seconds["hecate"]
    assert seconds["hecate"] < seconds["flat"]
    assert seconds["hecate"] <= seconds["hecate-rm"]
    assert seconds["flexmoe"] < seconds["flat"]
    for system, t in timelines.items():
        busy = {
            lane: sum(e - s for task, s, e in zip(t.plan.tasks, t.start_s, t.end_s, strict=True) if task.lane == lane)
            for lane in ("compute", "inter")
        }
        assert max(busy.values()) <= seconds[system] * (1 + 1e-9)


def test_what_is_hidden_does_not_count(timelines):
    timeline = timelines["hecate"]
    start, end = timeline.of("layer1.forward.gather.inter")
    begin, _ = timeline.of("layer1.forward.attention")
    dispatch, _ = timeline.of("layer1.forward.dispatch[0]")
    assert start <= begin + 1e-9
    assert end <= dispatch + 1e-9


def test_what_is_near_comes_beside_what_crosses_between_nodes(timelines):
    timeline = timelines["fsdp-experts"]
    for transfer in ("layer0.forward.gather", "layer1.forward.gather", "layer0.backward.regather"):
        (begins, crossed), (near, _), (spreads, _) = (
            timeline.of(f"{transfer}.{part}") for part in (INTER, "near", INTRA)
        )
        assert near < crossed <= spreads
        assert near - begins < 0.1 * (crossed - begins)


@pytest.mark.parametrize("name", ["flat", "hiermoe-hd2", "hiermoe", "fsdp-experts", "hecate"])
def test_bytes_that_are_priced_are_those_that_the_system_plans(name):
    """A port of one byte a second, everything else at once: what the tasks of links take is what passes that port."""
    load = {"name": "w", "tokens_per_rank": 512, "generator": "zipf", "params": {"target": 3.0}, "seed": 3}
    topology, given = Topology((2, 4)), experiment(name, workload=load)
    plan = predict.step_plan(given, predict.Links(topology, 1.0, np.inf, (0.0, 0.0)))
    assert plan is not None
    priced = sum(float(np.asarray(task.cost.seconds)) for task in plan.tasks if task.lane == INTER and task.cost)
    planned = 0.0
    for layer, case in enumerate(predict.cases_of(named(name), given, topology)):
        for part, matrix in named(name).planned_bytes(case).items():
            last = layer == MODEL["num_layers"] - 1
            if not (part == "regather" and last):  # those stay from forward to backward
                planned += port_load(np.where(topology.level_between == 0, matrix, 0), topology, 0).max()
    assert planned > 0
    assert priced == pytest.approx(planned, rel=1e-9)


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    """Rank 0 of 8, whose collectives do nothing: enough to lay a layer out."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield Job(Topology((2, 4)))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["flat", "fsdp-experts", "hecate-rm", "eplb"])
def test_transfers_of_copies_stand_in_the_step_as_they_are_executed(name, job, links):
    """The same tasks, lanes and waits, of the layer that is not the last."""
    given = experiment(name, options={"t": 3} if name.startswith("hecate") else {})
    case = predict.cases_of(named(name), given, job.topology)[0]
    layer = named(name).build(case, job, Weights(given.model, given.dtype, seed=0))
    way, executed = passage(layer), Plan()
    forward_layer(executed, way.forward, (), ahead=way.ahead, prefix="layer0.")
    way.ahead_back(executed, "layer0.backward.")
    backward_layer(
        executed, way.backward, (), beside=lambda: way.behind(executed, "layer0.backward."), prefix="layer0."
    )
    priced = predict.step_plan(given, links)
    assert priced is not None
    assert copies_of(priced) == copies_of(executed)
    assert bool(copies_of(priced)) == (name != "flat")


def copies_of(plan: Plan) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Lane and waits of the tasks that move copies of layer 0, by name."""
    kinds = ("gather", "late", "regather", "reduce", "spread")
    return {
        task.name: (task.lane, tuple(task.after))
        for task in plan.tasks
        if task.name.startswith("layer0.") and task.name.split(".")[2] in kinds
    }


def test_only_what_is_known_is_predicted():
    simulator = predict.Simulator()
    assert simulator._timelines(experiment("flat", compute="real")) == {}
    assert simulator._timelines(experiment("flat", phase="layer")) == {}
    assert simulator._timelines(experiment("megatron")) == {}


def test_what_the_processor_does_beside_is_taken_from_what_ran():
    executed, simulated = Plan(), Plan()
    for name, lane in (("layer0.forward.attention", COMPUTE), ("layer0.forward.metadata", INTER),
                       ("layer0.forward.experts", COMPUTE), ("optimizer", COMPUTE)):  # fmt: skip
        executed.add(name, lane)
        simulated.add(name, lane)
    start = np.array([[0.0, 0.0], [5.0, 6.0], [7.0, 7.0], [9.0, 9.0]])
    ran = Timeline(executed, start, start + np.array([[4.0, 6.0], [3.0, 2.0], [1.0, 1.0], [2.0, 3.0]]))
    said = Timeline(simulated, np.zeros(4), np.array([3.0, 0.5, 0.5, 0.0]))
    assert beside(ran, said) == {"forward.attention": 2.0, "forward.metadata": 1.5, "optimizer": 2.5}
    assert merged([{"a": 1.0}, {"a": 2.0, "b": 4.0}]) == {"a": 1.5, "b": 4.0}


def test_the_processor_takes_as_much_under_every_system_and_the_optimizer_by_what_is_owned(links):
    extra = {"forward.gate": 0.1, "optimizer": 0.2}
    for system, owned in (("flat", 1.0), ("eplb", None)):
        bare, whole = (step_seconds(experiment(system), links, given) for given in ({}, extra))
        more = whole - bare - 2 * 0.1
        assert more == pytest.approx(0.2) if owned else 0.2 < more < 0.4


def step_seconds(given: Experiment, links: predict.Links, extra: dict[str, float]) -> float:
    plan = predict.step_plan(given, links, extra)
    return float(simulate(plan, Machine.published(given.cluster)).total_s)
