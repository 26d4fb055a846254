"""Digests stay what they are: calibrations are found by them, and runs go on."""

from __future__ import annotations

import pytest

from harness import presets
from harness.bench.suite import load
from harness.errors import UserError
from harness.specs import Cluster, Experiment

CLUSTERS = {
    "emulated-2x4": "a2f32f58265ab1f8",
    "emulated-2x4-balanced": "5402a0007d74ee44",
    "hiermoe": "86cf30611d8579ed",
}
MODELS = {"mixtral-8x7b": "2ae727b71b87270b", "record-e64k8": "6dcc91990cc59576", "gpt-moe-s": "ddc35b3093c67fa4"}
EXPERIMENTS = {  # the first of a suite: its digest, and its race
    "linkbound": ("0831f121fdf6d48c", "7b381c47e735ad86"),
    "hecate-emulated": ("ad3f33a1404221c2", "3d02ab7bd4f979e3"),
    "fsmoe-emulated": ("ff0004e002f67add", "0ff6348f44762e8f"),
}


def test_digests_are_those_of_what_is_stored():
    assert {name: presets.cluster(name).digest for name in CLUSTERS} == CLUSTERS
    assert {name: presets.model(name).digest for name in MODELS} == MODELS
    first = {name: load(name).experiments[0] for name in EXPERIMENTS}
    assert {name: (each.digest, each.race) for name, each in first.items()} == EXPERIMENTS


def test_a_field_that_came_later_counts_where_it_is_set_alone():
    given = load("fsmoe-emulated").experiments[0].model_dump()
    assert "ports" not in given["cluster"]["levels"][0]
    given["cluster"] |= {"kind": "physical"}
    same, other = (Experiment.model_validate(with_ports(given, ports)) for ports in (1, 2))
    assert same.digest == Experiment.model_validate(given).digest
    assert other.digest != same.digest
    assert Experiment.model_validate(other.model_dump()) == other
    assert Experiment.model_validate_json(other.model_dump_json()).cluster.levels[0].ports == 2


def test_ports_share_the_rate_of_their_unit():
    cluster = presets.cluster("hecate-b").with_ports(8)
    assert cluster.levels[0].bandwidth_bytes_per_s == 50e9 / 8
    assert cluster.levels[0].unit_bytes_per_s == 50e9
    assert cluster.with_ports(1) == presets.cluster("hecate-b")


def with_ports(given, ports):
    outer, *inner = given["cluster"]["levels"]
    return {**given, "cluster": {**given["cluster"], "levels": [{**outer, "ports": ports}, *inner]}}


@pytest.mark.parametrize(
    ("kind", "ports", "why"),
    [("physical", 3, "3 ports for 4 ranks of a unit"), ("local", 4, "a unit of this machine has one")],
)
def test_ports_that_cannot_be_are_one_line(kind, ports, why):
    levels = [{"name": "node", "size": 2, "bandwidth_bytes_per_s": 1e9, "ports": ports}, {"name": "rank", "size": 4}]
    with pytest.raises(UserError, match=why):
        Cluster.parse({"name": "c", "kind": kind, "levels": levels}, "cluster c")


def test_an_emulated_cluster_has_several_ports_at_its_nodes_alone():
    given = presets.cluster("emulated-2x2x2-rails").model_dump()
    assert Cluster.parse(given, "c").levels[1].ports == 2
    rack, *inner = given["levels"]
    with pytest.raises(UserError, match="level rack has 2 ports, and only nodes, the level above the ranks"):
        Cluster.parse({**given, "levels": [{**rack, "ports": 2}, *inner]}, "c")
    with pytest.raises(UserError, match="level node has 2 ports, and loopback_bytes_per_s is for ranks"):
        Cluster.parse({**given, "loopback_bytes_per_s": 1e9}, "c")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ([{"size": 9}], r"ranks_per_port = \[4, 2, 2\], together 8, and size = 9"),
        (
            [{}, {"name": "core", "size": 1, "ranks_per_port": ()}],
            "such nodes, with one port each, are the one level of a cluster",
        ),
        ([{"latency_s": 1e-3}], "which kind: local and latency_s do not know"),
    ],
)
def test_unequal_nodes_that_cannot_be_are_one_line(changes, why):
    given = presets.cluster("emulated-4-2-2").model_dump()
    assert Cluster.parse(given, "c").num_nodes == 3
    (level,) = given["levels"]
    with pytest.raises(UserError, match=why):
        Cluster.parse({**given, "levels": [level | each for each in changes]}, "c")
