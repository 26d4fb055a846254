"""Costs of several parts: exchanges in stages beside HierMoE's own model of them, parts in turn beside tasks of their
own, and what is priced early beside what is priced late."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.plan.cost import Compute, Even, Hold, InTurn, Timed, Transfer, span
from harness.plan.device import Roofline
from harness.plan.graph import COMPUTE, INTER, Plan
from harness.plan.links import AlphaBeta, Line, LinkModel, Ports, SharedPorts
from harness.plan.machine import Machine
from harness.plan.simulate import simulate
from harness.specs import Cluster, with_levels
from harness.topology import Topology
from methods.hiermoe.counts import Counts, stages
from methods.hiermoe.planner import PlannerModel

SHAPES = [(2, 2), (2, 4), (4, 2), (2, 2, 2), (2, 3, 2), (3, 2, 2), (1, 2, 2)]
COSTS = {
    "flat": (3e-3, 2e-6),
    "inter1": (2e-3, 1e-6),
    "inter2": (1e-3, 7e-7),
    "intra1": (5e-4, 5e-7),
    "intra2": (0, 3e-7),
}
OPEN = {"collectives": {f"a2a.{name}": {"alpha_s": a, "beta_s_per_byte": b} for name, (a, b) in COSTS.items()}}


def cluster_of(shape: tuple[int, ...], **fields: object) -> Cluster:
    return with_levels("c", [{"name": f"l{i}", "size": n} for i, n in enumerate(shape)], kind="physical", **fields)


def models(shape: tuple[int, ...]) -> list[LinkModel]:
    topology = Topology(shape)
    lines = tuple(Line(level, 1e3 * 7**level) for level in range(len(shape)))
    return [AlphaBeta(cluster_of(shape, **OPEN)), Ports(topology, lines, 0.5), SharedPorts(topology, lines, 0.5)]


def matrix_of(rng: np.random.Generator, num_ranks: int) -> np.ndarray:
    found = rng.integers(0, 10**4, (num_ranks, num_ranks)).astype(float) * (rng.random((num_ranks, num_ranks)) < 0.7)
    np.fill_diagonal(found, 0)
    return found


def pipeline(parts: tuple[Transfer, ...], chunks: int) -> Plan:
    """Every part a lane of its own, every chunk through all of them."""
    plan = Plan([f"stage{i}" for i in range(len(parts))])
    for chunk in range(chunks):
        last: list[str] = []
        for i, part in enumerate(parts):
            piece = dataclasses.replace(part, matrix=part.matrix / chunks)
            last = [plan.add(f"stage{i}[{chunk}]", f"stage{i}", last, piece)]
    return plan


@given(st.sampled_from(SHAPES), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_stages_cost_what_hiermoe_says_of_them(shape, chunks, seed):
    topology, rng = Topology(shape), np.random.default_rng(seed)
    tables = [
        rng.integers(1, 50, (topology.num_ranks, topology.num_units(level))) for level in range(topology.num_levels)
    ]
    counts = Counts(topology, tuple(tables), tuple(tables))
    cluster = cluster_of(shape, **OPEN)
    wanted = PlannerModel(cluster).times(counts, 3.0, exact=True, chunks=chunks)
    machine = Machine(AlphaBeta(cluster), Roofline(1.0, None, 1.0), "test")
    for dimension, seconds in enumerate(wanted, 1):
        hops = [stage for stage in stages(dimension, topology.num_levels) if PlannerModel(cluster).size(stage) > 1]
        parts = tuple(
            Transfer("a2a", stage.key(topology.num_levels).removeprefix("a2a."), counts.rows(stage) * 3.0)
            for stage in hops
        )
        assert float(simulate(pipeline(parts, chunks), machine, topology).total_s.max()) == pytest.approx(seconds)


@given(st.sampled_from(SHAPES), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_parts_in_turn_are_tasks_in_turn(shape, seed):
    topology, rng = Topology(shape), np.random.default_rng(seed)
    num_ranks, scopes = topology.num_ranks, ["flat", "inter", "intra"]
    parts = [
        Transfer("a2a", str(rng.choice(scopes)), matrix_of(rng, num_ranks)),
        Compute(rng.random(num_ranks)),
        Even("a2a", str(rng.choice(scopes)), 100.0),
        InTurn((Hold(rng.random(num_ranks)), Transfer("a2a", "intra", matrix_of(rng, num_ranks)))),
        Transfer("a2a", "inter1", matrix_of(rng, num_ranks), 2),
        Compute(rng.random(num_ranks)),
    ]
    rng.shuffle(parts)
    for links in models(shape):
        machine = Machine(links, Roofline(1.0, None, 1.0), "test")
        one, several = Plan(), Plan()
        for plan in (one, several):
            plan.add("wait", COMPUTE, cost=Hold(rng.random(num_ranks) * 0 + np.arange(num_ranks)))
        one.add("all", COMPUTE, cost=InTurn(tuple(parts)))
        for i, part in enumerate(parts):
            several.add(f"{i}", COMPUTE, cost=part)
        found, wanted = (simulate(plan, machine, topology) for plan in (one, several))
        np.testing.assert_allclose(found.of("all")[1], wanted.end_s[-1], rtol=1e-6)
        np.testing.assert_allclose(found.of("all")[0], wanted.start_s[1], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 2), (2, 3, 2)])
def test_early_prices_are_late_prices_without_a_matrix(shape):
    topology, rng = Topology(shape), np.random.default_rng(0)
    for links in models(shape):
        machine = Machine(links, Roofline(1.0, None, 1.0), "test")
        plans = [Plan(), Plan(price=machine.priced)]
        one, other = (matrix_of(rng, topology.num_ranks) for _ in range(2))
        for plan in plans:
            plan.add("there", INTER, cost=Transfer("a2a", "flat", one, 2))
            plan.add("experts", COMPUTE, ["there"], Compute(np.arange(float(topology.num_ranks))))
            plan.add("back", INTER, ["experts"], Transfer("a2a", "intra1", other))
            plan.add("layer", INTER, (), InTurn((Transfer("a2a", "flat", other), Hold(1.0), Even("a2a", "flat", 9.0))))
        late, early = (simulate(plan, machine, topology) for plan in plans)
        np.testing.assert_allclose(early.end_s, late.end_s, rtol=1e-6)
        assert late.end_s.shape == (4, topology.num_ranks)
        kinds = {type(task.cost) for task in plans[1].tasks}
        assert kinds == ({Timed, Hold, InTurn} if links.meets else {Transfer, Hold, InTurn})


def test_a_task_of_several_parts_lasts_longer_by_its_last():
    """Beside a busy lane, and after a rank that comes late: 1 s more in the last part, in which all meet."""
    topology = Topology((2, 2))
    plan = Plan()
    plan.add("layer", COMPUTE, (), InTurn((Hold(np.arange(4.0)), Timed("a2a", "flat", 1.0), Hold(1.0))))
    plan.add("beside", INTER, (), Hold(1.0))
    machine = Machine(AlphaBeta(cluster_of((2, 2))), Roofline(1.0, None, 1.0), "test", {"compute": {"inter": 1.0}})
    np.testing.assert_allclose(simulate(plan, machine, topology).of("layer")[1], 5.5)


def test_scopes_are_groups_of_link_levels():
    plan, topology = Plan(), Topology((2, 2, 2))
    plan.add("wait", COMPUTE, cost=Hold(np.arange(8.0)))
    plan.add("middle", INTER, ["wait"], Timed("a2a", "inter2", np.array([1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])))
    found = simulate(plan, Machine(AlphaBeta(cluster_of((2, 2, 2))), Roofline(1.0, None, 1.0), ""), topology)
    np.testing.assert_allclose(found.of("middle")[0], [2, 3, 2, 3, 6, 7, 6, 7])
    np.testing.assert_allclose(found.of("middle")[1], [5, 5, 5, 5, 7, 8, 7, 8])  # with the slowest of its group
    assert span("intra1", 3) == span("intra", 3)
    for wrong in ("inter4", "outer", "inter0", "flat2"):
        with pytest.raises(UserError, match="is no group of ranks on 3 link levels"):
            span(wrong, 3)


def test_more_ranks_than_a_matrix_of_bytes_fits_are_refused_at_once():
    cluster = cluster_of((125_000, 8), device_flops_per_s=1e15, **OPEN)
    for make in (Machine.published, Machine.data_sheet):
        with pytest.raises(
            UserError, match=r"cluster.levels: '125000x8': the bytes from .* take 7451 GiB; give at most"
        ):
            make(cluster)
    assert Machine.published(cluster_of((1024, 8), **OPEN)).links.shape == (1024, 8)


def test_costs_go_by_stage_by_level_and_by_role():
    for name in ("inter1", "l0", "inter"):
        costs = {f"a2a.{name}": {"alpha_s": 1.0, "beta_s_per_byte": 0.5}}
        links = AlphaBeta(cluster_of((2, 2, 2), collectives=costs))
        assert [float(links.seconds(Even("a2a", scope, 4.0))) for scope in ("inter", "inter1")] == [3.0, 3.0]
        with pytest.raises(UserError, match=r"'a2a.inter2': has no cost"):
            links.seconds(Even("a2a", "inter2", 1.0))


@pytest.mark.parametrize("shape", [(2, 4), (2, 2, 2), (2, 3, 2)])
@pytest.mark.parametrize("scope", ["inter1", "inter2", "intra1", "intra2"])
def test_an_even_all_to_all_of_a_stage_is_a_transfer_of_equal_parts(shape, scope):
    if int(scope[-1]) > len(shape):
        return
    topology, (first, behind) = Topology(shape), span(scope, len(shape))
    inside = np.delete(topology.coordinates, range(first, behind), axis=1)
    alike = (inside[:, None] == inside[None]).all(-1)  # bool [W, W]: in one group
    matrix = np.where(alike, 24.0 / alike.sum(1), 0.0)
    np.fill_diagonal(matrix, 0)
    links = Ports(topology, tuple(Line(level, 2.0 * (level + 1)) for level in range(len(shape))))
    assert links.seconds(Even("a2a", scope, 24.0)) == pytest.approx(links.of(matrix))


def test_rings_of_a_stage_go_through_the_ports_of_their_units():
    links = Ports(Topology((2, 2, 2)), (Line(0, 1.0), Line(1, 10.0)))
    assert links.seconds(Even("ag", "inter1", 24.0)) == 48.0  # four rings through the port of a node
    assert links.seconds(Even("ag", "inter2", 24.0)) == pytest.approx(2 * 12 / 10)  # two through that of its half
    assert Ports(links.topology, links.lines[1:]).seconds(Even("ag", "inter1", 24.0)) == pytest.approx(2 * 12 / 10)
    assert links.seconds(Even("ag", "intra2", 24.0)) == 0.0


def test_a_plan_of_exchanges_alone_is_simulated_on_every_rank():
    plan, topology = Plan(), Topology((2, 2))
    plan.add("dispatch", INTER, cost=Transfer("a2a", "flat", np.ones((4, 4))))
    assert simulate(plan, Machine(models((2, 2))[1], Roofline(1.0, None, 1.0), ""), topology).end_s.shape == (1, 4)
