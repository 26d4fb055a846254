"""Sparse collectives over arbitrary placements: SparseAllGather(P, P') and SparseReduceScatter(P', P) of chunks.

P gives every chunk one owner, P' contains P. The gather brings each chunk from its owner to all ranks that P' names;
the reduction, its transpose, sums at the owner what all of them hold (Hecate, arXiv 2502.02581, section 3).

Both go level by level (``Topology``). In each unit of a level that wants a chunk and has none, one of the ranks that
want it, its *gateway*, takes it from the chunk's gateway one level up; then it spreads one level further in. So a
chunk crosses a node link once for each destination node, only ranks that want a chunk ever hold it, and every rank
receives exactly the chunks that P' gives it beside its own: at most lambda S bytes, lambda being the part of the
chunks that travel. A reduction sums inside the node first and crosses once. Gateways of one unit take turns.

Messages are point to point (``dist.batch_isend_irecv``: on NCCL one group, on gloo receives posted before sends),
straight from and to the rows of the tensors that hold the chunks. Stage 0 goes through the job's world group, the
stages inside nodes through the node's, so that they may stand on two lanes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.handover import Handover
from harness.comm.job import Job
from harness.comm.rows import accumulator
from harness.errors import bad
from harness.topology import Topology


class Hops(NamedTuple):
    """Chunks that travel in one stage of a gather, int64 [n] each, by source, target and chunk."""

    chunk: np.ndarray
    source: np.ndarray
    target: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class SparsePlan:
    """Who sends which chunk to whom, for the gather; the reduction goes the same way back.

    ``owner`` int [E]: P. ``hosts`` bool [E, num_ranks]: P'. ``stages``: by link level, outermost first."""

    topology: Topology
    owner: np.ndarray
    hosts: np.ndarray
    stages: tuple[Hops, ...]

    def bytes(self, chunk_bytes: float, near: bool | None = None, stages: Iterable[int] | None = None) -> np.ndarray:
        """What each rank sends each in the gather, float64 [num_ranks, num_ranks]; of the reduction the transpose.
        ``near``: of the near hops alone, or of the others; ``stages``: of these alone."""
        found = np.zeros((self.topology.num_ranks,) * 2)
        for stage in range(len(self.stages)) if stages is None else stages:
            hops = self.stages[stage]
            wanted = slice(None) if near is None else self.near(stage) == near
            np.add.at(found, (hops.source[wanted], hops.target[wanted]), float(chunk_bytes))
        return found

    @property
    def sparsity(self) -> float:
        """lambda: the part of the chunks that some rank needs from another."""
        return float((self.hosts.sum(1) > 1).mean()) if len(self.hosts) else 0.0

    @functools.cached_property
    def _of_rank(self) -> dict[tuple[int, int, bool | None], tuple[Hops, Hops]]:
        return {}

    def near(self, stage: int) -> np.ndarray:
        """Which hops of ``stage`` are of chunks whose owner is in the node, so that nothing need have come from
        another, bool [n]."""
        node, hops = self.topology.unit_of(0), self.stages[stage]
        return node[self.owner[hops.chunk]] == node[hops.target]

    def travels(self, stage: int, near: bool | None = None) -> bool:
        """Whether anything does; ``near``: among the near hops, or the others."""
        return bool(len(self.stages[stage].chunk)) and (near is None or bool((self.near(stage) == near).any()))

    def of_rank(self, rank: int, stage: int, near: bool | None = None) -> tuple[Hops, Hops]:
        """What ``rank`` sends and what it receives in ``stage`` of the gather; of the ``near`` hops or of the others
        alone, None: of all."""
        key = (rank, stage, near)
        if key not in self._of_rank:
            hops = self.stages[stage]
            wanted = np.ones(len(hops.chunk), dtype=bool) if near is None else self.near(stage) == near
            self._of_rank[key] = tuple(_where(hops, wanted & (end == rank)) for end in (hops.source, hops.target))  # type: ignore[assignment]
        return self._of_rank[key]


def plan_sparse(owner: np.ndarray, hosts: np.ndarray, topology: Topology) -> SparsePlan:
    """``owner`` int [E], ``hosts`` bool [E, num_ranks] with every owner in it. Plans are kept for as long as they are
    in use again and again."""
    owner, hosts = np.ascontiguousarray(owner, dtype=np.int64), np.ascontiguousarray(hosts, dtype=bool)
    if hosts.shape != (len(owner), topology.num_ranks):
        raise bad("placement", hosts.shape, f"must be [{len(owner)} chunks, {topology.num_ranks} ranks]")
    away = np.flatnonzero(~hosts[np.arange(len(owner)), owner])
    if len(away):
        raise bad("placement", int(away[0]), f"is a chunk that its owner, rank {owner[away[0]]}, does not keep")
    return _planned(owner.tobytes(), np.packbits(hosts).tobytes(), topology)


