"""Slots of the related work: what they send, and what they refuse. That they compute right is ``moebench check``'s."""

from __future__ import annotations

import numpy as np
import pytest

from harness import registry
from harness.bench import dry
from harness.case import case_of
from harness.comm.assign import expert_pieces
from harness.comm.journey import Cut
from tests.plan.contract import experiment_of

SHAPE = (2, 4)


def case(system: str, **options):
    return case_of(experiment_of(system, "layer", SHAPE, options))


def refusal(system: str, **options) -> str:
    return dry.refusal(experiment_of(system, "layer", SHAPE, options)) or ""


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


def test_what_goes_together_and_what_does_not():
    assert "take state: per-node" in refusal("ppmoe+serial")
    assert "take state: per-node" in refusal("ppmoe+hecate")
    assert not refusal("ppmoe+fsmoe+per-node")
    assert "take the exchange flat" in refusal("eps-moe+hiermoe-hd2")
    assert not refusal("eps-moe+hecate")
