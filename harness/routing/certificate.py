"""What a routing really is: its hash and its measured imbalance. A result without it is not a result."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from harness.errors import bad
from harness.groups import Groups
from harness.placement import Placement
from harness.routing.types import Routing
from harness.topology import Topology


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Measured facts about one routing under one placement; loads are assignments (token, expert)."""

    digest: str  # of the routing
    tokens: tuple[int, ...]  # of each rank
    num_experts: int
    top_k: int
    #: max/mean load per "expert", per "rank" and per "node" (assignments to be computed there) and per "link":
    #: token rows through each node's port and direction in a flat all-to-all, one row per assignment. Also per "group"
    #: of experts, where a token has equally many of every group; what is even there is even per rank that holds one
    max_over_mean: dict[str, float]
    #: max over ranks of max/mean over experts of that rank's own assignments
    worst_rank_expert: float
    #: the least ``worst_rank_expert`` that whole numbers of tokens allow
    balanced_bound: float
    #: every rank gives every expert the same number of assignments, rounded up or down
    balanced: bool
    num_empty_experts: int
    #: nothing is dropped at the stated capacity (always so without one)
    drop_free: bool
    capacity_factor: float | None
    #: what every layer's walk was fitted to, where the workload is one like a trace: ``harness.routing.walk.Fitted``
    fitted: tuple[dict[str, float], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "tokens": list(self.tokens)}


def expert_counts(routing: Routing) -> np.ndarray:
    """Assignments from each rank to each expert, int64 [num_ranks, E]; not to be changed."""
    return routing.counts


def certify(
    routing: Routing,
    placement: Placement,
    topology: Topology,
    capacity_factor: float | None = None,
    num_groups: int | None = None,
    groups: Groups | None = None,
) -> Certificate:
    """Measure ``routing``. A replicated expert's load is split evenly over the ranks that hold it.

    ``capacity_factor``: of a gate that keeps at most ceil(factor * T_rank * k / E) assignments of each rank per expert.
    ``num_groups``: of consecutive experts, all as large, whose loads are to be told. ``groups``: expert-parallel ones,
    in which rows stay.
    Errors: other numbers of ranks or experts, an expert that no rank holds, a token with the same expert twice.
    """
    num_ranks, num_experts = topology.num_ranks, routing.num_experts
    if len(routing.tokens) != num_ranks or placement.hosts.shape != (num_experts, num_ranks):
        text = f"must fit {num_experts} experts on {num_ranks} ranks and a routing of {len(routing.tokens)} ranks"
        raise bad("placement.hosts", placement.hosts.shape, text)
    replicas = placement.hosts.sum(1)
    if not replicas.all():
        raise bad("placement.hosts", int(replicas.argmin()), "is an expert that no rank holds")
    ordered = np.sort(routing.ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        token = int((ordered[:, 1:] == ordered[:, :-1]).any(1).argmax())
        raise bad(f"routing.ids[{token}]", routing.ids[token].tolist(), "a token's experts must be distinct")

    if num_groups and num_experts % num_groups:
        raise bad("num_groups", num_groups, f"must divide the {num_experts} experts")
    counts = expert_counts(routing)  # [W, E]
    fair = np.array(routing.tokens) * routing.top_k / num_experts  # a rank's assignments per expert
    busy = fair > 0
    worst = float((counts.max(1)[busy] / fair[busy]).max()) if busy.any() else 1.0
    bound = float((np.ceil(fair[busy]) / fair[busy]).max()) if busy.any() else 1.0
    even = {"group": _max_over_mean(counts.sum(0).reshape(num_groups, -1).sum(1))} if num_groups else {}
    return Certificate(
        digest=routing.digest,
        tokens=tuple(int(count) for count in routing.tokens),
        num_experts=num_experts,
        top_k=routing.top_k,
        max_over_mean={**imbalance(counts, placement, topology, groups), **even},
        worst_rank_expert=worst,
        balanced_bound=bound,
        balanced=bool((np.ptp(counts, axis=1) <= 1).all()),
        num_empty_experts=int((counts.sum(0) == 0).sum()),
        drop_free=capacity_factor is None
        or bool((counts.max(1) <= np.ceil(np.round(capacity_factor * fair, 9))).all()),
        capacity_factor=capacity_factor,
    )


def imbalance(
    counts: np.ndarray, placement: Placement, topology: Topology, groups: Groups | None = None
) -> dict[str, float]:
    """``Certificate.max_over_mean`` per expert, rank, node and link. ``counts`` [W, E]: assignments from each rank to
    each expert."""
    num_ranks = topology.num_ranks
    groups = groups or Groups(topology, topology.shape)
    own = (placement.hosts[:, ranks] for ranks in groups)
    shares = [hosts / hosts.sum(1, keepdims=True) for hosts in own]  # [E, ranks of a group]
    rows = groups.blocks([counts[ranks] @ of for ranks, of in zip(groups, shares, strict=True)])  # from and to
    node = topology.unit_of(max(topology.num_levels - 2, 0)) if topology.num_levels > 1 else np.zeros(num_ranks, int)
    member = node[:, None] == np.arange(node.max() + 1)  # [W, nodes]
    between = member.T @ rows @ member  # [nodes, nodes]
    np.fill_diagonal(between, 0)
    return {
        "expert": _max_over_mean(counts.sum(0)),
        "rank": _max_over_mean(rows.sum(0)),
        "node": _max_over_mean((rows @ member).sum(0)),
        "link": _max_over_mean(np.concatenate([between.sum(0), between.sum(1)])),
    }


def _max_over_mean(load: np.ndarray) -> float:
    """1 where there is no load at all."""
    return float(load.max() / load.mean()) if load.any() else 1.0
