"""FSMoE's schedule of one MoE layer, forward or backward, and those of its rivals (arXiv 2501.10714, sections 3 and 4).

Chunk c of the capacity goes through five tasks: all-to-all across nodes (dispatch), all-gather in the node, the expert
shards, reduce-scatter in the node, all-to-all back (combine). Backward walks the same five: the transpose of a
reduce-scatter is an all-gather and the other way round. FSMoE's lanes ``inter`` and ``intra`` work side by side; in a
schedule without that overlap (``overlap=False``: Tutel, PipeMoE, FSMoE-No-IIO) all communication shares ``inter``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

from harness.plan.cost import Compute, Even, Experts, Hold, InTurn, Operation, Transfer
from harness.plan.graph import COMPUTE, INTER, INTRA, Plan, Work


class Walk(Protocol):
    """The work of one layer in one direction, by chunk 0 .. degree - 1."""

    @property
    def degree(self) -> int: ...
    def dispatch(self, chunk: int) -> Work: ...
    def gather(self, chunk: int) -> Work: ...
    def experts(self, chunk: int) -> Work: ...
    def scatter(self, chunk: int) -> Work: ...
    def combine(self, chunk: int) -> Work: ...


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
    experts: Experts | None = None  # rows of all chunks
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


class Priced:
    """A walk that is only priced: equal chunks of ``sizes``."""

    def __init__(self, sizes: Sizes, degree: int):
        self.sizes, self.degree = sizes, degree

    def dispatch(self, chunk: int) -> Work:
        sizes = self.sizes
        if sizes.stages is None:
            return Work(Even("a2a", sizes.scope, sizes.slot_bytes / self.degree))
        return Work(InTurn(tuple(_part(stage, self.degree) for stage in sizes.stages)) if sizes.stages else None)

    def gather(self, chunk: int) -> Work:
        return self._inside("ag")

    def experts(self, chunk: int) -> Work:
        if self.sizes.wait_s is not None:
            return Work(Hold(self.sizes.chunk_wait_s(self.degree)))
        sizes, whole = self.sizes, Compute(self.sizes.macs / self.degree, self.sizes.gemms)
        if sizes.experts is None:
            return Work(whole)
        of_chunk = Compute.of(dataclasses.replace(sizes.experts, rows=sizes.experts.rows / self.degree))
        return Work(dataclasses.replace(of_chunk, macs=whole.macs, launches=whole.launches))

    def scatter(self, chunk: int) -> Work:
        return self._inside("rs")

    def combine(self, chunk: int) -> Work:
        return self.dispatch(chunk)

    def _inside(self, operation: Operation) -> Work:
        gathered = self.sizes.slot_bytes * self.sizes.num_local / self.degree
        return Work(Even(operation, "intra", gathered) if self.sizes.num_local > 1 else None)


def _part(stage: Even | Transfer, degree: int) -> Even | Transfer:
    if isinstance(stage, Even):
        return dataclasses.replace(stage, num_bytes=stage.num_bytes / degree)
    return dataclasses.replace(stage, matrix=stage.matrix / degree)


def moe(
    plan: Plan,
    walk: Walk,
    *,
    overlap: bool = True,
    prefix: str = "",
    after: Iterable[str] = (),
    gradients: Work | None = None,
) -> list[str]:
    """Add one layer's tasks; returns the names of the last ones. ``gradients``: a slice of the gradient all-reduce,
    which goes on the inter lane between the dispatches and the combines (section 5, Fig. 3d).

    Interpretation: on one lane a chunk's combine follows its own reduce-scatter, so that the last chunk alone trails;
    the authors' code puts all combines after all reduce-scatters, which costs their rivals the difference.
    """
    intra = INTRA if overlap else INTER
    after = tuple(after)

    def add(what: str, lane: str, waits: Iterable[str], work: Work) -> str:
        return plan.add(f"{prefix}{what}", lane, waits, work.cost, work.run)

    gathered = []
    for c in range(walk.degree):
        sent = add(f"dispatch[{c}]", INTER, after, walk.dispatch(c))
        gathered.append(add(f"gather[{c}]", intra, [sent], walk.gather(c)))
    if gradients is not None:
        add("gradients", INTER, after, gradients)
    computed = [add(f"experts[{c}]", COMPUTE, [gathered[c]], walk.experts(c)) for c in range(walk.degree)]
    home = []
    for c in range(walk.degree):
        scattered = add(f"scatter[{c}]", intra, [computed[c]], walk.scatter(c))
        if not overlap:
            home.append(add(f"combine[{c}]", INTER, [scattered], walk.combine(c)))
    if overlap:
        home = [add(f"combine[{c}]", INTER, [f"{prefix}scatter[{c}]"], walk.combine(c)) for c in range(walk.degree)]
    return home
