"""What FSMoE's layer moves and computes (arXiv 2501.10714, sections 3 and 4): capacity slots [E, C, M] through the
shards of experts, and what each of its tasks costs.

Chunk c of the capacity goes through five tasks: all-to-all across nodes (dispatch), all-gather in the node, the expert
shards, reduce-scatter in the node, all-to-all back (combine). Backward walks the same five: the transpose of a
reduce-scatter is an all-gather and the other way round. Of whole experts there are three.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from harness.layer import gates
from harness.layer.work import ATTENTION_GEMMS, attention_macs, expert_products
from harness.plan.cost import Compute, Cost, Even, Experts, Hold, InTurn, Operation, Transfer
from harness.plan.graph import Work
from harness.plan.layouts import NativeTasks
from harness.plan.passage import Direction
from harness.plan.schedule import Bound
from harness.routing.certificate import expert_counts
from harness.routing.types import Routing
from harness.specs import DTYPE_BYTES, EXPERTS_CHOOSE, GEMMS
from harness.system import Case
from methods.fsmoe.costs import attention_gradient_elements

#: of a gradient all-reduce, as ``Passage.slices``
Slices = tuple[Work | None, Work | None, Work | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes:
    """What a whole layer moves and computes in one direction, on one rank; numbers, or arrays over a grid of layers."""

    slot_bytes: Any  # of one rank's capacity slots: its buffer of one all-to-all
    num_local: int  # ranks of a node, N_ESP: the all-gather's buffer is so many times larger
    macs: Any  # multiply-adds of one rank's expert shards
    gemms: Any  # one after another per chunk
    scope: str = "inter"  # of the all-to-all; with ``flat`` nothing is sharded and num_local is 1
    #: stages of the all-to-all that is not one collective, one after another, with all that it moves; it may be none
    stages: tuple[Even | Transfer, ...] | None = None
    rows: Experts | None = None  # of all chunks
    summed_bytes: Any = 0.0  # that each rank adds up of what comes home, where no collective does
    #: stand-in: the experts are a timed wait instead, of a start-up per chunk and so many seconds for the whole layer
    wait_s: tuple[Any, Any] | None = None

    @classmethod
    def both(
        cls, slots: Any, ffn: Any, gemms: Any, element_bytes: int, num_local: int, **more: Any
    ) -> tuple[Sizes, Sizes]:
        """Forward and backward of ``slots`` elements of capacity on each rank, through experts of ``ffn`` whose shards
        are on ``num_local`` ranks: so many ranks' slots through one part of so many of the FFN. Backward computes two
        products (of input and of weight gradient) per forward one."""
        macs = slots * ffn * gemms
        forward = cls(slots * element_bytes, num_local, macs, gemms, **more)
        return forward, dataclasses.replace(forward, macs=2 * macs, gemms=2 * gemms)

    def chunk_wait_s(self, degree: int) -> Any:
        """Seconds of the stand-in for one chunk's experts."""
        assert self.wait_s is not None
        return self.wait_s[0] + self.wait_s[1] / degree

    def hop(self, hop: int, operation: Operation, degree: int) -> Cost | None:
        """Of one of ``degree`` chunks; ``operation``: of the hop inside the node."""
        if hop:
            gathered = self.slot_bytes * self.num_local / degree
            return Even(operation, "intra", gathered) if self.num_local > 1 else None
        if self.stages is None:
            summed = self.summed_bytes / degree if operation == "rs" else 0.0
            return Even("a2a", self.scope, self.slot_bytes / degree, summed_bytes=summed)
        return InTurn(tuple(_part(stage, degree) for stage in self.stages)) if self.stages else None

    def experts(self, degree: int) -> Cost:
        """Of one of ``degree`` chunks."""
        if self.wait_s is not None:
            return Hold(self.chunk_wait_s(degree))
        if self.rows is None:
            return Compute(self.macs / degree, self.gemms)
        of_chunk = Compute.of(dataclasses.replace(self.rows, rows=self.rows.rows / degree))
        return dataclasses.replace(of_chunk, macs=self.macs / degree, launches=self.gemms)


def _part(stage: Even | Transfer, degree: int) -> Even | Transfer:
    if isinstance(stage, Even):
        return dataclasses.replace(stage, num_bytes=stage.num_bytes / degree)
    return dataclasses.replace(stage, matrix=stage.matrix / degree)


class SlotTasks(NativeTasks):
    """All buffers are alike, so nobody is told of them."""

    num_hops = 2
    tells = False

    def called(self, direction: Direction, way: Bound, hop: int) -> str:
        return (("dispatch", "gather"), ("combine", "scatter"))[way == "home"][hop]


