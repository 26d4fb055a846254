"""FSMoE's layer, executed: equal to the oracle however it is cut, gradients really in flight, bytes as planned."""

from __future__ import annotations

import numpy as np
import pytest

from harness import registry
from harness.topology import Topology
from harness.traffic import crossing, direction_bytes
from methods.fsmoe.step import POLICIES
from tests.baselines.recorded import make_case
from tests.methods.test_hiermoe import cluster

ON_RANKS = "tests.methods.fsmoe_on_ranks:"
SYSTEMS = [name for name in registry.systems() if name.startswith("fsmoe")]


def test_every_schedule_is_a_system():
    assert {registry.system(name).schedule.policy for name in SYSTEMS} == set(POLICIES.values())


@pytest.mark.parametrize("shape", [(2, 4), (4, 2)], ids=str)
@pytest.mark.long
def test_every_pair_of_degrees_equals_the_oracle(session, shape):
    payload = {"system": "fsmoe", "degrees": [1, 2, 4, 8]}
    assert session(cluster(shape)).call(ON_RANKS + "every_cut", payload, timeout_s=120)[0] == []


@pytest.mark.parametrize("system", ["fsmoe", pytest.param("fsmoe-no-iio", marks=pytest.mark.long)])
def test_every_gate_equals_the_oracle(session, system):
    payload = {"system": system, "degrees": [2, 4], "gates": True}
    assert session(cluster((2, 2))).call(ON_RANKS + "every_cut", payload, timeout_s=120)[0] == []


@pytest.mark.parametrize("algorithm", ["flat", "1dh", "2dh"])
def test_whole_experts_equal_the_oracle_over_every_all_to_all(session, algorithm):
    payload = {"system": "fsmoe", "degrees": [1, 4], "options": {"experts": "whole", "all_to_all": algorithm}}
    assert session(cluster((4, 2))).call(ON_RANKS + "every_cut", payload, timeout_s=120)[0] == []


def test_hooks_are_called_where_they_belong_and_gradients_pass_through_them(session):
    for found in session(cluster((2, 2))).call(ON_RANKS + "hooked", {}):
        assert 0 < found["output"] < 1e-2  # what crossed a link was rounded to bfloat16
        assert 0 < found["gradient"] < 1e-2
        assert found["seen"][0] == "start"
        assert found["seen"].index("end") == 1 + 2 + 2  # two chunks there and back
        assert sorted(found["seen"][6:]) == ["combine", "dispatch"]  # backward has one chunk


def test_gradients_travel_between_dispatches_and_combines(session):
    options = {"degree_forward": 4, "degree_backward": 2, "gradient_bytes": 4096}
    for found in session(cluster((2, 2))).call(ON_RANKS + "gradients_in_flight", {"options": options}):
        assert found == {
            "reduced": True,
            "elements": 1024,
            "after_dispatch": True,
            "before_combine": True,
            "forward_chunks": 4,
        }


@pytest.mark.parametrize("shape", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"experts": "whole"}, {"experts": "whole", "all_to_all": "2dh"}], ids=["sharded", "flat", "2dh"]
)
def test_bytes_between_nodes_are_the_bytes_planned(session, shape, options):
    options = {"degree_forward": 2, "degree_backward": 4} | options
    given = {"dtype": "bfloat16", "tokens": (9, 4, 13, 0), "options": options}
    results = session(cluster(shape)).call("tests.baselines.recorded:step", {"system": "fsmoe", "case": given})
    topology = Topology(shape)
    planned = registry.system("fsmoe").planned_bytes(make_case(topology, **given))
    for direction in ("forward", "backward"):
        sent = np.stack([result["sent"][(direction, "all_to_all")] for result in results])
        wanted = direction_bytes(planned, direction)
        assert crossing(sent, topology)[0] == crossing(wanted, topology)[0] > 0
