"""The native systems: equal to the oracle on any hierarchy, and the bytes they send are the bytes they planned."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from harness import registry
from harness.specs import Cluster, with_levels
from harness.topology import Topology
from harness.traffic import direction_bytes
from tests.baselines.recorded import make_case

TOPOLOGIES = {"1": (1, 1), "2": (2, 1), "4": (2, 2), "8": (2, 4), "2x2x2": (2, 2, 2)}
NAMES = ("rack", "node", "rank")


def cluster(shape: tuple[int, ...]) -> Cluster:
    levels = [{"name": name, "size": size} for name, size in zip(NAMES[-len(shape) :], shape, strict=True)]
    return with_levels("native-" + "x".join(map(str, shape)), levels, kind="local")


@pytest.mark.parametrize("shape", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_native_systems_equal_the_oracle(session, shape: tuple[int, ...]) -> None:
    payload = {"systems": ["flat", "hiermoe-hd2"]}
    rows = session(cluster(shape)).call("harness.bench.conformance:check", payload, timeout_s=200)[0]
    wrong = [row for row in rows if row["status"] != "ok"]
    assert not wrong
    for row in rows:
        allowed = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}[row["dtype"]]
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
