"""What the judge of time says of emulated training steps of Hecate and its rivals: orders, bounds, and bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness import ledger, presets
from harness.case import cases_of
from harness.plan.cost import Cost, InTurn, Transfer
from harness.plan.graph import INTER, INTRA
from harness.plan.host import amount
from harness.plan.links import Line, Ports
from harness.plan.machine import Machine
from harness.plan.profiled import Profiled
from harness.registry import system as named
from harness.simulation import Simulation, simulate, training_plan
from harness.specs import Experiment
from harness.topology import Topology
from harness.traffic import port_load

CLUSTER, TOPOLOGY = presets.cluster("emulated-2x4-balanced"), Topology((2, 4))
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
        "cluster": CLUSTER,
        "workload": {"name": "w", "tokens_per_rank": 1024, "generator": "zipf", "params": {"target": 4.0}},
        "system": system,
        "phase": "train_step",
        "compute": "stand-in",
    }
    return Experiment.parse(fields | changes, "test")


@pytest.fixture(scope="module")
def machine() -> Machine:
    found = ledger.latest(CLUSTER)
    assert found is not None
    return Machine.profiled(CLUSTER, found, "stand-in")


@pytest.fixture(scope="module")
def judged(machine) -> dict[str, Simulation]:
    """Of the third step: the second has found Hecate's overlap degree."""
    return {system: simulate(experiment(system), machine, warm=2) for system in SYSTEMS}


def seconds(found: Simulation) -> float:
    (total_s,) = found.samples["total"]
    return total_s


def span(found: Simulation, task: str) -> tuple[float, float]:
    """First start and last end, over ranks."""
    start, end = found.timelines["step"].of(task)
    return float(np.min(start)), float(np.max(end))


def test_links_have_about_the_rates_that_were_shaped(machine):
    assert isinstance(machine.links, Profiled)
    port, inside = machine.links.ports.lines
    assert 0.85 * 25e6 < port.bytes_per_s < 1.05 * 25e6
    assert 0.85 * 250e6 < inside.bytes_per_s < 1.05 * 250e6
    assert (port.shared, inside.shared) == (False, True)
    matrix = np.zeros((8, 8))
    matrix[0, 4] = matrix[1, 5] = 1e6  # one port, out
    matrix[2, 3] = 1e6
    assert machine.links.ports.of(matrix) == pytest.approx(2e6 / port.bytes_per_s)
    assert machine.links.ports.of(np.where(TOPOLOGY.level_between == 1, matrix, 0)) == 1e6 / inside.bytes_per_s


def test_every_system_has_its_tasks(judged):
    kinds = {
        system: {task.kind for task in found.timelines["step"].plan.tasks if task.name.startswith("layer0.")}
        for system, found in judged.items()
    }
    assert {"attention", "metadata"} <= kinds["flat"]
    assert not {"gather", "late", "reduce"} & kinds["flat"]
    assert {"gather", "reduce"} <= kinds["hecate"]
    assert "regather" not in kinds["hecate"]
    assert {"gather", "regather", "reduce"} <= kinds["hecate-rm"] & kinds["fsdp-experts"]
    assert "late" in kinds["fastermoe"]
    assert "gather" not in kinds["fastermoe"]
    assert "layer0.forward.dispatch[3]" in {task.name for task in judged["fastermoe"].timelines["step"].plan.tasks}
    assert "reduce" in kinds["flexmoe"] & kinds["eplb"]


def test_skew_costs_those_who_do_nothing_about_it(judged, machine):
    totals = {system: seconds(found) for system, found in judged.items()}
    assert totals["smartmoe"] == pytest.approx(totals["flat"], rel=1e-3)  # it moves nothing in its first steps
    placed = simulate(experiment("smartmoe", options={"place_every": 5}), machine, warm=5)
    assert seconds(placed) < totals["flat"]
    sharded = simulate(experiment("hecate", options={"reshard_every": 5}), machine, warm=5)
    assert seconds(sharded) != pytest.approx(totals["hecate"], rel=1e-3)
    assert totals["hecate"] < totals["flat"]
    assert totals["hecate"] <= totals["hecate-rm"]
    assert totals["flexmoe"] < totals["flat"]


