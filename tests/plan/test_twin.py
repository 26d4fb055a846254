"""Twins move what the real packages put on the wire."""

from __future__ import annotations

import numpy as np
import pytest

from baselines.deepspeed import DeepSpeed
from baselines.megatron import Megatron
from baselines.tutel import Tutel2DH
from harness.plan.cost import Transfer
from harness.plan.links import balanced_bytes
from harness.plan.machine import Machine
from harness.plan.simulate import simulate
from harness.plan.twin import twin
from harness.specs import with_levels
from harness.system import System
from harness.topology import Topology
from harness.traffic import direction_bytes, port_load
from tests.baselines.recorded import make_case

TWO_BY_TWO = Topology((2, 2))
LINKS = {f"a2a.{scope}": {"alpha_s": 1e-4, "beta_s_per_byte": 1e-8} for scope in ("flat", "inter", "intra")}


def bytes_between_nodes(amount: float, topology: Topology) -> float:
    """Through one node's port in one direction, of a balanced all-to-all with buffers of ``amount``."""
    nodes, num_ranks = topology.shape[0], topology.num_ranks
    return amount * (num_ranks // nodes) * (nodes - 1) / nodes


@pytest.mark.parametrize("package", [Megatron, DeepSpeed], ids=lambda package: package.name)
@pytest.mark.parametrize("generator", ["uniform", "zipf"])
def test_the_twin_loads_the_busiest_port_as_the_package_does(session, package: type[System], generator: str) -> None:
    given = {"tokens": 32, "generator": generator, "params": {"target": 2.5} if generator == "zipf" else {}}
    ranks = session("local-4").call("tests.baselines.recorded:step", {"system": package.name, "case": given})
    case = make_case(TWO_BY_TWO, **given)
    plans, parts = twin(package, case), package.planned_bytes(case)
    assert plans is not None
    assert parts is not None
    for direction, names in (("forward", ["dispatch", "combine"]), ("backward", ["combine_grad", "dispatch_grad"])):
        recorded = np.stack([rank["sent"][(direction, "all_to_all")] for rank in ranks])
        np.testing.assert_array_equal(recorded, parts[names[0]] + parts[names[1]])
        tasks = {task.name: task.cost for task in plans[direction].tasks}
        for name in names:
            found = bytes_between_nodes(balanced_bytes(tasks[name].matrix, TWO_BY_TWO, tasks[name].scope), TWO_BY_TWO)
            assert found == pytest.approx(port_load(parts[name], TWO_BY_TWO, 0).max())


def test_a_balanced_twin_moves_exactly_the_planned_bytes() -> None:
    case = make_case(TWO_BY_TWO, tokens=32, generator="balanced")
    node = TWO_BY_TWO.unit_of(0)
    for package in (Megatron, DeepSpeed, Tutel2DH):
        parts = package.planned_bytes(case)
        for direction, plan in twin(package, case).items():
            across = direction_bytes(parts, direction) * (node[:, None] != node)
            found = sum(
                bytes_between_nodes(balanced_bytes(task.cost.matrix, TWO_BY_TWO, task.cost.scope), TWO_BY_TWO)
                for task in plan.tasks
                if isinstance(task.cost, Transfer) and task.cost.scope in ("flat", "inter")
            )
            assert 2 * found == pytest.approx(across.sum())  # two nodes, a port each


def test_a_twin_of_two_stages_is_simulated_on_ranks_that_compute_unequally() -> None:
    case = make_case(Topology((2, 4)), tokens=32, generator="zipf", params={"target": 2.5})
    cluster = with_levels(
        "c",
        [{"name": "node", "size": 2}, {"name": "rank", "size": 4}],
        kind="physical",
        collectives=LINKS,
        gemm={"alpha_s": 1e-4, "beta_s_per_mac": 1e-9},
    )
    plan = twin(Tutel2DH, case)["forward"]
    names = [task.name for task in plan.tasks]
    assert names.index("dispatch.inter") < names.index("dispatch.intra") < names.index("experts")
    assert names.index("experts") < names.index("combine.intra") < names.index("combine.inter")
    found = simulate(plan, Machine.published(cluster), case.topology)
    start, end = found.of("experts")
    assert len(set((end - start).round(9))) > 1  # experts of one rank got more
    combined = found.of("combine.intra")[0].reshape(2, 4)
    assert (combined == combined.max(1, keepdims=True)).all()  # a node waits for its slowest rank


def test_one_node_has_only_what_is_inside_it() -> None:
    topology = Topology((1, 4))
    assert balanced_bytes(np.full((4, 4), 3.0), topology, "flat") == pytest.approx(4 * 3.0)  # of which a quarter stays
