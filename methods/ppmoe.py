"""PPMoE (Chen et al., arXiv 2304.11414): experts over the tensor-parallel ranks of a node, and no all-to-all.

Each node has all experts, a rank of it some of them. A node's tokens are on all its ranks; each picks those of its own
experts by an index (the paper's tensor index slicing), and what the ranks make of a token is summed inside the node.
Nothing of a token crosses nodes. The nodes are data parallel: copies of an expert sum their gradients over nodes.

Its claim (abstract): more than 1.75 times as fast as existing MoE architectures. That is with pipeline parallelism over
nodes, which spares gradients their way between nodes; here there is none, so copies' gradients are what crosses them.

It is two slots. The exchange ``ppmoe`` brings every token to every rank of its node and sums up what comes back; the
state ``per-node`` keeps one copy of each expert in every node, under any exchange: by ``hiermoe-hd2+per-node`` tokens
go only where they are needed.

Interpretations: a rank has tokens of its own, as everywhere here, so these are gathered before (the paper has them on
all tensor-parallel ranks by then) and sums scattered behind: together the bytes of its all-reduce, in equal messages.
Which experts rows need, with the gate's weights, comes beside them instead of being computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch

from harness.comm.assign import Hosting
from harness.comm.job import Job
from harness.comm.journey import Cut
from harness.comm.replicas import there_and_back, travel
from harness.memory import OPTIMIZER_STATES
from harness.placement import Placement
from harness.plan.copied import CopiedSystem
from harness.plan.cost import Cost, Transfer
from harness.plan.following import Planner
from harness.plan.native import NativeSystem
from harness.plan.slots import ExchangeSlot, FlatFares, in_bytes
from harness.routing.certificate import expert_counts
from harness.routing.types import Routing
from harness.system import Case
from methods.hiermoe.hierd import HierExchange, index_inside
from methods.hiermoe.plan import Hop


class NodeExchange(HierExchange):
    """One stage inside the node, in which everyone gets everything."""

    everyone: ClassVar[bool] = True

    def chain(self, hosting: Hosting, held: torch.Tensor, choice: torch.Tensor, top_k: int) -> list[Hop | None]:
        job = self.job
        if (group := job.inner(0)) is None:
            return [None, None]
        position, holder = torch.full((job.num_ranks,), -1), torch.as_tensor(hosting.holder)
        members = job.topology.inner_group(job.rank, 0)
        position[members] = torch.arange(len(members))
        return [None, Hop(group, position[holder], *index_inside(holder, job.rank))]


class NodeFares(FlatFares):
    """Nothing on the hop between nodes, all on the one inside them."""

    num_hops = 2
    weights_travel = True

    @property
    def sums(self) -> bool:
        return True

    def cost(self, part: str, hop: int, degree: int) -> Cost | None:
        matrix = self.bytes(part) if hop else None
        messages = 2 if part == "metadata" else 1  # a table of sizes, then the columns
        return None if matrix is None else Transfer("a2a", "intra1", matrix / degree, messages)


class NodeSlot(ExchangeSlot):
    name = "ppmoe"
    title = "every rank gets all tokens of its node"
    source = "arXiv 2304.11414"
    packs = True

    def refuse(self, case: Case) -> str | None:
        if case.topology.num_levels == 1:
            return "a cluster of one link level has no nodes; take another"
        if case.exchange_dtype is not None and case.topology.num_ranks == case.topology.shape[0]:
            return f"a rank alone in its node sends no rows, as {case.exchange_dtype} or otherwise"
        return None

    def unreached(self, case: Case, hosts: Callable[[Case], np.ndarray]) -> str | None:
        member = case.topology.unit_of(0)[:, None] == np.arange(case.topology.shape[0])
        if (hosts(case).astype(int) @ member).all():
            return None
        return (
            "there are experts that are not in every node, and ppmoe sends nothing between nodes; take state: per-node"
        )

    def num_hops(self, case: Case) -> int:
        return 2

    def make(self, case: Case, job: Job) -> NodeExchange:
        return NodeExchange(job, case.placement, 2)

    def fares(self, case: Case, routing: Routing, hosts: np.ndarray, cut: Cut, counted: bool = False) -> NodeFares:
        node, tokens = case.topology.unit_of(0), np.asarray(routing.tokens, dtype=np.float64)[:, None]
        together = (node[:, None] == node).astype(np.float64)
        entries = travel(expert_counts(routing), hosts, case.topology).rows
        weight_bytes = 8.0 if case.dtype == "float64" else 4.0
        index_bytes = np.where(hosts.sum(0) <= 256, 1.0, 2.0)  # of an expert among those of the receiving rank
        metadata = together * (4.0 * (cut.pieces + 1) + tokens) + entries * (index_bytes + weight_bytes)
        rows = together * tokens
        for matrix in (metadata, rows, entries):
            np.fill_diagonal(matrix, 0)
        parts = in_bytes(case, there_and_back(metadata, rows))
        if case.model.gate != "softmoe":  # its slots weigh 1
            parts["metadata_grad"] = entries.T * weight_bytes
        return NodeFares(parts)


class PerNode(CopiedSystem):
    name = "per-node"
    title = "one copy of each expert in every node, on like ranks of the nodes"
    source = "arXiv 2304.11414, where its experts are"
    every = 10**9  # nothing moves
    variants: ClassVar[dict[str, dict[str, bool | int | float | str]]] = {}
    options: ClassVar[dict[str, str]] = {}

    @classmethod
    def planner(cls, case: Case) -> Planner:
        return lambda load, placement: placement

    @classmethod
    def first(cls, case: Case) -> Placement:
        inside = case.topology.num_ranks // case.topology.shape[0]
        local = np.arange(case.model.num_experts) * inside // case.model.num_experts
        return Placement(local[:, None] == np.arange(case.topology.num_ranks) % inside)

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        return NativeSystem.refuse.__func__(cls, case)  # type: ignore[attr-defined]  # slots are as many as it takes

    @classmethod
    def copied_parameters(cls, case: Case) -> int:
        own, nodes = case.model.num_experts // case.topology.num_ranks, case.topology.shape[0]
        each = 2 + OPTIMIZER_STATES[case.dtype]  # with a gradient
        return each * case.model.num_moe_layers * own * (nodes - 1)


class PPMoE(PerNode):
    name = "ppmoe"
    title = "PPMoE: all experts in every node, tokens gathered inside it, nothing between nodes but gradients"
    source = "arXiv 2304.11414, without its pipeline over nodes"
    exchange = NodeSlot()


#: brought to recipes, by name
EXCHANGES = {"ppmoe": PPMoE.exchange}
STATES = {"per-node": PerNode}