@functools.lru_cache(maxsize=256)
def _planned(owner_bytes: bytes, packed: bytes, topology: Topology) -> SparsePlan:
    num_ranks = topology.num_ranks
    owner = np.frombuffer(owner_bytes, dtype=np.int64)
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=len(owner) * num_ranks)
    hosts = bits.reshape(len(owner), num_ranks).astype(bool)
    gateway, stages = owner[:, None], []  # [E, units of the level above]; at first all ranks are one unit
    for level in range(topology.num_levels):
        units = topology.num_units(level)
        inner = num_ranks // units
        above = np.repeat(gateway, units // gateway.shape[1], axis=1)  # [E, units]
        inside = above // inner == np.arange(units)  # the chunk is in the unit already
        wanted = hosts.reshape(len(owner), units, inner)
        count = wanted.sum(2)
        enters = ~inside & (count > 0)
        # Who takes it in: those who want it, by turns over the chunks that enter the unit.
        turn = (np.cumsum(enters, axis=0) - 1) % np.maximum(count, 1)
        nth = np.cumsum(wanted, axis=2, dtype=np.int32) - 1 == turn[..., None]
        here = (nth & wanted).argmax(2) + np.arange(units) * inner
        gateway = np.where(enters, here, above)
        chunk, unit = np.nonzero(enters)
        source, target = above[chunk, unit], here[chunk, unit]
        order = np.lexsort((chunk, target, source))
        stages.append(Hops(chunk[order], source[order], target[order]))
    return SparsePlan(topology, owner, hosts, tuple(stages))


def _where(hops: Hops, mask: np.ndarray) -> Hops:
    return Hops(*(each[mask] for each in hops))


class Chunks(NamedTuple):
    """Where one rank keeps its chunks: ``tensors`` [rows, ...] each, together one chunk a row, and the chunk of each of
    their rows. A rank's chunks may lie in several of these (its own, and copies)."""

    ids: Sequence[int]
    tensors: Sequence[torch.Tensor]


class Transfer(Handover):
    """One gather or reduction on one rank, in stages. ``run(stage)`` is a task of a lane; ``start`` begins all of it
    and ``wait`` ends it, for whoever has no lanes. Collective: every rank goes through all stages in the same order.

    ``held``: everything that the rank holds of P' (gather: its own filled; reduction: all filled). A gather fills the
    other rows; a reduction adds to its own, in the accumulator's format, and leaves partial sums in those of gateways.
    Memory is written behind autograd's back.
    """

    def __init__(
        self, job: Job, plan: SparsePlan, held: Iterable[Chunks], kind: Literal["gather", "reduce"] = "gather"
    ):
        self.job, self.plan, self.kind = job, plan, kind
        held = list(held)
        self.tensors = [[tensor.data for tensor in each.tensors] for each in held]
        self.place = {int(chunk): (part, row) for part, each in enumerate(held) for row, chunk in enumerate(each.ids)}
        self._issued: _Issued | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """Stages in the order in which they run; stage i crosses links of level i."""
        stages = range(len(self.plan.stages))
        return tuple(stages if self.kind == "gather" else reversed(stages))

    def run(self, *stages: int, near: bool | None = None) -> None:
        """These stages, one after another, to the end. A gather's ``near`` hops may go before stage 0 or beside it."""
        for stage in stages:
            self._finish(self._issue(stage, near))

    def sent_bytes(self, stages: Iterable[int], near: bool | None = None) -> int:
        """By this rank in these ``stages`` of a gather."""
        num_chunks = sum(len(self.plan.of_rank(self.job.rank, stage, near)[0].chunk) for stage in stages)
        return num_chunks * sum(tensor.shape[1:].numel() * tensor.element_size() for tensor in self.tensors[0])

    def start(self) -> Transfer:
        """Set the first stage off and return; ``wait`` does the rest."""
        self._issued = self._issue(self.order[0], None)
        return self

    def wait(self) -> None:
        assert self._issued is not None
        self._finish(self._issued)
        self._issued = None
        self.run(*self.order[1:])

    def _issue(self, stage: int, near: bool | None) -> _Issued:
        """Post the messages of ``stage``."""
        group = self.job.world if stage == 0 else self.job.inner(0)
        number = self.job.members  # of each rank, by which communicators know it
        sends, receives = self.plan.of_rank(self.job.rank, stage, near)
        to, come_from = sends.target, receives.source
        if self.kind == "reduce":  # the same hops backwards
            sends, receives, to, come_from = receives, sends, receives.source, sends.target
        work: list[dist.P2POp] = []
        arriving: dict[int, list[list[torch.Tensor]]] = {}
        row_of = self._row_of()
        for chunk, peer in zip(receives.chunk.tolist(), come_from.tolist(), strict=True):
            target = row_of(chunk)
            if self.kind == "reduce":
                target = [torch.empty_like(row) for row in target]
                arriving.setdefault(chunk, []).append(target)
            work += [dist.P2POp(dist.irecv, row, number[peer], group) for row in target]
        for chunk, peer in zip(sends.chunk.tolist(), to.tolist(), strict=True):
            work += [dist.P2POp(dist.isend, row, number[peer], group) for row in row_of(chunk)]
        return _Issued(dist.batch_isend_irecv(work) if work else [], arriving)

    def _finish(self, issued: _Issued) -> None:
        """Wait for what was issued; a reduction adds what came, in the order of the ranks that sent it."""
        for work in issued.works:
            work.wait()
        row_of = self._row_of()
        for chunk, parts in issued.arriving.items():
            for into, *more in zip(row_of(chunk), *parts, strict=True):
                wide = accumulator(into.dtype)
                if wide == into.dtype:
                    for each in more:
                        into += each
                else:
                    into.copy_(torch.stack([into, *more]).sum(0, dtype=wide))

    def _row_of(self) -> Callable[[int], list[torch.Tensor]]:
        """Where this lane finds a chunk."""
        tensors, place = self.tensors, self.place

        def row_of(chunk: int) -> list[torch.Tensor]:
            part, row = place[chunk]
            return [tensor[row] for tensor in tensors[part]]

        return row_of


class _Issued(NamedTuple):
    works: list[dist.Work]
    arriving: dict[int, list[list[torch.Tensor]]]  # by chunk: what is to be added to it