def test_a_move_of_experts_is_paid_in_the_step_that_ends_with_it(machine):
    found = simulate(experiment("smartmoe", options={"place_every": 3}), machine, steps=4)
    plain, *_, moving, placed = found.samples["total"]
    start, end = span(simulate(experiment("smartmoe", options={"place_every": 3}), machine, steps=3), "after-step")
    assert moving == pytest.approx(plain + end - start, rel=0.01)
    assert end - start > 0.05 * plain
    assert placed < plain


def test_no_lane_is_busy_for_longer_than_the_step(judged):
    for found in judged.values():
        timeline = found.timelines["step"]
        for lane in ("compute", INTER):
            here = [i for i, task in enumerate(timeline.plan.tasks) if task.lane == lane]
            busy = (timeline.end_s - timeline.start_s)[here].sum(0)
            assert busy.max() <= seconds(found) * (1 + 1e-9)


def test_what_is_hidden_does_not_count(judged):
    start, end = span(judged["hecate"], "layer1.forward.gather.inter")
    begin, _ = span(judged["hecate"], "layer1.forward.attention")
    dispatch, _ = span(judged["hecate"], "layer1.forward.dispatch")
    assert start <= begin + 1e-9
    assert end <= dispatch + 1e-9


def test_what_is_near_comes_beside_what_crosses_between_nodes(judged):
    for transfer in ("layer0.forward.gather", "layer1.forward.gather", "layer0.backward.regather"):
        (begins, crossed), (near, _), (spreads, _) = (
            span(judged["fsdp-experts"], f"{transfer}.{part}") for part in (INTER, "near", INTRA)
        )
        assert near < crossed <= spreads
        assert near - begins < 0.1 * (crossed - begins)


@pytest.mark.parametrize("name", ["flat", "hiermoe-hd2", "hiermoe", "fsdp-experts", "hecate"])
def test_bytes_that_are_priced_are_those_that_the_system_plans(name):
    """A port of one byte a second, everything else at once: what the tasks of links take is what passes that port."""
    load = {"name": "w", "tokens_per_rank": 512, "generator": "zipf", "params": {"target": 3.0}, "seed": 3}
    given = experiment(name, workload=load, options={"t": 3} if name == "hecate" else {})
    outer = Ports(TOPOLOGY, (Line(0, 1.0),))
    priced = sum(
        float(np.max(outer.seconds(part)))
        for task in training_plan(given, seen=1).tasks
        if task.name.startswith("layer")
        for part in transfers(task.cost)
    )
    planned = 0.0
    for layer, case in enumerate(cases_of(given)):
        for part, matrix in named(name).planned_bytes(case).items():
            last = layer == MODEL["num_layers"] - 1
            if not (part == "regather" and last):  # those stay from forward to backward
                planned += port_load(np.where(TOPOLOGY.level_between == 0, matrix, 0), TOPOLOGY, 0).max()
    assert planned > 0
    assert priced == pytest.approx(planned, rel=1e-9)


def transfers(cost: Cost | None) -> list[Transfer]:
    match cost:
        case Transfer():
            return [cost]
        case InTurn():
            return [each for part in cost.parts for each in transfers(part)]
    return []


def test_the_processor_takes_as_much_under_every_system_and_the_optimizer_by_what_is_owned(judged, machine):
    optimizer = {
        system: next(task.cost for task in found.timelines["step"].plan.tasks if task.name == "optimizer")
        for system, found in judged.items()
    }
    host = {"forward.gate": 0.1, "optimizer": 0.2 / np.mean(amount(optimizer["flat"]))}
    for system in ("flat", "eplb"):
        whole = simulate(experiment(system), dataclasses.replace(machine, host=host), warm=2)
        more = seconds(whole) - seconds(judged[system]) - 2 * 0.1
        owned = np.max(amount(optimizer[system])) / np.mean(amount(optimizer["flat"]))
        assert more == pytest.approx(0.2 * owned, rel=1e-6)
        assert (owned > 1) == (system == "eplb")
