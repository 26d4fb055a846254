from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from baselines.flat import Flat
from harness.bench import physics
from harness.case import cases_of
from harness.specs import Cluster, Experiment, Model, Workload, with_levels

RATE = 50e6
MODEL = Model(name="m", num_layers=1, hidden=64, ffn=32, num_experts=8, top_k=2)
NETWORK: dict[str, Any] = {"network": "shaped", "levels": [{"burst_bytes": 1000}, {"burst_bytes": None}]}


def experiment(phase: str = "exchange", **fields: Any) -> Experiment:
    levels = [{"name": "node", "size": 2, "bandwidth_bytes_per_s": RATE}, {"name": "rank", "size": 2}]
    cluster = with_levels("c", levels, kind="emulated", **fields)
    workload = Workload(name="w", tokens_per_rank=4096, generator="balanced")
    return Experiment.parse(
        {
            "model": MODEL,
            "cluster": cluster,
            "workload": workload,
            "system": "flat",
            "phase": phase,
            "dtype": "float32",
        },
        "test",
    )


def budget(direction: str = "forward", **kwargs: Any) -> tuple[Cluster, physics.Budget]:
    e = experiment(**kwargs)
    return e.cluster, physics.budgets(e, Flat, cases_of(e))[direction]


def test_speed_of_light_is_the_busiest_port_over_its_rate() -> None:
    """Balanced: half of 2 ranks x 4096 tokens x 2 copies of 256 bytes leave each node, out and back, and the counts."""
    _, found = budget()
    metadata = 2 * 2 * 2 * 8  # each of 2 ranks tells 2 ranks of the other node the rows of their 2 experts each
    one_way = 2 * 4096 * 2 * 256 / 2
    assert found.speed_of_light_s == pytest.approx((2 * one_way + metadata) / RATE)
    _, total = budget("total")
    assert total.speed_of_light_s == pytest.approx((4 * one_way + metadata) / RATE)
    assert total.flops == 0


def test_flops_of_the_busiest_rank() -> None:
    _, found = budget("backward", phase="layer", device_flops_per_s=1e9)
    forward = 4096 * 2 * (2 * 64 * 32 * 2)
    assert found.flops == 2 * forward
    assert found.speed_of_light_s == pytest.approx(max(2 * forward / 1e9, 2 * 4096 * 2 * 256 / RATE))


def test_a_possible_repetition_passes() -> None:
    cluster, found = budget()
    assert found.bytes_by_level is not None
    assert found.speed_of_light_s is not None
    counted = [int(value * 1.01) for value in found.bytes_by_level]
    assert physics.violations(cluster, NETWORK, found, found.speed_of_light_s * 1.02, counted, exact=True) == []


@pytest.mark.parametrize(
    ("faster", "share", "text"),
    [
        (0.9, None, "planned bytes through one node port"),
        (0.9, 1.01, "bytes counted over all node ports"),
        (1.1, 0.97, "are planned"),
        (math.nan, None, "not a positive number"),
        (0.0, None, "not a positive number"),
    ],
)
def test_an_impossible_repetition_is_named(faster: float, share: float | None, text: str) -> None:
    cluster, found = budget()
    assert found.bytes_by_level is not None
    assert found.speed_of_light_s is not None
    counted = None if share is None else [int(value * share) for value in found.bytes_by_level]
    wrong = physics.violations(cluster, NETWORK, found, found.speed_of_light_s * faster, counted, exact=True)
    assert any(text in each for each in wrong)


def test_links_bind_only_where_they_are_shaped_and_devices_always() -> None:
    cluster, found = budget(phase="layer", device_flops_per_s=1e9)
    network = {"network": "unshaped"}
    assert physics.violations(cluster, network, found, found.flops / 0.5e9, None, exact=True) == []
    (wrong,) = physics.violations(cluster, network, found, found.flops / 2e9, None, exact=True)
    assert "FLOP/s" in wrong


def test_the_buckets_are_allowed_for() -> None:
    cluster, found = budget()
    assert found.speed_of_light_s is not None
    network = {"network": "shaped", "levels": [{"burst_bytes": 10**6}, {}]}
    time_s = found.speed_of_light_s - 1.9e6 / RATE
    assert physics.violations(cluster, network, found, time_s, None, exact=True) == []
    assert np.isfinite(time_s)
