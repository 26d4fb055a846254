"""Sparse collectives against plain sums, and layers with replicas against the oracle."""

from __future__ import annotations

import numpy as np
import pytest

from harness.comm.replicas import nearest, replica_bytes
from harness.comm.sparse import plan_sparse
from harness.errors import UserError
from harness.routing import make_routing
from harness.specs import Model, Workload
from harness.topology import Topology
from harness.traffic import crossing
from tests.launch.clusters import EMULATED
from tests.methods.test_hiermoe import cluster
from tests.plan.replicated_on_ranks import random_hosts

ON_RANKS = "tests.plan.replicated_on_ranks:"
SHAPES = [(2, 4), (4, 2), (2, 2, 2)]
ON_SHAPES = [*(pytest.param(shape, marks=pytest.mark.long) for shape in SHAPES[:2]), SHAPES[2]]


@pytest.mark.parametrize("shape", ON_SHAPES, ids=str)
def test_gathers_and_reductions_equal_plain_sums(session, shape):
    for found in session(cluster(shape)).call(ON_RANKS + "collectives", {"seed": 3, "trials": 12}):
        assert found["wrong"] == []
        assert found["received"] == found["planned"]
        assert sum(found["received"]) > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chunk_crosses_every_link_once_for_each_unit_that_wants_it(shape):
    topology, rng = Topology(shape), np.random.default_rng(1)
    for share in (0.1, 0.5, 1.0):
        owner = rng.integers(0, 8, 40)
        hosts = random_hosts(rng, owner, 8, share)
        plan = plan_sparse(owner, hosts, topology)
        matrix = plan.bytes(3.0)
        assert (matrix.sum(0) == 3 * (hosts.sum(0) - np.bincount(owner, minlength=8))).all()  # what P' says, no more
        node = topology.unit_of(0)
        crossed = 3 * sum(len(set(node[hosts[e]]) - {node[owner[e]]}) for e in range(40))
        assert crossing(matrix, topology)[0] == crossed
        assert matrix.sum(0).max() <= plan.sparsity * 3 * 40
    assert plan.sparsity == 1.0
    into = np.where(node[:, None] != node, matrix, 0).sum(0).reshape(shape[0], -1)
    assert (np.ptp(into, axis=1) <= 3).all()  # the ranks of a node take turns in letting chunks in


def test_what_is_no_placement_is_refused():
    hosts = np.eye(4, dtype=bool)
    with pytest.raises(UserError, match="placement: 2: is a chunk that its owner, rank 3, does not keep"):
        plan_sparse(np.array([0, 1, 3, 3]), hosts, Topology((2, 2)))
    with pytest.raises(UserError, match=r"must be \[4 chunks, 8 ranks\]"):
        plan_sparse(np.arange(4), hosts, Topology((2, 4)))


WAYS = [
    {"seed": 0, "share": 0.0, "revises": False, "rematerialises": False},
    {"seed": 1, "share": 0.4, "revises": False, "rematerialises": False},
    {"seed": 2, "share": 0.4, "revises": False, "rematerialises": True},
    {"seed": 3, "share": 0.3, "revises": True, "rematerialises": True},
    {"seed": 4, "share": 1.0, "revises": False, "rematerialises": False},
]


@pytest.mark.parametrize("shape", ON_SHAPES, ids=str)
def test_every_gradient_is_the_oracles_whatever_copies_there_are(session, shape):
    trials = ["uniform", "swiglu", "experts-without-tokens", "drops", "exchange"]
    payload = {"trials": trials, "ways": WAYS, "tokens": [11, 16, 5, 9, 16, 0, 13, 2], "dtype": "float64"}
    assert session(cluster(shape)).call(ON_RANKS + "compared", payload)[0] == []


def test_layers_without_any_token_and_other_formats(session):
    payload = {"trials": ["uniform"], "ways": WAYS, "tokens": [0], "dtype": "float64"}
    ranks = session(cluster((2, 4)))
    assert ranks.call(ON_RANKS + "compared", payload)[0] == []
    for dtype in ("float32", "bfloat16"):
        assert ranks.call(ON_RANKS + "compared", payload | {"tokens": [13], "dtype": dtype})[0] == []


def test_rows_go_to_the_nearest_holders_and_evenly():
    topology, rng = Topology((2, 4)), np.random.default_rng(0)
    hosts = random_hosts(rng, rng.integers(0, 8, 30), 8, 0.3)
    counts = rng.integers(0, 50, (8, 30))
    rows = nearest(hosts, topology).rows(counts)
    assert (rows.sum(2) == counts).all()
    assert not (rows > 0)[:, ~hosts].any()
    for source in range(8):
        for e in range(30):
            got = np.flatnonzero(hosts[e])
            if hosts[e, source]:
                near = np.array([source])
            else:
                near = got[got // 4 == source // 4] if (got // 4 == source // 4).any() else got
            assert rows[source, e, near].sum() == counts[source, e]
            assert np.ptp(rows[source, e, near]) <= 1


def test_planned_bytes_without_replicas_are_the_flat_exchanges():
    from harness.comm.exchange import flat_bytes
    from harness.placement import Placement

    model = Model(name="m", num_layers=1, hidden=4, ffn=4, num_experts=16, top_k=2)
    topology, placement = Topology((2, 4)), Placement.contiguous(16, 8)
    routing = make_routing(Workload(name="w", tokens_per_rank=40, generator="uniform"), model, topology)
    found, flat = replica_bytes(routing, placement.hosts, topology, 8.0), flat_bytes(routing, placement, 8)
    assert all((found[part] == flat[part]).all() for part in ("dispatch", "combine", "combine_grad", "dispatch_grad"))


def test_no_more_than_the_plan_goes_over_the_node_link(session):
    """spAG and spRS of the same placement: both lambda S at most, at the interfaces of an emulated cluster."""
    payload = {"rows": 16, "elements": 32_768, "share": 0.5}
    ranks = session(EMULATED)
    if not ranks.network["shaped"]:
        pytest.skip(ranks.network["reason"])
    found = ranks.call(ON_RANKS + "counted", payload)[0]
    for counted, planned in zip(found["counted"], found["planned"], strict=True):
        assert planned > 2**20
        assert 1.0 <= counted / planned < 1.02
    assert found["planned"][0] == found["planned"][1]
    assert found["received"] <= found["limit"]
