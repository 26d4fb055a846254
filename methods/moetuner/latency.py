"""How long a served batch takes under any placement: the serving plan of ``moetuner``, priced by the judge of time.

A rank is one expert-parallel rank: ``tensor_parallel`` devices that share each token and each expert. A data sheet has
no start-up times. Two models of what travels (``traffic``):
``dispatcher``: as Megatron's, from the rank that holds the token's sequence to the experts' ranks and home again;
``paper``: as ILP 2 has it, from the ranks of a layer's experts straight to those of the next layer's.

Interpretations: batch, length, efficiency and the ranks' places are not stated in the paper. Ranks hold equal parts of
the batch; a token's pair of experts in successive layers carries 1 / k of a row in ``paper``; precision is bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from harness.placement import Placement
from harness.plan.cost import Hold, InTurn, Transfer
from harness.plan.graph import Plan, Work
from harness.plan.links import Ports
from harness.plan.machine import Machine
from harness.plan.passage import Direction
from harness.plan.priced import PricedNative
from harness.plan.priced_step import PricedServing
from harness.plan.simulate import simulate
from harness.plan.slots import Fares, FlatFares
from harness.registry import system
from harness.routing.types import Routing
from harness.specs import DTYPE_BYTES, Cluster, Dtype, Experiment, Model, Workload
from harness.system import Case
from harness.topology import Topology
from methods.moetuner.objective import crossings
from methods.moetuner.profile import Profile

DTYPE: Dtype = "bfloat16"
SYSTEM = "moetuner"
TRAFFIC = ("dispatcher", "paper")


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served where. ``efficiency``: share of the peak that GEMMs reach. ``links``: whether ranks wait for each
    other."""

    model: Model
    cluster: Cluster
    tensor_parallel: int
    efficiency: float | None = 0.5  # None: by the rows of each expert
    links: Literal["ports", "shared-ports"] = "ports"

    @functools.cached_property
    def ranks(self) -> Cluster:
        """The cluster of expert-parallel ranks."""
        *outer, inner = self.cluster.levels
        fewer = inner.model_copy(update={"size": inner.size // self.tensor_parallel})
        return self.cluster.model_copy(update={"levels": (*outer, fewer)})

    @property
    def topology(self) -> Topology:
        return Topology(self.ranks.shape)

    @functools.cached_property
    def machine(self) -> Machine:
        """Of expert-parallel ranks."""
        return Machine.data_sheet(self.cluster, self.efficiency, tensor_parallel=self.tensor_parallel, links=self.links)

    def plan(self, passages: Sequence[PricedNative]) -> Plan:
        """A pass of the whole model."""
        tokens = tuple(passages[0].case.routing.tokens)
        experiment = Experiment(
            model=self.model,
            cluster=self.ranks,
            workload=Workload(name="held-out", tokens_per_rank=tokens, generator="uniform"),
            system=SYSTEM,
            phase="prefill",
            dtype=DTYPE,
            backward=False,
        )
        return _Shared(experiment, passages, self).lay_out()


class _Shared(PricedServing):
    """With the gather and the scatter of hidden states that devices of one rank need around an attention."""

    def __init__(self, experiment: Experiment, passages: Sequence[PricedNative], served: Served):
        super().__init__(experiment, passages)
        inner_bytes_per_s = served.cluster.levels[-1].bandwidth_bytes_per_s or math.inf
        others = (served.tensor_parallel - 1) / served.tensor_parallel
        self.shared_s = 2 * self.tokens * served.model.hidden * self.width * others / inner_bytes_per_s

    def dense_work(self, layer: int, direction: Direction, task: str) -> Work:
        cost = super().dense_work(layer, direction, task).cost
        if task != "attention":
            return Work(cost)
        return Work(InTurn((*([] if cost is None else [cost]), Hold(self.shared_s))))


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """A served batch; ``passages``: of its layers, priced. Seconds are [L, G]: ``experts_s``, ``dispatch_s`` and
    ``combine_s`` until each rank has done, or sent and got, its own. ``paper`` has no combine, and no dispatch to the
    first layer."""

    served: Served
    passages: Sequence[PricedNative]

    @functools.cached_property
    def end_to_end_s(self) -> float:
        return float(simulate(self.served.plan(self.passages), self.served.machine, self.served.topology).total_s.max())

    @functools.cached_property
    def experts_s(self) -> np.ndarray:
        seconds = self.served.machine.seconds
        return np.stack([np.asarray(seconds(way.work("forward", "experts").cost)) for way in self.passages])

    @functools.cached_property
    def dispatch_s(self) -> np.ndarray:
        return self._links_s("dispatch")

    @functools.cached_property
    def combine_s(self) -> np.ndarray:
        return self._links_s("combine")

    @property
    def all_to_all_s(self) -> np.ndarray:
        return self.dispatch_s + self.combine_s

    def _links_s(self, part: str) -> np.ndarray:
        links = self.served.machine.links
        assert isinstance(links, Ports)
        none, found = np.zeros(self.served.topology.num_ranks), []
        for sent in (way.fares.cost(part, 0, 1) for way in self.passages):
            found.append(links.by_rank(sent.matrix) if isinstance(sent, Transfer) else none)
        return np.stack(found)

    def mixed(self, *, experts: Layers, exchange: Layers) -> Layers:
        """With the computation of one placement and the all-to-all of another."""
        pairs = zip(experts.passages, exchange.passages, strict=True)
        return Layers(self.served, [_sending(one, other.fares) for one, other in pairs])

    def summary(self) -> dict[str, float]:
        """Seconds: the whole, and of a layer (mean over layers) the tail over ranks and the mean over them."""
        return {
            "end_to_end_s": self.end_to_end_s,
            "experts_tail_s": float(self.experts_s.max(1).mean()),
            "experts_mean_s": float(self.experts_s.mean()),
            "a2a_tail_s": float(self.dispatch_s.max(1).mean() + self.combine_s.max(1).mean()),
            "a2a_mean_s": float(self.all_to_all_s.mean()),
        }


def serve(served: Served, ids: np.ndarray, owner: np.ndarray, traffic: str = "dispatcher") -> Layers:
    """A batch with routing ``ids`` int [L, T, k] under ``owner`` int [L, E]."""
    passages = []
    for case in _cases(served, ids, owner):
        passage = system(SYSTEM).layout(case)
        assert isinstance(passage, PricedNative)
        passages.append(passage)
    if traffic == "paper":
        num_ranks, row_bytes = served.topology.num_ranks, served.model.hidden * DTYPE_BYTES[DTYPE]
        between = crossings(Profile.of_ids(ids, owner.shape[1]), owner, num_ranks) * row_bytes / ids.shape[2]
        parts = [{}, *({"dispatch": matrix} for matrix in between)]
        passages = [_sending(way, FlatFares(part)) for way, part in zip(passages, parts, strict=True)]
    return Layers(served, passages)


def _sending(way: PricedNative, fares: Fares) -> PricedNative:
    """The same, but what it sends."""
    return PricedNative(way.case, way.schedule, way.cut, fares, way.rows)


def _cases(served: Served, ids: np.ndarray, owner: np.ndarray) -> list[Case]:
    """Of each layer: the ranks hold equal parts of the batch."""
    num_tokens, num_ranks = ids.shape[1], served.topology.num_ranks
    tokens = tuple(np.bincount(np.arange(num_tokens) * num_ranks // num_tokens, minlength=num_ranks).tolist())
    cases = []
    for layer, of in zip(ids.astype(np.int32), owner, strict=True):
        placement = Placement(of[:, None] == np.arange(num_ranks))
        routing = Routing(layer, tokens, owner.shape[1])
        cases.append(Case(served.model, DTYPE, served.topology, placement, routing, cluster=served.ranks))
    return cases


__all__ = ["TRAFFIC", "Layers", "Served", "serve"]
