"""HierMoE's exchange as it is priced: the bytes that are planned, stage by stage, and what its own planner says of
them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from harness import ledger, presets
from harness.plan.cost import InTurn, OnLinks
from harness.plan.graph import Plan
from harness.plan.machine import Machine
from harness.plan.passage import plan_alone
from harness.plan.profiled import Profiled
from harness.plan.simulate import simulate
from harness.registry import system
from harness.routing.types import Routing
from harness.specs import Cluster
from harness.topology import Topology
from harness.traffic import PARTS
from methods.hiermoe import HierD
from methods.hiermoe.counts import count, longest, stages
from methods.hiermoe.planner import PlannerModel
from tests.baselines.recorded import make_case

GIVEN = {"dtype": "bfloat16", "tokens": (9, 4, 13, 0), "model": {"top_k": 4}}


def transfers(cost):
    """All that a cost sends."""
    if isinstance(cost, InTurn):
        return [each for part in cost.parts for each in transfers(part)]
    return [cost] if isinstance(cost, OnLinks) else []


@pytest.mark.parametrize("gate", ["gshard", "softmoe"])
@pytest.mark.parametrize("options", [{}, {"deduplicate": False}, {"padded": True, "chunks": 3}], ids=str)
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_what_tasks_cost_is_what_is_planned(dimension, options, gate):
    given = {**GIVEN, "model": {"top_k": 4, "gate": gate}, "options": {"dimension": dimension, **options}}
    given["generator"] = "natural" if gate == "softmoe" else "uniform"
    case = make_case(Topology((2, 2, 2)), **given)
    planned, passage = HierD.planned_bytes(case), HierD.layout(case)
    sent = {
        direction: sum(
            transfer.matrix for task in plan_alone(passage, direction).tasks for transfer in transfers(task.cost)
        )
        for direction in ("forward", "backward")
    }
    found = {direction: sum(planned[part] for part in PARTS[direction] if part in planned) for direction in sent}
    for direction, matrix in sent.items():
        np.testing.assert_allclose(matrix, found[direction])


def test_the_choice_of_a_dimension_is_paid_and_is_the_executed_rule():
    costs = {"alpha_s": 1e-5, "beta_s_per_byte": 1e-9}
    keys = [f"a2a.{name}" for name in ("flat", "inter1", "inter2", "intra1", "intra2")]
    plain = presets.cluster("emulated-2x2x2")
    known = Cluster.model_validate({**plain.model_dump(), "name": "known", "collectives": dict.fromkeys(keys, costs)})
    case = make_case(Topology((2, 2, 2)), **GIVEN, cluster=known)
    passage = HierD.layout(case)
    wire = HierD.exchange.wire(case)
    counts = count(case.routing, case.placement.owner, case.topology)
    assert passage.fares.travel.chosen
    assert passage.fares.travel.dimension == PlannerModel(known).best(
        counts, wire.row_bytes, padded=False, chunks=wire.num_chunks
    )
    told, _ = transfers(plan_alone(passage, "forward").tasks[1].cost)
    assert told.scope == "flat"
    assert (told.matrix == 4 * (2 + 4 + 8)).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunks", [1, 5])
def test_the_judge_says_of_rows_what_the_planner_says(padded, chunks):
    """By the same costs, of sizes that are the same: of padded ones in one piece, of exact ones in any."""
    cluster = presets.cluster("hiermoe")
    for dimension, deduplicate in itertools.product((1, 2, 3, 4), (True, False)):
        options = {"dimension": dimension, "deduplicate": deduplicate, "padded": padded, "chunks": chunks}
        case = make_case(
            Topology(cluster.shape),
            dtype="bfloat16",
            tokens=40,
            model={"num_experts": 64, "top_k": 6},
            options=options,
            cluster=cluster,
        )
        counts = count(case.routing, case.placement.owner, case.topology)
        row_bytes = 2 * case.model.hidden
        wanted = PlannerModel(cluster).times(
            counts, row_bytes, deduplicated=deduplicate, exact=not padded, chunks=chunks
        )
        plan = Plan()
        for task in plan_alone(HierD.layout(case), "forward").tasks:
            if task.kind == "dispatch":
                after = [name for name in task.after if "dispatch" in name]
                plan.add(task.name, task.lane, after, task.cost, kind="dispatch")
        found = float(simulate(plan, Machine.published(cluster), case.topology).total_s.max())
        if padded and chunks > 1:
            assert found >= wanted[dimension - 1]  # every piece has a longest message of its own
        else:
            assert found == pytest.approx(wanted[dimension - 1], rel=1e-12)


def test_padded_pieces_are_counted_piece_by_piece():
    topology, rng = Topology((2, 3)), np.random.default_rng(1)
    tokens = (7, 0, 5, 11, 3, 8)
    ids = rng.random((sum(tokens), 12)).argsort(1)[:, :4].astype(np.int32)
    routing, owner = Routing(ids, tokens, 12), np.arange(12) // 2
    for stage, deduplicated in itertools.product([*stages(1, 2), *stages(2, 2)], (True, False)):
        total = 0
        for chunk in range(4):
            bounds = [(length * chunk // 4, length * (chunk + 1) // 4) for length in tokens]
            kept = np.concatenate([routing.of_rank(rank)[a:b] for rank, (a, b) in enumerate(bounds)])
            part = Routing(kept, tuple(b - a for a, b in bounds), 12)
            total += count(part, owner, topology).rows(stage, deduplicated=deduplicated).max()
        assert longest(routing, owner, topology, stage, 4, deduplicated=deduplicated) == total


def test_stages_of_three_levels_are_priced_by_the_profile_of_their_levels():
    cluster = presets.cluster("emulated-2x2x2")
    calibration = ledger.latest(cluster, Path(__file__).parents[2] / ledger.LEDGER)
    links = Profiled(calibration)
    case = make_case(Topology((2, 2, 2)), **GIVEN, options={"dimension": 3}, cluster=cluster)
    fares = HierD.layout(case).fares
    outer, middle, inner = (fares.cost("dispatch", hop, 1) for hop in range(3))
    for piece, key in ((outer, "a2a.rack"), (middle, "a2a.node"), (inner, "a2a.rank")):
        alpha_s = calibration.fit(key).alpha_s
        lasts = links.ports.of(piece.matrix)
        assert float(links.seconds(piece)[0]) == pytest.approx(alpha_s + lasts)
    assert {piece.scope for piece in (outer, middle, inner)} == {"inter1", "inter2", "intra2"}


def test_every_hierarchical_system_is_priced_alone_with_its_tasks():
    for name in ("hiermoe", "hiermoe-hd", "hiermoe-hd2", "hiermoe-hd2-smart"):
        case = make_case(Topology((2, 2)), **GIVEN)
        plan = plan_alone(system(name).layout(case), "forward")
        names = ["gate", "metadata", "metadata.intra", "dispatch", "dispatch.intra", "experts"]
        names += ["combine.intra", "combine", "restore"]
        assert [task.name.removeprefix("forward.") for task in plan.tasks] == names
        lanes = [task.lane for task in plan.tasks if task.name.endswith(".intra")]
        assert set(lanes) == {"intra"}
