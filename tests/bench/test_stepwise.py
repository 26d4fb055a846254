"""Rows of steps whose routing drifts: what a run and a simulation say of a step is the same, and is that step's."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from harness.bench import stepwise, suite, tidy
from harness.comm.moved import MOVES
from harness.placement import Placement
from harness.plan.machine import Machine
from harness.routing import certify, make_routing
from harness.simulation import simulate
from harness.topology import Topology

FILE = """
name: drift
defaults: {repeats: 3, warmup: 2, launches: 1, dtype: float32, phase: train_step}
experiments:
  - model: {name: m, num_layers: 2, hidden: 16, ffn: 16, num_experts: 16, top_k: 2, seq: 16, vocab: 256}
    cluster: {name: c, kind: physical, device: H100, device_flops_per_s: 1e15,
      levels: [{name: node, size: 2, bandwidth_bytes_per_s: 1e9}, {name: gpu, size: 2, bandwidth_bytes_per_s: 1e10}]}
    system: {name: smartmoe, options: {place_every: 2}}
    workload: WORKLOAD
"""
WALK = "{name: walk, tokens_per_rank: 64, generator: walk, params: {target: 3}}"
ZIPF = "{name: zipf, tokens_per_rank: 64, generator: zipf, params: {target: 3}}"
NODES, WARM = Topology((2, 2)), 2


def race(workload: str = WALK) -> suite.Race:
    (found,) = suite.parse(FILE.replace("WORKLOAD", workload), "drift", physical=True).races
    return found


def simulated(workload: str = WALK):
    (experiment,) = race(workload).experiments
    found = simulate(experiment, Machine.data_sheet(experiment.cluster), steps=3, warm=WARM)
    return found, tidy.rows_of_simulation(experiment, "run", found)


def executed(moved: list[list[dict[str, int]]]):
    """``moved``: of each step and rank."""
    (experiment,) = race().experiments
    answers = []
    for rank in range(4):
        samples = [
            {
                "rep": rep, "direction": "total", "start_s": 1.0, "end_s": 2.0, "device_s": None, "own_cpu_s": 0.1,
                "parts_s": None, "window_s": 2.0, "window_cpu_s": 0.1, "window_busy_s": 1.0, "num_bytes": None,
                "loss": 1.0, "step": WARM + rep, "moved_bytes": moved[rep][rank],
            }
            for rep in range(3)
        ]  # fmt: skip
        outcome = {"status": "ok", "reason": "", "errors": {}, "samples": samples}
        answers.append({"host": "a", "num_cores": 2, "shared_clock": True, "cells": {experiment.digest: outcome}})
    return tidy.rows_of_race(race(), tidy.Setting("run", 0, "measured", {"network": "physical"}), answers, {})


def told(rows) -> dict[tuple[str, str, int], tuple[float, str]]:
    mine = rows[rows["metric"].isin(["step", "step_max_over_mean", "drift", "moved_bytes"])]
    keys = zip(mine["metric"], mine["level"], mine["rep"], strict=True)
    return dict(zip(keys, zip(mine["value"], mine["reason"], strict=True), strict=True))


def test_each_step_has_the_certificate_of_its_own_routing():
    _, rows = simulated()
    found, model = told(rows), race().first.model
    for rep in range(3):
        routings = [make_routing(race().first.workload, model, NODES, step=WARM + rep, layer=i) for i in range(2)]
        placement = Placement.contiguous(16, 4)
        for level in ("expert", "rank", "node", "link"):
            wanted = np.mean([certify(each, placement, NODES).max_over_mean[level] for each in routings])
            assert found["step_max_over_mean", level, rep][0] == pytest.approx(wanted)
        assert found["step", "", rep][0] == WARM + rep
    assert len({found["step", "", rep][1] for rep in range(3)}) == 3
    assert all(0 < found["drift", "", rep][0] < 1 for rep in range(3))


def test_a_run_and_a_simulation_say_the_same_of_a_step():
    simulation, rows = simulated()
    assert simulation.first == WARM
    assert [bool(each) for each in simulation.moved] == [False, True, False]  # behind step 3
    whole = int(simulation.moved[1][MOVES])
    parts = [[{}] * 4, [{MOVES: whole // 4}, {}, {MOVES: whole // 4}, {MOVES: whole - whole // 4 * 2}], [{}] * 4]
    assert told(executed(parts)) == told(rows)
    assert told(rows)["moved_bytes", MOVES, 1][0] == whole


def test_what_stands_still_has_no_rows_of_steps():
    simulation, rows = simulated(ZIPF)
    assert any(simulation.moved)
    assert not told(rows)


@pytest.mark.parametrize(
    ("phase", "generator", "params", "drifts"),
    [
        ("train_step", "walk", {}, True),
        ("train_step", "burst", {}, True),
        ("train_step", "uniform", {}, False),
        ("train_step", "natural", {}, False),
        ("train_step", "trace", {"path": "t", "replay": True}, True),
        ("train_step", "trace", {"path": "t"}, False),
        ("prefill", "trace", {"path": "t", "replay": True}, True),
        ("prefill", "walk", {}, False),  # a batch that is served again and again
        ("layer", "walk", {}, False),
    ],
)
def test_what_drifts(phase, generator, params, drifts):
    given = race().first
    workload = given.workload.model_copy(update={"generator": generator, "params": params})
    assert stepwise.drifts(given.model_copy(update={"phase": phase, "workload": workload})) == drifts


def test_large_steps_are_certified_by_their_loads_alone():
    given = race().first
    large = given.model_copy(update={"workload": given.workload.model_copy(update={"tokens_per_rank": 1 << 17})})
    found = stepwise.certify_step(large, 3, ran=False)
    assert found.digest == ""
    assert found.max_over_mean["expert"] == pytest.approx(3, rel=1e-3)
    assert collections.Counter(found.max_over_mean).keys() == {"expert", "rank", "node", "link"}
