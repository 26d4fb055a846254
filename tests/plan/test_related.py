"""Slots of the related work: what they send, and what they refuse. That they compute right is ``moebench check``'s."""

from __future__ import annotations

import numpy as np
import pytest

from harness import registry
from harness.bench import dry
from harness.case import case_of
from harness.comm.assign import expert_pieces
from harness.comm.journey import Cut, Direction
from harness.plan.passage import plan_alone
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


def costs(system: str, direction: Direction, **options):
    """By task of a layer alone."""
    passage = registry.system(system).layout(case(system, **options))
    return {task.name.removeprefix(f"{direction}."): task.cost for task in plan_alone(passage, direction).tasks}


def test_partial_sums_and_sums_of_copies_are_priced():
    given = case("ppmoe")
    row_bytes, tokens = given.model.hidden * 4, given.routing.tokens[0]
    rows = registry.system("ppmoe").planned_rows(given).sum(-1)
    home = costs("ppmoe", "forward")["combine.intra"]
    np.testing.assert_array_equal(home.summed_bytes, (rows + 3 * tokens) * row_bytes)  # to the others of its node
    two = costs("hiermoe-hd2", "forward", chunks=1)
    np.testing.assert_array_equal(
        two["combine"].summed_bytes, two["combine.intra"].matrix.sum(0) + two["combine"].matrix.sum(1)
    )
    merged = costs("parm", "forward")
    assert merged["combine"].summed_bytes == merged["combine"].num_bytes * (1 + 1 / SHAPE[1]) > 0
    assert merged["dispatch"].summed_bytes == 0 == costs("flat", "forward")["combine"].summed_bytes
    reduce = costs("ppmoe", "backward")["reduce.inter"]
    np.testing.assert_array_equal(reduce.summed_bytes, 3 * reduce.matrix.sum(0))
    assert reduce.summed_bytes.any()


def test_sums_of_chunks_are_those_of_the_batch():
    whole = costs("hiermoe-hd2", "forward", chunks=1)["restore"].read_bytes
    parts = costs("hiermoe-hd2", "forward", chunks=4)
    settled = [cost.read_bytes for name, cost in parts.items() if name.startswith("settle")]
    assert len(settled) == 3
    np.testing.assert_allclose(sum(settled) + parts["restore"].read_bytes, whole)
    groups = costs("eps-moe", "forward", expert_groups=2)  # each brings rows of any token
    assert groups["settle[0]"] is None
    np.testing.assert_array_equal(groups["restore"].read_bytes, whole)


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


def test_ranks_tell_fastermoe_one_table_of_counts_however_many_its_groups():
    given = case("fastermoe")
    metadata = registry.system("fastermoe").planned_bytes(given)["metadata"]
    assert registry.system("fastermoe").cut(given).pieces == 5
    assert set(metadata[~np.eye(len(metadata), dtype=bool)]) == {8.0 * given.model.num_experts}


def test_what_goes_together_and_what_does_not():
    assert "take state: per-node" in refusal("ppmoe+serial")
    assert "take state: per-node" in refusal("ppmoe+hecate")
    assert not refusal("ppmoe+fsmoe+per-node")
    assert "take the exchange flat" in refusal("eps-moe+hiermoe-hd2")
    assert not refusal("eps-moe+hecate")
    assert "brings a row to all ranks of the expert's node" in refusal("parm-s1+hecate")
    assert "take serial" in refusal("parm-baseline+fsmoe+shards")
    assert not refusal("parm-s1+fsmoe+shards")
