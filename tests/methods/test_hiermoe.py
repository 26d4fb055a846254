"""The native systems: equal to the oracle on any hierarchy, and the bytes they send are the bytes they planned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness import registry
from harness.dtypes import EXACT
from harness.specs import Cluster, with_levels
from harness.topology import Topology
from harness.traffic import direction_bytes
from tests.baselines.recorded import make_case

TOPOLOGIES = {"1": (1, 1), "2": (2, 1), "4": (2, 2), "8": (2, 4), "2x2x2": (2, 2, 2)}
NAMES = ("rack", "node", "rank")


def cluster(shape: tuple[int, ...]) -> Cluster:
    levels = [{"name": name, "size": size} for name, size in zip(NAMES[-len(shape) :], shape, strict=True)]
    return with_levels("native-" + "x".join(map(str, shape)), levels, kind="local")


LONG = pytest.mark.long  # what is like another one, at a higher price


@pytest.mark.parametrize("shape", [pytest.param(TOPOLOGIES[n], id=n, marks=[LONG] * (n != "4")) for n in TOPOLOGIES])
def test_native_systems_equal_the_oracle(session, shape: tuple[int, ...]) -> None:
    payload: dict[str, Any] = {"systems": ["flat", "hiermoe-hd2"]}
    if len(shape) == 3:  # flat knows no levels: (2, 4) is the same to it
        payload["systems"] = ["hiermoe-hd2"]
    elif shape == (2, 4):  # what another format changes has been seen on fewer ranks
        payload["dtypes"] = ["float64"]
    rows = session(cluster(shape)).call("harness.bench.conformance:check", payload, timeout_s=200)[0]
    wrong = [row for row in rows if row["status"] != "ok"]
    assert not wrong
    for row in rows:
        allowed = EXACT[row["dtype"]]
        assert row["tolerance"] == allowed
        assert max(row["errors"].values()) <= allowed
    assert {row["trial"] for row in rows} >= {"ragged", "experts-without-tokens", "k1", "kE", "drops", "exchange"}


@pytest.mark.parametrize("system", ["flat", "hiermoe-hd2"])
@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize(("dtype", "gate"), [("bfloat16", "gshard"), ("float64", "gshard"), ("bfloat16", "softmoe")])
def test_bytes_sent_are_the_bytes_planned(session, system: str, shape: tuple[int, ...], dtype: str, gate: str) -> None:
    given: dict[str, Any] = {"dtype": dtype, "tokens": (9, 4, 13, 0), "model": {"top_k": 4, "gate": gate}}
    given["generator"] = "natural" if gate == "softmoe" else "uniform"
    results = session(cluster(shape)).call("tests.baselines.recorded:step", {"system": system, "case": given})
    planned = registry.system(system).planned_bytes(make_case(Topology(shape), **given))
    assert planned is not None
    for direction in ("forward", "backward"):
        sent = np.stack([result["sent"][(direction, "all_to_all")] for result in results])
        np.testing.assert_array_equal(sent, direction_bytes(planned, direction))
    assert {call[1] for result in results for call in result["sent"]} == {"all_to_all"}


WAYS = [
    {"dimension": dimension, "deduplicate": deduplicate, "padded": padded, "chunks": 3}
    for dimension in (1, 2, 3)
    for deduplicate, padded in ((True, False), (True, True), (False, False), (False, True))
]


@pytest.mark.parametrize("shape", [*(pytest.param(each, marks=LONG) for each in [(2, 4), (4, 2)]), (2, 2, 2)], ids=str)
def test_every_dimension_equals_the_oracle_with_and_without_deduplication(session, shape: tuple[int, ...]) -> None:
    ways = [way for way in WAYS if int(way["dimension"]) == len(shape) or len(shape) == 3]  # fewer are alike on all
    payload = {"system": "hiermoe-hd", "ways": ways, "trials": ["uniform", "ragged", "k1", "kE", "drops"]}
    assert session(cluster(shape)).call("tests.methods.hiermoe_on_ranks:every_way", payload, timeout_s=200)[0] == []


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_bytes_of_every_dimension_are_the_bytes_planned(session, way: dict[str, Any]) -> None:
    shape = (2, 2, 2)
    given: dict[str, Any] = {"dtype": "bfloat16", "tokens": (9, 4, 13, 0), "model": {"top_k": 4}, "options": way}
    results = session(cluster(shape)).call("tests.baselines.recorded:step", {"system": "hiermoe-hd", "case": given})
    planned = registry.system("hiermoe-hd").planned_bytes(make_case(Topology(shape), **given))
    for direction in ("forward", "backward"):
        sent = np.stack([result["sent"][(direction, "all_to_all")] for result in results])
        np.testing.assert_array_equal(sent, direction_bytes(planned, direction))


def test_the_dimension_is_chosen_alike_on_all_ranks_and_planned_so(session) -> None:
    """Costs under which one stage less is better than deduplication, and the other way round."""
    shape, chosen = (2, 2, 2), {}
    for alpha_s in (1e-9, 1.0):
        dear = {"alpha_s": alpha_s, "beta_s_per_byte": 1e-8}
        cheap = {"alpha_s": 0.0, "beta_s_per_byte": 1e-12}
        costs = {"a2a.flat": {"alpha_s": 0.0, "beta_s_per_byte": 1e-8}, "a2a.inter1": dear, "a2a.inter2": cheap}
        costs |= {"a2a.intra1": cheap, "a2a.intra2": cheap}
        known = Cluster.model_validate({**cluster(shape).model_dump(), "collectives": costs})
        given: dict[str, Any] = {"tokens": (9, 4, 13, 0), "model": {"top_k": 4}, "cluster": known}
        payload = {"system": "hiermoe-hd", "case": given}
        results = session(cluster(shape)).call("tests.baselines.recorded:step", payload)
        planned = registry.system("hiermoe-hd").planned_bytes(make_case(Topology(shape), **given))
        for direction in ("forward", "backward"):
            sent = np.stack([result["sent"][(direction, "all_to_all")] for result in results])
            np.testing.assert_array_equal(sent, direction_bytes(planned, direction))
        chosen[alpha_s] = planned["dispatch"].sum()
    assert chosen[1e-9] != chosen[1.0]


def test_a_dimension_that_the_cluster_has_not_is_refused() -> None:
    case = make_case(Topology((2, 2)), options={"dimension": 3})
    assert "2 x 2 ranks have 2" in str(registry.system("hiermoe").refuse(case))
    case = make_case(Topology((2, 2)), options={"swap_pairs": 5})
    assert "5 pairs" in str(registry.system("hiermoe").refuse(case))
