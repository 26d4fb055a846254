"""Link models: bytes into seconds, beside what the same was computed by before, and beside port by port sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from harness import presets
from harness.plan.cost import Compute, Even, Hold, Transfer
from harness.plan.graph import COMPUTE, INTER, Plan
from harness.plan.links import AlphaBeta, Line, Ports, SharedPorts, balanced_bytes, lines_of
from harness.plan.machine import Machine
from harness.plan.profiled import Profiled
from harness.plan.simulate import simulate
from harness.specs import with_levels
from harness.topology import Topology
from harness.traffic import inside_load, port_load
from tests.test_ledger import calibration

SHAPES = [(1, 4), (2, 2), (2, 4), (4, 1), (2, 2, 2), (2, 3, 2)]
COSTS = {"a2a.flat": {"alpha_s": 1e-3, "beta_s_per_byte": 2e-6}, "a2a.intra": {"alpha_s": 0.0, "beta_s_per_byte": 1e-6}}


@st.composite
def matrices(draw):
    """(topology, bytes [W, W] of which a third are 0, the diagonal too)."""
    topology = Topology(draw(st.sampled_from(SHAPES)))
    sizes = st.one_of(st.just(0), st.integers(0, 10), st.integers(0, 10**7))
    matrix = draw(arrays.arrays(np.float64, (topology.num_ranks,) * 2, elements=sizes, fill=st.just(0.0)))
    np.fill_diagonal(matrix, 0)
    return topology, matrix


def ports_one_by_one(matrix, topology, level, ports=1):
    """Out of and into each port, the larger."""
    unit, found = topology.unit_of(level), []
    for own in np.split(np.arange(topology.num_ranks), topology.num_units(level) * ports):
        others = np.flatnonzero(unit != unit[own[0]])
        found.append(max(matrix[np.ix_(own, others)].sum(), matrix[np.ix_(others, own)].sum()))
    return np.array(found)


@given(matrices(), st.data())
@settings(max_examples=60, deadline=None)
def test_loads_of_ports_are_sums_over_their_ranks(drawn, data):
    topology, matrix = drawn
    for level in range(topology.num_levels):
        size = topology.num_ranks // topology.num_units(level)
        ports = data.draw(st.sampled_from([each for each in range(1, size + 1) if size % each == 0]))
        wanted = ports_one_by_one(matrix, topology, level, ports)
        np.testing.assert_array_equal(port_load(matrix, topology, level, ports), wanted)
        many = np.stack([matrix, 2 * matrix])[None]
        np.testing.assert_array_equal(port_load(many, topology, level, ports)[0, 1], 2 * wanted)
        unit = topology.unit_of(level)
        inside = np.where(unit[:, None] == unit, matrix, 0)
        np.testing.assert_array_equal(inside_load(matrix, topology, level), np.bincount(unit, inside.sum(1)))


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_alpha_beta_prices_the_balanced_exchange_that_loads_the_busiest_port_as_much(drawn):
    topology, matrix = drawn
    nodes, num_ranks = topology.shape[0], topology.num_ranks
    local = num_ranks // nodes
    inside = np.where(topology.unit_of(0)[:, None] == topology.unit_of(0), matrix, 0)
    within = max(inside.sum(0).max(), inside.sum(1).max())
    outer = ports_one_by_one(matrix, topology, 0).max() / local * nodes / max(1, nodes - 1)
    wanted = {"flat": outer if nodes > 1 else within * num_ranks / max(1, num_ranks - 1)}
    wanted["intra"] = within * local / max(1, local - 1)
    cluster = cluster_of(topology, collectives=COSTS)
    for scope, amount in wanted.items():
        assert balanced_bytes(matrix, topology, scope) == pytest.approx(amount)
        alpha, beta = cluster.linear(f"a2a.{scope}")
        found = AlphaBeta(cluster).seconds(Transfer("a2a", scope, matrix, messages=3))
        assert found == pytest.approx(3 * alpha + beta * amount if amount else 0.0)


@given(matrices())
@settings(max_examples=60, deadline=None)
def test_the_busiest_port_of_any_level_decides(drawn):
    topology, matrix = drawn
    rates = [3e6 * 7**level for level in range(topology.num_levels)]
    links = Ports(topology, tuple(Line(*each) for each in enumerate(rates)), start_s=0.25)
    loads = [ports_one_by_one(matrix, topology, level) / rate for level, rate in enumerate(rates)]
    assert links.of(matrix) == pytest.approx(max(each.max() for each in loads))
    assert links.seconds(Transfer("a2a", "flat", matrix, 2)) == pytest.approx(0.5 + links.of(matrix))
    by_rank = [each[topology.unit_of(level)] for level, each in enumerate(loads)]
    np.testing.assert_allclose(links.by_rank(matrix), np.max(by_rank, axis=0))


def test_a_port_of_its_own_is_no_faster_than_the_ranks_that_share_it():
    topology = Topology((2, 4))
    matrix = np.zeros((8, 8))
    matrix[0, 4], matrix[1, 5] = 6.0, 2.0
    times = [Ports(topology, (Line(0, 4.0 / n, n),)).of(matrix) for n in (1, 2, 4)]
    assert times == [2.0, 4.0, 6.0]  # in all the node sends 4 a second; rank 0 and 1 through one, one, two of them


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize("scope", ["flat", "intra", "inter"])
def test_an_even_all_to_all_is_a_transfer_of_equal_parts(shape, scope):
    topology = Topology(shape)
    groups = {
        "flat": [range(topology.num_ranks)],
        "intra": [topology.inner_group(r, 0) for r in range(topology.num_ranks)],
    }
    groups["inter"] = [topology.rail(r) for r in range(topology.num_ranks)]
    if scope == "inter" and len(shape) > 2:
        groups["inter"] = [[r, (r + 4) % 8] for r in range(8)]
    matrix = np.zeros((topology.num_ranks,) * 2)
    for group in groups[scope]:
        matrix[np.ix_(group, group)] = 24.0 / len(group)
    np.fill_diagonal(matrix, 0)
    links = Ports(topology, tuple(Line(level, 2.0 * (level + 1)) for level in range(len(shape))))
    assert links.seconds(Even("a2a", scope, 24.0)) == pytest.approx(links.of(matrix))


def test_rings_bring_each_unit_what_it_has_not():
    links = Ports(Topology((2, 4)), (Line(0, 1.0), Line(1, 100.0)))
    assert links.seconds(Even("ag", "flat", 24.0)) == 12.0
    assert links.seconds(Even("ar", "flat", 24.0)) == 24.0
    assert links.seconds(Even("ar", "inter", 24.0)) == 96.0  # four rings through one port
    assert links.seconds(Even("ar", "intra", 24.0)) == pytest.approx(2 * 24 * 3 / 4 / 100)


# ------------------------------------------------------------------------------------------------------ shared ports


def fair_by_steps(begins, amounts, each_s):
    """When each is done at a port shared evenly: event by event."""
    left, done, now = np.array(amounts, dtype=float), np.zeros(len(begins)), 0.0
    done[left == 0] = np.asarray(begins)[left == 0]
    while (left > 0).any():
        at_work = (left > 0) & (np.asarray(begins) <= now)
        later = [b for b, rest in zip(begins, left, strict=True) if rest > 0 and b > now]
        ends = now + left[at_work].min() * at_work.sum() * each_s if at_work.any() else math.inf
        until = min([ends, *later])
        if at_work.any():
            left[at_work] -= (until - now) / (at_work.sum() * each_s)
            left[left < 1e-9] = 0
        done[at_work & (left == 0)] = until
        now = until
    return done


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_a_shared_port_is_shared_evenly(ranks):
    from harness.plan.fair import fair, last, together

    begins, amounts = (np.array(each, dtype=np.float64) for each in zip(*ranks, strict=True))
    done, order = np.zeros(len(begins)), np.zeros(len(begins), dtype=np.int64)
    fair(begins, amounts, 0.5, done)
    np.testing.assert_allclose(done, fair_by_steps(begins, amounts, 0.5), atol=1e-7)
    assert last(order, 0, len(begins), begins, amounts, 0.5) == pytest.approx(done.max())
    fair(np.zeros_like(begins), amounts, 0.5, done)
    at_once = np.zeros_like(done)
    together(order, 0, len(begins), amounts, 0.5, at_once)
    np.testing.assert_array_equal(done, at_once)


@given(matrices())
@settings(max_examples=40, deadline=None)
def test_who_begins_together_is_done_together_with_the_busiest_port(drawn):
    topology, matrix = drawn
    links = SharedPorts(topology, (Line(0, 5e6), Line(topology.num_levels - 1, 2e7)))
    ends = links.finish(Transfer("a2a", "flat", matrix), np.zeros(topology.num_ranks))
    assert ends.max() == pytest.approx(float(links.of(matrix)))
    begins = np.arange(topology.num_ranks) / 10
    later = links.finish(Transfer("a2a", "flat", matrix), begins)
    senders = np.where(matrix.T > 0, begins, 0).max(1)  # delays of others may leave it a free port
    assert (later >= np.maximum(begins, senders) - 1e-9).all()
    assert (later <= ends.max() + (topology.num_ranks - 1) / 10 + 1e-9).all()


@given(st.sampled_from(SHAPES), st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_placements_are_searched_by_the_same_ports(shape, seed):
    """A layer there and home as MoETuner's search has it, whose ranks all have as many tokens."""
    from methods.moetuner.busiest import home_s

    topology, rng = Topology(shape), np.random.default_rng(seed)
    num_ranks = topology.num_ranks
    rows = np.tile(rng.integers(0, 50, num_ranks).astype(float), (num_ranks, 1))  # from each as many to each
    row_s, *port_s = rng.uniform(0.1, 2, 3)
    lines = tuple(Line(level, 1 / each) for level, each in zip((0, topology.num_levels - 1), port_s, strict=True))
    links, load = SharedPorts(topology, lines), rows.sum(0)
    there = links.flows(rows, np.zeros(num_ranks), out=False).max(0)
    home = links.flows(rows.T, there + row_s * load, into=False)
    arriving, leaving, sizes = [], [], []
    for line in lines:
        unit = topology.unit_of(line.level)
        crossing = np.where(unit[:, None] != unit, rows, 0)
        arriving.append(crossing.sum(0))
        out = np.bincount(unit, crossing.sum(1))
        leaving.append(np.pad(out, (0, num_ranks - len(out))))
        sizes.append(num_ranks // topology.num_units(line.level))
    found = home_s(load, np.array(arriving), np.array(leaving), np.array(sizes), np.array([row_s, *port_s]))
    least = max(2 * out.max() * price for out, price in zip(leaving, port_s, strict=True))
    assert found == pytest.approx(max(home.max(), least))


def test_a_rank_waits_for_the_rows_that_others_send_it():
    links = SharedPorts(Topology((2, 2)), (Line(0, 1.0),))
    matrix = np.zeros((4, 4))
    matrix[0, 2] = matrix[1, 3] = 1.0
    ends = links.finish(Transfer("a2a", "flat", matrix), np.array([5.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(ends, [6, 1, 6, 1])


def test_ranks_that_do_not_meet_go_on_when_their_own_rows_are_there():
    topology = Topology((2, 2))
    matrix = np.zeros((4, 4))
    matrix[2, 0], matrix[2, 1] = 1.0, 3.0
    plan = Plan()
    plan.add("wait", COMPUTE, (), Hold(np.array([0.0, 0.0, 0.0, 1.0])))
    plan.add("dispatch", INTER, ["wait"], Transfer("a2a", "flat", matrix))
    plan.add("experts", COMPUTE, ["dispatch"], Compute(np.array([1.0, 1.0, 0.0, 1.0])))
    cluster = cluster_of(topology, rate=1.0, device_flops_per_s=4.0)
    apart, met = (
        simulate(plan, Machine.data_sheet(cluster, 0.5, links=links), topology) for links in ("shared-ports", "ports")
    )
    np.testing.assert_allclose(apart.of("dispatch")[1], [2, 4, 4, 1])
    np.testing.assert_allclose(apart.of("experts")[1], [3, 5, 4, 2])
    np.testing.assert_allclose(met.of("dispatch")[1], [5, 5, 5, 5])
    slowed = simulate(plan, Machine(apart_links(cluster), Held(), "test", {"inter": {"compute": 1.0}}), topology)
    assert (slowed.of("dispatch")[1] >= apart.of("dispatch")[1] - 1e-9).all()


def profiled(name: str = "emulated-2x4") -> Profiled:
    return Profiled(calibration(name))


@given(st.integers(0, 10**6), st.sampled_from(["emulated-2x4", "emulated-2x2x2", "emulated-2x2x2-rails"]))
@settings(max_examples=30, deadline=None)
def test_profiled_ranks_that_begin_together_are_done_with_the_busiest_port(seed, name):
    links, rng = profiled(name), np.random.default_rng(seed)
    matrix = rng.integers(0, 10**6, (8, 8)).astype(float) * (rng.random((8, 8)) < 0.7)
    np.fill_diagonal(matrix, 0)
    cost = Transfer("a2a", "flat", matrix)
    ends = links.finish(cost, np.zeros(8))
    assert ends.max() == pytest.approx(float(np.max(links.seconds(cost))))
    for late in range(8):  # of two ranks, neither sends before the other listens
        begins = np.zeros(8)
        begins[late] = 1.0
        alone = np.zeros((8, 8))
        alone[late, (late + 5) % 8] = 1e5
        found = links.finish(Transfer("a2a", "flat", alone), begins)
        back = links.finish(Transfer("a2a", "flat", alone.T), begins)
        np.testing.assert_allclose(found, back)
        assert found[(late + 5) % 8] == found[late] > 1.0
        assert sorted(found)[:6] == [0.0] * 6


def test_a_port_is_that_of_its_ranks_alone():
    """By the rates stated, and as profiled: two ranks of a node send by two NICs, and reach each other by none."""
    cluster = presets.cluster("emulated-2x2x2-rails")
    stated, found = Ports(Topology(cluster.shape), lines_of(cluster)), profiled(cluster.name)
    flows = {"one": [(0, 2), (0, 3)], "two": [(0, 2), (1, 3)], "in": [(0, 2), (1, 2)]}
    flows["racks"] = [(0, 4), (1, 5), (2, 6)]
    matrices = {"none": np.zeros((8, 8))} | {name: np.zeros((8, 8)) for name in flows}
    for name, pairs in flows.items():
        for source, target in pairs:
            matrices[name][source, target] = 1e6
    seconds = {name: float(stated.of(matrix)) for name, matrix in matrices.items()}
    assert seconds == pytest.approx({"none": 0, "one": 0.08, "two": 0.04, "in": 0.08, "racks": 0.06})
    node = next(line for line in found.ports.lines if line.level == 1)
    assert node.ports == 2
    ends = {name: found.finish(Transfer("a2a", "flat", matrix), np.zeros(8)).max() for name, matrix in matrices.items()}
    alpha = found.finish(Transfer("a2a", "flat", matrices["two"]), np.zeros(8)).max() - 1e6 / node.bytes_per_s
    assert ends["one"] - alpha == pytest.approx(2e6 / node.bytes_per_s) == ends["in"] - alpha


def test_unequal_nodes_share_their_ports():
    """Port by port, and flows that begin together; four ranks share a port out, two of another node one in."""
    cluster = presets.cluster("emulated-4-2-2")
    topology, rng = Topology(cluster.shape), np.random.default_rng(5)
    (line,) = lines_of(cluster)
    node = line.port_of(topology)
    assert node.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    matrix = rng.integers(0, 10**6, (8, 8)).astype(float)
    crossing = np.where(node[:, None] == node, 0, matrix)
    wanted = max(np.bincount(node, crossing.sum(axis)).max() for axis in (0, 1)) / 50e6
    assert float(Ports(topology, (line,)).of(matrix)) == pytest.approx(wanted)
    shared = SharedPorts(topology, (line,)).finish(Transfer("a2a", "flat", matrix), np.zeros(8))
    assert shared.max() == pytest.approx(wanted)
    even = float(Ports(topology, (line,)).seconds(Even("a2a", "flat", 8e6)))
    full = np.full((8, 8), 1e6)
    assert even == pytest.approx(float(Ports(topology, (line,)).of(full))) == 16e6 / 50e6
    found = profiled(cluster.name)
    cost = Transfer("a2a", "flat", matrix)
    assert found.finish(cost, np.zeros(8)).max() == pytest.approx(float(np.max(found.seconds(cost))))
    (_, beta) = found._fit("a2a.rank")
    alpha, _ = found._fit("a2a.flat")
    assert float(np.max(found.seconds(Transfer("a2a", "flat", full)))) == pytest.approx(alpha + 8e6 * beta)


def test_a_lane_s_next_transfer_waits_for_the_ports_and_other_lanes_do_not():
    """Rank 0 is done with node 1 before rank 1 is, and may go on at once; but its node's port is still at work."""
    links, topology = profiled(), Topology((2, 4))
    rate = 1 / next(1 / line.bytes_per_s for line in links.ports.lines if line.level == 0)
    first, second = np.zeros((8, 8)), np.zeros((8, 8))
    first[0, 4], first[1, 5], second[0, 4] = 1e7, 3e7, 1e7
    done = links.finish(one := Transfer("a2a", "flat", first), np.zeros(8))
    start_s = float(done[0] - 2e7 / rate)  # both flows share the port until the smaller one is through
    assert done[1] == pytest.approx(start_s + 4e7 / rate)
    lane: dict = {}
    before = links.finish(one, np.zeros(8), lane)
    then = links.finish(Transfer("a2a", "flat", second), before, lane)
    assert then[0] == pytest.approx(start_s + 5e7 / rate)  # no byte goes by the port before its turn
    elsewhere = links.finish(Transfer("a2a", "flat", second), before, {})
    assert elsewhere[0] == pytest.approx(before[0] + start_s + 1e7 / rate)
    plan = Plan()
    plan.add("one", INTER, (), one)
    plan.add("two", INTER, (), Transfer("a2a", "flat", second))
    machine = Machine(links, Held(), "test")
    np.testing.assert_allclose(simulate(plan, machine, topology).of("two")[1][[0, 4]], then[[0, 4]])


class Held:
    def seconds(self, cost):
        return np.asarray(cost.macs, dtype=float)


def apart_links(cluster):
    return Machine.data_sheet(cluster, 0.5, links="shared-ports").links


def cluster_of(topology, rate=None, **fields):
    levels = [{"name": f"l{i}", "size": size} for i, size in enumerate(topology.shape)]
    if rate is not None:
        levels[0]["bandwidth_bytes_per_s"] = rate
    return with_levels("c", levels, kind="physical", **fields)
