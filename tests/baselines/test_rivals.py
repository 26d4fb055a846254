"""Hecate's rivals as training systems: the oracle's gradients, and its losses through changes of placement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness import registry
from harness.errors import UserError
from harness.placement import Placement
from harness.topology import Topology
from harness.traffic import direction_bytes
from tests.baselines.recorded import make_case
from tests.methods.test_fsmoe_training import training
from tests.methods.test_hiermoe import cluster

WAYS: dict[str, list[dict[str, Any]]] = {
    "fastermoe": [{}, {"shadows": 0}, {"shadows": 3}, {"shadows": 16, "groups": 2}, {"shadows": 3, "groups": 1}],
    "fsdp-experts": [{}],
    "flexmoe": [{}, {"slots": 3}],
    "eplb": [{}, {"slots": 3}],
}
OPTIONS = {
    "fastermoe": {"shadows": 2},
    "fsdp-experts": {},
    "flexmoe": {"rearrange_every": 3},
    "eplb": {"rearrange_every": 3},
    "smartmoe": {"place_every": 3},
}


@pytest.mark.parametrize("system", [pytest.param(n, marks=[pytest.mark.long] * (n == "fastermoe")) for n in WAYS])
@pytest.mark.parametrize("shape", [pytest.param((2, 4), marks=pytest.mark.long), (2, 2, 2)], ids=str)
def test_every_way_equals_the_oracle(session, system, shape):
    trials = ["uniform", "swiglu", "experts-without-tokens", "kE", "drops", "softmoe", "exchange"]
    payload = {"system": system, "ways": WAYS[system], "trials": trials}
    assert session(cluster(shape)).call("tests.methods.hiermoe_on_ranks:every_way", payload, timeout_s=200)[0] == []


@pytest.fixture(scope="module")
def plain(session):
    return train(session, "flat", {})[0]["losses"]


def trained_by(system: str, options: dict[str, Any]) -> dict[str, Any]:
    workload = {"name": "w", "tokens_per_rank": 16, "generator": "rotating", "params": {"hot_experts": 2, "period": 3}}
    return training(system, cluster((2, 2)), options=options, workload=workload)


def train(session, system: str, options: dict[str, Any], num_steps: int = 10) -> list[dict[str, Any]]:
    payload = trained_by(system, options) | {"num_steps": num_steps}
    return session(cluster((2, 2))).call("tests.baselines.rivals_on_ranks:trained", payload, timeout_s=120)


@pytest.mark.parametrize("system", OPTIONS)
def test_training_has_the_losses_of_flat_whatever_moves(session, plain, system):
    found = train(session, system, OPTIONS[system])
    assert all(each["losses"] == found[0]["losses"] for each in found)
    assert found[0]["losses"] == pytest.approx(plain, rel=1e-9)
    hosts = np.array(found[0]["hosts"])  # [layers, E, W]
    assert all((np.array(each["hosts"]) == hosts).all() for each in found)
    own = 3 * 8 * 2  # of 3 layers: 8 experts with 2 matrices
    moments = sum(each["moments"] for each in found)
    if system in ("flexmoe", "eplb"):
        assert found[0]["placed"] > 0
        assert found[0]["before"] != found[0]["hosts"]
        assert moments == hosts.sum() * 2 > own  # every copy has optimizer state
        assert {"reduce", "spread", "after-step"} <= set(found[0]["kinds"])
        values: dict[str, float] = {}
        for each in found:  # and copies are equal, bit by bit
            for name, value in each["experts"].items():
                assert values.setdefault(name, value) == value
    else:
        assert moments == own  # exactly one copy of optimizer state in the whole job
    if system == "fastermoe":
        assert found[0]["used"] == [8 + 2 * 3] * 3
        assert {"late", "reduce"} <= {kind.split(".")[0] for kind in found[0]["kinds"]} or "inter" in found[0]["kinds"]
    if system == "fsdp-experts":
        assert found[0]["used"] == [8 * 4] * 3


def test_training_with_copies_goes_on_from_its_checkpoint(session, plain, tmp_path):
    payload = trained_by("flexmoe", {"rearrange_every": 3}) | {"folder": str(tmp_path), "every": 2, "dies_at": 0}
    ranks, where = session(cluster((2, 2))), "tests.bench.checkpoint_on_ranks:trained"
    assert ranks.call(where, payload | {"num_steps": 7})[0]["began"] == 0
    after = ranks.call(where, payload | {"num_steps": 10})[0]
    assert after["began"] == 6
    assert list(after["losses"].values()) == pytest.approx(plain[6:], rel=1e-9)


@pytest.mark.parametrize("system", ["fastermoe", "fsdp-experts", "flexmoe", "eplb"])
def test_bytes_sent_are_the_bytes_planned(session, system):
    """Tokens, gathers and reductions, forward and backward."""
    shape, options = (2, 4), {"shadows": 2} if system == "fastermoe" else {"slots": 3} if system == "eplb" else {}
    given: dict[str, Any] = {
        "tokens": (9, 4, 13, 0),
        "generator": "zipf",
        "params": {"target": 3.0},
        "options": options,
    }
    results = session(cluster(shape)).call("tests.baselines.recorded:step", {"system": system, "case": given})
    planned = registry.system(system).planned_bytes(make_case(Topology(shape), **given))
    for direction in ("forward", "backward"):
        sent = np.stack([result["sent"][(direction, "all_to_all")] for result in results])
        np.testing.assert_array_equal(sent, direction_bytes(planned, direction))
    assert planned["reduce"].any()


def test_refusals_name_what_is_wrong():
    case = make_case(Topology((2, 2)), options={"slots": 1})
    assert "1 slots are fewer than the 2 experts of a rank" in registry.system("flexmoe").refuse(case)
    for options in ({"slots": 0}, {"slots": True}):
        with pytest.raises(UserError, match=r"options\.slots"):
            registry.system("eplb").refuse(make_case(Topology((2, 4)), options=options))
    with pytest.raises(UserError, match=r"options\.shadows"):
        registry.system("fastermoe").policy(make_case(Topology((2, 4)), options={"shadows": -1}), None)


def test_a_placement_of_hosts_keeps_what_stays():
    before = Placement.contiguous(8, 4)
    hosts = before.hosts.copy()
    hosts[0, 3] = hosts[7, 0] = True
    hosts[1, 0], hosts[1, 2] = False, True
    after = Placement.of_hosts(hosts, before)
    assert (after.hosts == hosts).all()
    assert [own.tolist() for own in after.slots] == [[0, 7], [2, 3], [4, 5, 1], [6, 7, 0]]