class PricedSlots(SlotTasks):
    """``sizes``: of forward and of backward."""

    sizes: dict[Direction, Sizes]

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        sizes = self.sizes[direction]
        if task == "experts":
            return Work(sizes.experts(self.cut.batches(direction)))
        return Work(sizes.hop(part[0], "ag" if task == "out" else "rs", self.cut.degree(direction)))


# ------------------------------------------------------------------------------------------------------- of one layer


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """One generalized layer on one rank: what it moves and computes, and seconds of its dense part where that is a
    stand-in."""

    forward: Sizes
    backward: Sizes
    dense_s: tuple[float, float]
    gradient_bytes: int


def layer_sizes(case: Case, capacity: int) -> LayerSizes:
    """Sizes of a case with ``capacity`` slots an expert and rank; its stand-ins priced by the cluster's gemm."""
    model, topology = case.model, case.topology
    num_local = topology.num_ranks // topology.shape[0]
    num_esp, scope = (num_local, "inter") if sharded(case) else (1, "flat")
    gemms = 0 if case.identity_experts else GEMMS[model.ffn_type]
    slots, width = model.num_experts * capacity * model.hidden, DTYPE_BYTES[case.dtype]
    stages = _stages(case, float(slots * width))
    forward, backward = Sizes.both(slots, model.ffn, gemms, width, num_esp, scope=scope, stages=stages)
    gradient_bytes = int(case.options.get("gradient_bytes", 0)) // width * width
    if not case.stand_in:
        forward, backward = (
            dataclasses.replace(each, rows=_rows(case, capacity, num_esp, times))
            for each, times in ((forward, 1), (backward, 2))
        )
        return LayerSizes(forward, backward, (0.0, 0.0), gradient_bytes)
    assert case.cluster is not None
    alpha, beta = case.cluster.linear("gemm")
    forward, backward = (
        dataclasses.replace(sizes, wait_s=(sizes.gemms * alpha, sizes.macs * beta)) for sizes in (forward, backward)
    )
    tokens = max(case.routing.tokens) * num_local  # of a node
    attention = float(attention_macs(model.hidden, tokens, model.seq, causal=False)) / num_local
    if "gradient_bytes" not in case.options:
        gradient_bytes = int(attention_gradient_elements(model.hidden, num_local)) * width
    forward_s = ATTENTION_GEMMS * alpha + attention * beta
    return LayerSizes(forward, backward, (forward_s, 2 * forward_s), gradient_bytes)


def _rows(case: Case, capacity: int, num_esp: int, times: int) -> Experts | None:
    """On every rank alike: slots of all ranks through a share of its own experts."""
    if case.identity_experts:
        return None
    num_ranks, model = case.topology.num_ranks, case.model
    num_own = model.num_experts * num_esp // num_ranks
    shard = model.model_copy(update={"ffn": model.ffn // num_esp})
    rows = np.full((1, num_own), float(num_ranks * capacity))
    return Experts(rows, expert_products(shard) * times, DTYPE_BYTES[case.dtype])


def _stages(case: Case, slot_bytes: float) -> tuple[Even | Transfer, ...] | None:
    """Of an all-to-all over all ranks (``methods.fsmoe.slots``), or over one node, where shards send nothing. None: it
    is one collective."""
    nodes, num_ranks = case.topology.shape[0], case.topology.num_ranks
    num_local, algorithm = num_ranks // nodes, case.options.get("all_to_all", "flat")
    if sharded(case):
        return None if nodes > 1 else ()
    if algorithm == "2dh" and num_local > 1:
        return Even("a2a", "intra", slot_bytes), *([Even("a2a", "inter", slot_bytes)] if nodes > 1 else [])
    if algorithm == "1dh" and num_local > 1:
        node, leads = case.topology.unit_of(0), np.arange(num_ranks) % num_local == 0
        same = node[:, None] == node
        there = (same & ~leads[:, None] & leads) * slot_bytes
        across = (~same & leads[:, None] & leads) * (slot_bytes * num_local / nodes)
        return Transfer("a2a", "intra", there), Transfer("a2a", "inter", across), Transfer("a2a", "intra", there.T)
    return None


def planned_capacity(case: Case, routing: Routing, multiple: int = 1) -> int:
    """Slots an expert and rank that the case's routing will need, as ranks find out by an all-reduce, padded to a
    ``multiple`` as the authors' code does."""
    model, most = case.model, int(expert_counts(routing).max())
    allowed = max(gates.capacity(model, count) for count in case.routing.tokens)
    if model.gate in EXPERTS_CHOOSE:
        most = allowed
    elif model.capacity_factor is not None:
        most = min(most, allowed)
    return -(-max(1, most) // multiple) * multiple


def sharded(case: Case) -> bool:
    """Whether experts are cut over the ranks of a node, or whole on one rank each."""
    return case.options.get("experts", "sharded") == "sharded"
