"""What a trace holds: one Parquet file, one row per (step, layer), header as JSON in the schema's metadata. Written and
read as a stream: a row group holds a step, or a few; a reader takes what it is asked for.

Columns (``docs/traces.md`` says more):

    step, layer   int64, int32
    num_tokens    int32
    loss          float64   held-out, nats per token, NaN if unknown
    ranks         list of int32   tokens of each rank, rank 0's first; null where they are not told
    ids           bytes     [T, k], best expert first: uint8, or little-endian uint16 above 256 experts; null in a trace
                            of kind ``counts``, whose tokens are drawn when they are read (``harness.routing.loops``)
    weights       bytes     [T, k], uint8 (gate weight = value / 255 * header.weight_scale) or little-endian float32
                            (``header.weight_dtype``); null where none are known
    counts        bytes     [R, E], little-endian int32: assignments of each rank's tokens to each expert, R = 1 where
                            ranks are not told
    payload       bytes     16: of the SHA-256 of ids and weights
    digest        bytes     16: of the SHA-256 of the row but for ids and weights, and of the digest before it; the
                            first follows the header

Schema 1 has neither ranks nor counts, nor digests by row. Reading executes nothing of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from harness.routing.checked import FEW
from harness.specs import Count, Spec

SCHEMA_VERSION = 2
HEADER_KEY = b"moebench.trace"
DIGEST_KEY = b"moebench.digest"  # of schema 1, in the metadata, beside the header; the oldest traces have none
FIRST_COLUMNS = {  # of schema 1
    "step": pa.int64(),
    "layer": pa.int32(),
    "num_tokens": pa.int32(),
    "loss": pa.float64(),
    "ids": pa.binary(),
    "weights": pa.binary(),
}
COLUMNS = {
    **FIRST_COLUMNS,
    "ranks": pa.list_(pa.int32()),
    "counts": pa.binary(),
    "payload": pa.binary(),
    "digest": pa.binary(),
}
HEAVY = ("ids", "weights")


class Header(Spec):
    """What a trace is of and how it was made."""

    schema_version: Count = SCHEMA_VERSION
    model: str
    num_experts: Annotated[int, Field(ge=1, le=65536)]
    top_k: Count
    num_layers: Count  # with an MoE layer
    corpus: str  # what text the tokens are from
    command: str  # that made the trace
    date: str  # ISO 8601, UTC
    weight_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    weight_dtype: Literal["u1", "<f4"] = "u1"
    kind: Literal["tokens", "counts"] = "tokens"  # what the file holds of each layer
    seed: Annotated[int, Field(ge=0)] = 0  # of the tokens that are drawn from counts
    rule: str = ""  # by which they are
    source: dict[str, str] = {}  # what was imported: file, sha256, format, version
    details: dict[str, str | int | float] = {}  # seed, threads, versions, ...

    @property
    def ids_dtype(self) -> np.dtype[Any]:
        return np.dtype("u1" if self.num_experts <= 256 else "<u2")


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """Routing of one layer at one step: ids [T, k] best first, gate weights float32 [T, k], or [0, k] where none are
    known. ``ranks``: tokens of each rank, where they are told; ``counts``: int [R, E], which a trace of kind
    ``counts`` is written from."""

    step: int
    layer: int
    ids: np.ndarray
    weights: np.ndarray
    loss: float
    ranks: tuple[int, ...] | None = None
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int64))

    @classmethod
    def of_counts(
        cls, step: int, layer: int, counts: np.ndarray, *, told: bool, top_k: int, loss: float = np.nan
    ) -> Recorded:
        """``counts`` [R, E]; ``told``: whether its rows are ranks, else R = 1."""
        none = np.zeros((0, top_k))
        ranks = None
        if told and counts.ndim == 2 and np.isfinite(counts.sum(1)).all():
            ranks = tuple(int(total) // top_k for total in counts.sum(1))
        return cls(step, layer, none, none, loss, ranks, counts)


def counts_of_ids(ids: np.ndarray, ranks: tuple[int, ...] | None, num_experts: int) -> np.ndarray:
    """Assignments of each rank's tokens to each expert, int64 [R, E]; R = 1 where ranks are not told."""
    tokens = (len(ids),) if ranks is None else ranks
    if ids.size > FEW:
        from harness.routing.loops import count

        return np.asarray(count(np.ascontiguousarray(ids), np.array(tokens, np.int64), num_experts))
    parts = np.split(ids, np.cumsum(tokens)[:-1])
    return np.stack([np.bincount(part.ravel(), minlength=num_experts) for part in parts])


def fields_of(step: int, layer: int, num_tokens: int, loss: float, ranks: Sequence[int] | None) -> list[bytes]:
    return [repr((step, layer, num_tokens, loss, None if ranks is None else list(map(int, ranks)))).encode()]


def digest_of(*parts: bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()[:16]
