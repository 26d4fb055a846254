"""The Cases of every phase, and that they are made without the bench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import memory
from harness.case import case_of, cases_of, placements, profile_of
from harness.placement import Placement
from harness.routing import planned_routing
from harness.specs import Experiment, with_levels
from harness.topology import Topology

LEVELS = [{"name": "node", "size": 2}, {"name": "rank", "size": 2}]
MODEL = {"name": "m", "num_layers": 3, "hidden": 16, "ffn": 8, "num_experts": 8, "top_k": 2, "seq": 16}


def experiment(phase: str, **given: Any) -> Experiment:
    workload = {"name": "w", "tokens_per_rank": 32, "generator": "zipf", "seed": 5}
    cluster = with_levels("c", LEVELS, kind="local", **given.pop("cluster", {}))
    fields = {"system": "flat", "phase": phase, "backward": phase not in ("prefill", "decode")}
    return Experiment.parse({"model": MODEL, "cluster": cluster, "workload": workload, **fields, **given}, "test")


@pytest.mark.parametrize(
    ("phase", "num_cases"), [("exchange", 1), ("layer", 1), ("train_step", 3), ("prefill", 3), ("decode", 3)]
)
def test_a_case_for_each_layer_that_runs(phase, num_cases):
    given = experiment(phase, compute="stand-in", options={"x": 1})
    found = cases_of(given)
    assert len(found) == num_cases
    for layer, case in enumerate(found):
        routing = planned_routing(given.workload, given.model, Topology((2, 2)), layer=layer)
        assert case.routing.digest == routing.digest
        assert (case.placement.hosts == Placement.contiguous(8, 4).hosts).all()
        assert case.identity_experts == (phase == "exchange")
        assert (case.stand_in, case.cluster, case.options) == (True, given.cluster, {"x": 1})
    assert [case.routing.digest for case in cases_of(given, layers=[num_cases - 1])] == [found[-1].routing.digest]


def test_only_training_draws_another_routing_at_every_step():
    for phase in ("exchange", "layer", "train_step", "prefill", "decode"):
        same = cases_of(experiment(phase))[0].routing.digest == cases_of(experiment(phase), step=3)[0].routing.digest
        assert same == (phase != "train_step")


def test_whole_models_know_their_room():
    cluster = {"device_memory_bytes": 10**9}
    assert case_of(experiment("layer", cluster=cluster)).room_bytes is None
    assert case_of(experiment("train_step")).room_bytes is None
    given = experiment("train_step", cluster=cluster)
    case = case_of(given, layer=1)
    assert case.room_bytes == memory.room_bytes(given, case)
    assert 0 < case.room_bytes < 10**9


def test_served_experts_lie_where_the_system_places_them(tmp_path: Path):
    """And are planned by tokens of another step than those served."""
    slots = [[[7, 1], [2, 3], [4, 5], [6, 0]]] * 3
    made = {"model": "m", "num_experts": 8, "num_ranks": 4, "cluster": "c", "method": "x", "slots": slots}
    (tmp_path / "p.json").write_text(json.dumps(made))
    given = experiment("prefill", system="moetuner", options={"placement": str(tmp_path / "p.json")})
    for case in cases_of(given):
        assert case.placement.owner.tolist() == [3, 0, 1, 1, 2, 2, 3, 0]
    assert placements(given.model_copy(update={"system": "flat"}))[0].owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    profile = profile_of(given)
    assert profile is not None
    assert len({routing.digest for routing in (*profile, *(case.routing for case in cases_of(given)))}) == 6
    natural = given.workload.model_copy(update={"generator": "natural"})
    assert profile_of(given.model_copy(update={"workload": natural})) is None
    assert np.ptp([len(routing.ids) for routing in profile]) == 0


def test_neither_cases_nor_systems_need_the_bench():
    script = (
        "import sys, harness.case, harness.registry; harness.registry.systems(); "
        "sys.exit(', '.join(name for name in sys.modules if name.startswith('harness.bench')) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
