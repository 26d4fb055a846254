"""How long a served batch takes, layer by layer: computation of experts, and the links, for any placement.

A rank is one expert-parallel rank: ``tensor_parallel`` devices that share each token and each expert. The model has no
start-up times and nothing overlaps, as in Megatron-LM's layer: attention, dispatch, experts, combine.

- experts: the larger of FLOPs over ``efficiency`` of the peak, and reading the weights of experts in use once.
- all-to-all: bytes through the busiest of what a rank's tokens cross: its own port at the inner link's rate and, if
  they leave the node, the node's port that all its ranks share. Two models of what travels (``traffic``):
  ``dispatcher``: as Megatron's, from the rank that holds the token's sequence to the experts' ranks and home again;
  ``paper``: as ILP 2 has it, from the ranks of a layer's experts straight to those of the next layer's.
- attention and its tensor-parallel collectives: the same on all ranks.

Interpretations: batch, length, efficiency and the ranks' places are not stated in the paper. Ranks hold equal parts of
the batch; a token's pair of experts in successive layers carries 1 / k of a row in ``paper``; precision is bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from harness.layer.work import attention_macs, expert_products, kv_fraction
from harness.plan.cost import Compute, Experts, Hold, Transfer
from harness.plan.graph import COMPUTE, INTER, Plan
from harness.plan.links import Ports
from harness.plan.machine import Machine
from harness.plan.simulate import simulate
from harness.specs import Cluster, Model
from harness.topology import Topology
from methods.moetuner.objective import crossings
from methods.moetuner.profile import Profile

ELEMENT_BYTES = 2  # bfloat16
TRAFFIC = ("dispatcher", "paper")


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served where. ``efficiency``: share of the peak that GEMMs reach. ``links``: whether ranks wait for each
    other (``simulated_s`` alone asks)."""

    model: Model
    cluster: Cluster
    tensor_parallel: int
    efficiency: float | None = 0.5  # None: by the rows of each expert
    links: Literal["ports", "shared-ports"] = "ports"

    @property
    def topology(self) -> Topology:
        """Of expert-parallel ranks."""
        *outer, inner = self.cluster.shape
        return Topology((*outer, inner // self.tensor_parallel))

    @functools.cached_property
    def machine(self) -> Machine:
        """Of expert-parallel ranks."""
        return Machine.data_sheet(self.cluster, self.efficiency, tensor_parallel=self.tensor_parallel, links=self.links)

    def experts(self, rows: np.ndarray) -> Compute:
        """``rows`` [..., E], with 0 where an expert is elsewhere."""
        return Compute.of(Experts(rows, expert_products(self.model), ELEMENT_BYTES))

    def experts_s(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` [L, E] with 0 where an expert is elsewhere -> seconds [L]."""
        return np.asarray(self.machine.seconds(self.experts(rows)))

    def links_s(self, matrix: np.ndarray) -> np.ndarray:
        """Bytes from rank to rank [G, G] -> seconds [G] until each rank has sent and got its own."""
        assert isinstance(self.machine.links, Ports)
        return self.machine.links.by_rank(matrix)

    def attention_s(self, tokens: int) -> float:
        """Of one layer and ``tokens`` of a rank, with the tensor-parallel gather and scatter of their hidden states."""
        model, inner = self.model, self.cluster.levels[-1].bandwidth_bytes_per_s
        macs = attention_macs(model.hidden, tokens, model.seq, causal=True, kv_fraction=kv_fraction(model))
        shared = 2 * tokens * model.hidden * ELEMENT_BYTES * (self.tensor_parallel - 1) / self.tensor_parallel
        return float(self.machine.seconds(Compute(macs))) + shared / (inner or math.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """Seconds of each layer on each rank, [L, G]; ``paper`` has no combine, and no dispatch to the first layer."""

    attention_s: float
    experts_s: np.ndarray
    dispatch_s: np.ndarray
    combine_s: np.ndarray

    @property
    def all_to_all_s(self) -> np.ndarray:
        return self.dispatch_s + self.combine_s

    @property
    def end_to_end_s(self) -> float:
        """A step of each layer costs what its slowest rank costs."""
        steps = (self.dispatch_s, self.experts_s, self.combine_s)
        return len(self.experts_s) * self.attention_s + float(sum(step.max(1).sum() for step in steps))

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
    num_layers, num_tokens, top_k = ids.shape
    num_ranks, num_experts = served.topology.num_ranks, owner.shape[1]
    row_bytes = served.model.hidden * ELEMENT_BYTES
    rows = _computed(served, ids, owner)
    experts = np.stack([served.experts_s(rows[:, :, rank]) for rank in range(num_ranks)], axis=1)
    dispatch, combine = np.zeros((num_layers, num_ranks)), np.zeros((num_layers, num_ranks))
    if traffic == "paper":
        between = crossings(Profile.of_ids(ids, num_experts), owner, num_ranks) * row_bytes / top_k
        for layer, matrix in enumerate(between, start=1):
            dispatch[layer] = served.links_s(matrix)
    else:
        for layer, matrix in enumerate(_dispatched(served, ids, owner)):
            dispatch[layer], combine[layer] = served.links_s(matrix), served.links_s(matrix.T)
    return Layers(served.attention_s(num_tokens // num_ranks), experts, dispatch, combine)


def simulated_s(served: Served, ids: np.ndarray, owner: np.ndarray) -> float:
    """Seconds of the batch of ``serve`` as a plan. With ``links="ports"`` they are ``end_to_end_s``: all ranks wait for
    the last at every step. With ``shared-ports`` a rank computes as soon as its own rows are there."""
    plan = Plan()
    last: list[str] = []
    attention = Hold(served.attention_s(ids.shape[1] // served.topology.num_ranks))
    rows = _computed(served, ids, owner)
    for i, matrix in enumerate(_dispatched(served, ids, owner)):
        last = [plan.add(f"layer{i}.attention", COMPUTE, last, attention)]
        last = [plan.add(f"layer{i}.dispatch", INTER, last, Transfer("a2a", "flat", matrix))]
        last = [plan.add(f"layer{i}.experts", COMPUTE, last, served.experts(rows[i].T))]
        last = [plan.add(f"layer{i}.combine", INTER, last, Transfer("a2a", "flat", matrix.T))]
    return float(simulate(plan, served.machine, served.topology).total_s.max())


def _computed(served: Served, ids: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Rows of each expert where it is, int [L, E, G]."""
    load = np.stack([np.bincount(layer.ravel(), minlength=owner.shape[1]) for layer in ids])
    return load[:, :, None] * (owner[:, :, None] == np.arange(served.topology.num_ranks))


def _dispatched(served: Served, ids: np.ndarray, owner: np.ndarray) -> Iterator[np.ndarray]:
    """Of each layer the bytes from each token's home to its experts, [G, G]."""
    num_tokens, num_ranks = ids.shape[1], served.topology.num_ranks
    home = np.arange(num_tokens) * num_ranks // num_tokens
    for layer, of in zip(ids, owner, strict=True):
        pairs = home[:, None] * num_ranks + of[layer]
        rows = np.bincount(pairs.ravel(), minlength=num_ranks**2).reshape(num_ranks, -1)
        yield rows * float(served.model.hidden * ELEMENT_BYTES)
