"""A real package is priced by the bytes that it puts on the wire, part by part."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from baselines.deepspeed import DeepSpeed
from baselines.megatron import Megatron
from baselines.tutel import Tutel2DH
from harness.plan.cost import Compute, Cost, InTurn, Transfer
from harness.plan.links import balanced_bytes
from harness.plan.machine import Machine
from harness.plan.passage import Direction, plan_alone
from harness.plan.simulate import simulate
from harness.routing.certificate import expert_counts
from harness.specs import with_levels
from harness.system import Case, System
from harness.topology import Topology
from harness.traffic import direction_bytes, port_load
from tests.baselines.recorded import make_case

TWO_BY_TWO = Topology((2, 2))
LINKS = {f"a2a.{scope}": {"alpha_s": 1e-4, "beta_s_per_byte": 1e-8} for scope in ("flat", "inter", "intra")}


def parts_of(package: type[System], case: Case, direction: Direction) -> tuple[Cost, ...]:
    """Of its one task."""
    way = package.layout(case)
    assert way is not None
    (task,) = plan_alone(way, direction).tasks
    assert task.cost is not None
    return tuple(flat(task.cost))


def flat(cost: Cost) -> Iterator[Cost]:
    """What happens one after another."""
    if isinstance(cost, InTurn):
        for part in cost.parts:
            yield from flat(part)
    else:
        yield cost


def bytes_between_nodes(amount: float, topology: Topology) -> float:
    """Through one node's port in one direction, of a balanced all-to-all with buffers of ``amount``."""
    nodes, num_ranks = topology.shape[0], topology.num_ranks
    return amount * (num_ranks // nodes) * (nodes - 1) / nodes


@pytest.mark.parametrize("package", [Megatron, DeepSpeed], ids=lambda package: package.name)
@pytest.mark.parametrize("generator", ["uniform", "zipf"])
def test_it_loads_the_busiest_port_as_the_package_does(session, package: type[System], generator: str) -> None:
    given = {"tokens": 32, "generator": generator, "params": {"target": 2.5} if generator == "zipf" else {}}
    ranks = session("local-4").call("tests.baselines.recorded:step", {"system": package.name, "case": given})
    case = make_case(TWO_BY_TWO, **given)
    parts = package.planned_bytes(case)
    assert parts is not None
    directions: dict[Direction, list[str]] = {
        "forward": ["metadata", "dispatch", "combine"],
        "backward": ["combine_grad", "dispatch_grad", "metadata_grad"],
    }
    for direction, names in directions.items():
        recorded = np.stack([rank["sent"][(direction, "all_to_all")] for rank in ranks])
        rows = [name for name in names if not name.startswith("metadata")]
        np.testing.assert_array_equal(recorded, parts[rows[0]] + parts[rows[1]])
        transfers = [cost for cost in parts_of(package, case, direction) if isinstance(cost, Transfer)]
        for cost, name in zip(transfers, [name for name in names if name in parts], strict=True):
            found = bytes_between_nodes(balanced_bytes(cost.matrix, TWO_BY_TWO, cost.scope), TWO_BY_TWO)
            assert found == pytest.approx(port_load(parts[name], TWO_BY_TWO, 0).max())


def test_a_balanced_layer_moves_exactly_the_planned_bytes() -> None:
    case = make_case(TWO_BY_TWO, tokens=32, generator="balanced")
    node = TWO_BY_TWO.unit_of(0)
    directions: tuple[Direction, ...] = ("forward", "backward")
    for package in (Megatron, DeepSpeed, Tutel2DH):
        parts = package.planned_bytes(case)
        assert parts is not None
        for direction in directions:
            across = direction_bytes(parts, direction) * (node[:, None] != node)
            found = sum(
                bytes_between_nodes(balanced_bytes(cost.matrix, TWO_BY_TWO, cost.scope), TWO_BY_TWO)
                for cost in parts_of(package, case, direction)
                if isinstance(cost, Transfer) and cost.scope in ("flat", "inter")
            )
            assert 2 * found == pytest.approx(across.sum())  # two nodes, a port each


def test_two_stages_stand_around_experts_that_compute_their_padding_too() -> None:
    case = make_case(Topology((2, 4)), tokens=32, generator="zipf", params={"target": 2.5})
    cluster = with_levels(
        "c",
        [{"name": "node", "size": 2}, {"name": "rank", "size": 4}],
        kind="physical",
        collectives=LINKS,
        gemm={"alpha_s": 1e-4, "beta_s_per_mac": 1e-9},
    )
    costs = parts_of(Tutel2DH, case, "forward")
    experts = next(i for i, cost in enumerate(costs) if isinstance(cost, Compute) and cost.experts is not None)
    scopes = [cost.scope if isinstance(cost, Transfer) else "" for cost in costs]
    assert [scope for scope in scopes[:experts] if scope][-2:] == ["inter", "intra"]
    assert [scope for scope in scopes[experts:] if scope] == ["intra", "inter"]
    machine = Machine.published(cluster)
    capacity = expert_counts(case.routing).max()  # of every rank, for every expert
    rows = costs[experts].experts.rows  # type: ignore[attr-defined]
    np.testing.assert_array_equal(rows, Tutel2DH.planned_rows(case))
    assert set(rows.sum(1)) == {case.model.num_experts * capacity}
    np.testing.assert_array_equal(rows, DeepSpeed.planned_rows(case))
    assert Megatron.planned_rows(case).sum() == case.model.top_k * sum(case.routing.tokens) < rows.sum()
    way = Tutel2DH.layout(case)
    assert way is not None
    node = case.topology.unit_of(0)
    sent = [cost for cost in costs[:experts] if isinstance(cost, Transfer)]
    assert sum(cost.matrix for cost in sent[-2:]) == pytest.approx(Tutel2DH.planned_bytes(case)["dispatch"])
    assert not sent[-2].matrix[node[:, None] == node].any()  # each stage sends what goes by its own links
    took = simulate(plan_alone(way, "forward"), machine, case.topology).total_s
    alone = sum(np.max(machine.seconds(cost)) for cost in costs)
    assert took.max() <= alone * (1 + 1e-9)  # ranks of a node that have less wait less for the other nodes
    assert took.max() > machine.seconds(costs[experts]).max()


def test_one_node_has_only_what_is_inside_it() -> None:
    topology = Topology((1, 4))
    assert balanced_bytes(np.full((4, 4), 3.0), topology, "flat") == pytest.approx(4 * 3.0)  # of which a quarter stays
