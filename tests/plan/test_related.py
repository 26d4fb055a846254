"""Slots of the related work: what they send, and what they refuse. That they compute right is ``moebench check``'s."""

from __future__ import annotations

import numpy as np
import pytest

from harness import registry
from harness.bench import dry
from harness.case import case_of
from harness.comm.assign import expert_pieces
from harness.comm.journey import Cut
from harness.topology import Topology
from harness.traffic import direction_bytes
from tests.baselines.recorded import make_case
from tests.methods.test_hiermoe import cluster
from tests.plan.contract import experiment_of

SHAPE = (2, 4)


def case(system: str, **options):
    return case_of(experiment_of(system, "layer", SHAPE, options, {}))


def refusal(system: str, **options) -> str:
    return dry.refusal(experiment_of(system, "layer", SHAPE, options, {})) or ""


@pytest.mark.parametrize("copies", [False, True])
def test_pieces_of_experts_send_together_what_the_whole_sends(copies):
    given, system = case("eps-moe", expert_groups=2), registry.system("eps-moe")
    hosts = given.placement.hosts | copies  # every expert with its owner, or everywhere but for one
    hosts[0] = given.placement.hosts[0]
    cut = system.schedule.cut(given, system.exchange)
    fares = system.exchange.fares(given, given.routing, hosts, cut)
    for part in ("dispatch", "combine", "combine_grad", "dispatch_grad"):
        pieces = [fares.of_piece(piece).bytes(part) for piece in range(cut.pieces)]
        assert np.array_equal(sum(pieces), fares.bytes(part))
        assert all(piece.any() for piece in pieces) != copies
    once = system.exchange.fares(given, given.routing, hosts, Cut(whole=False, by="experts"))
    assert np.array_equal(once.bytes("metadata"), fares.bytes("metadata"))  # one table, however many pieces


def test_an_expert_and_its_neighbours_share_a_piece_on_every_rank():
    assert expert_pieces(np.repeat([1, 0], 4), 2).tolist() == [0, 0, 1, 1] * 2


def test_ppmoe_sends_each_token_to_its_node_and_nothing_beyond():
    given, system = case("ppmoe"), registry.system("ppmoe")
    parts = system.planned_bytes(given)
    node = given.topology.unit_of(0)
    inside = (node[:, None] == node) & ~np.eye(len(node), dtype=bool)
    row_bytes = given.model.hidden * 4
    assert np.array_equal(parts["dispatch"], inside * given.routing.tokens[0] * row_bytes)
    for part, matrix in parts.items():
        assert matrix[~inside].any() == (part == "reduce")


def test_parm_merges_what_its_baseline_gathers_first():
    given = case("parm")
    merged, gathered = (registry.system(name).planned_bytes(given) for name in ("parm", "parm-baseline"))
    node = given.topology.unit_of(0)
    across, inside = node[:, None] != node, (node[:, None] == node) & ~np.eye(len(node), dtype=bool)
    for part in ("dispatch", "combine"):
        assert np.ptp(merged[part][across | inside]) == 0  # rows to every rank of a node, and sums of every one of them
        assert merged[part][across].sum() == gathered[part][across].sum() > 0
    slots = registry.system("fsmoe-no-overlap").planned_bytes(given)["dispatch"]
    assert merged["dispatch"][across].sum() == SHAPE[1] * slots[across].sum()
    assert np.array_equal(gathered["combine"][inside], 2 * gathered["dispatch"][inside])  # an all-reduce


@pytest.mark.parametrize("system", ["parm", "parm-baseline"])
def test_parm_sends_what_is_planned(session, system):
    given = {"dtype": "bfloat16", "tokens": (9, 4, 13, 0)}
    results = session(cluster((2, 2))).call("tests.baselines.recorded:step", {"system": system, "case": given})
    planned = registry.system(system).planned_bytes(make_case(Topology((2, 2)), **given))
    for direction in ("forward", "backward"):
        sent = [
            sum(result["sent"].get((direction, kind), np.zeros(4)) for kind in ("all_to_all", "all_gather"))
            for result in results
        ]
        assert np.array_equal(sent, direction_bytes(planned, direction))
        assert np.any(sent)


def test_what_goes_together_and_what_does_not():
    assert "take state: per-node" in refusal("ppmoe+serial")
    assert "take state: per-node" in refusal("ppmoe+hecate")
    assert not refusal("ppmoe+fsmoe+per-node")
    assert "take the exchange flat" in refusal("eps-moe+hiermoe-hd2")
    assert not refusal("eps-moe+hecate")
    assert "brings a row to all ranks of the expert's node" in refusal("parm-s1+hecate")
    assert "take serial" in refusal("parm-baseline+fsmoe+shards")
    assert not refusal("parm-s1+fsmoe+shards")
