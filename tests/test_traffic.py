from __future__ import annotations

import numpy as np

from harness.placement import Placement
from harness.routing import make_routing
from harness.specs import Model, Workload
from harness.topology import Topology
from harness.traffic import crossing, port_load


def test_topology_of_three_levels() -> None:
    topology = Topology((2, 2, 2))
    assert topology.rail(5, 0) == [1, 5]
    assert topology.rail(5, 1) == [5, 7]
    assert topology.inner_group(5, 0) == [4, 5, 6, 7]
    assert topology.inner_group(5, 1) == [4, 5]
    assert topology.level_between[0].tolist() == [3, 2, 1, 1, 0, 0, 0, 0]


def test_crossing_and_port_load() -> None:
    matrix = np.zeros((4, 4))
    matrix[0, 1], matrix[0, 2], matrix[3, 0] = 1, 10, 100
    topology = Topology((2, 2))
    assert crossing(matrix, topology).tolist() == [110, 1]
    assert port_load(matrix, topology, 0).tolist() == [100, 100]  # the larger of out (10) and in (100)
    assert port_load(matrix, topology, 1).tolist() == [100, 1, 10, 100]


def test_deduplication_saves_what_the_paper_says() -> None:
    """HierMoE's Table II: with uniform routing, K = 8 and R = 4 groups, 55 % of the rows are duplicates."""
    from harness.comm.exchange import flat_bytes
    from methods.hiermoe.traffic import HierTravel, Wire

    model = Model(name="t", num_layers=1, hidden=8, ffn=8, num_experts=256, top_k=8)
    topology = Topology((4, 1))
    workload = Workload(name="w", tokens_per_rank=2000, generator="uniform")
    routing = make_routing(workload, model, topology)
    assert routing is not None
    placement = Placement.contiguous(256, 4)
    flat = flat_bytes(routing, placement, 1)["dispatch"]
    rows = HierTravel.of(routing, placement.owner, topology, 2, Wire(1, 4)).bytes("dispatch")
    assert abs(1 - rows.sum() / flat.sum() - 0.55) < 0.01
