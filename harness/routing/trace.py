"""Recorded routing on disk: one Parquet file, one row per (step, layer), header as JSON in the schema's metadata.

Columns: ``step``, ``layer``, ``num_tokens``, ``loss`` (held-out, nats per token, NaN if unknown) and, as raw bytes in
[T, k] order with the best expert first, ``ids`` (uint8, or little-endian uint16 above 256 experts) and ``weights``
(uint8; gate weight = value / 255 * header.weight_scale). Reading executes nothing of the file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from harness import outputs
from harness.errors import UserError, bad, unreadable
from harness.specs import Count, Model, Spec, Workload
from harness.topology import Topology

SCHEMA_VERSION = 1
WINDOW = 128  # tokens that follow one another in a recording, where its header does not say
HEADER_KEY = b"moebench.trace"
DIGEST_KEY = b"moebench.digest"  # in the metadata, beside the header; older traces have none
SHIPPED = Path(__file__).resolve().parents[2] / "results" / "traces"
COLUMNS = {
    "step": pa.int64(),
    "layer": pa.int32(),
    "num_tokens": pa.int32(),
    "loss": pa.float64(),
    "ids": pa.binary(),
    "weights": pa.binary(),
}


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
    details: dict[str, str | int | float] = {}  # seed, threads, versions, ...

    @property
    def ids_dtype(self) -> np.dtype[Any]:
        return np.dtype("u1" if self.num_experts <= 256 else "<u2")


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """Routing of one layer at one step: ids [T, k] best first, gate weights float32 [T, k]."""

    step: int
    layer: int
    ids: np.ndarray
    weights: np.ndarray
    loss: float


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """A trace in memory."""

    path: Path
    header: Header
    rows: dict[tuple[int, int], Recorded]  # by (step, layer)

    @property
    def steps(self) -> list[int]:
        return sorted({step for step, _ in self.rows})

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, layer in self.rows})


# ---- write and read ----------------------------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """Fail now and not after minutes of work. Errors: a folder that cannot be written to, a folder as ``path``, a file
    that is there and no trace."""
    outputs.check(path, is_ours=lambda there: HEADER_KEY in there.read_bytes())


def write_trace(path: Path, header: Header, rows: Sequence[Recorded]) -> None:
    """Write the whole file or nothing. Errors: a folder that cannot be written to, rows that ``read_trace`` would not
    take (``check_row``), weights that are no numbers of 0 to ``header.weight_scale``."""
    data: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    seen: set[tuple[int, int]] = set()
    for row in rows:
        check_row(row, header, seen)
        if not ((row.weights >= 0) & (row.weights <= header.weight_scale * (1 + 1e-6))).all():  # so is NaN
            where = f"trace: step {row.step}, layer {row.layer}: weights"
            wrong = row.weights[~((row.weights >= 0) & (row.weights <= header.weight_scale * (1 + 1e-6)))][0]
            raise bad(where, float(wrong), f"must lie in 0..{header.weight_scale} (header.weight_scale)")
        quantised = np.rint(row.weights / header.weight_scale * 255).clip(0, 255).astype("u1")
        fields = (int(row.step), int(row.layer), len(row.ids), float(row.loss))
        for name, value in zip(
            COLUMNS, (*fields, row.ids.astype(header.ids_dtype).tobytes(), quantised.tobytes()), strict=True
        ):
            data[name].append(value)
    text = header.model_dump_json().encode()
    table = pa.table(data, schema=pa.schema(COLUMNS))
    table = table.replace_schema_metadata({HEADER_KEY: text, DIGEST_KEY: _digest(text, table).encode()})
    with outputs.whole(path) as file:
        pq.write_table(
            table, file, compression="zstd", compression_level=19, use_dictionary=False, write_page_checksum=True
        )


def check_row(row: Recorded, header: Header, seen: set[tuple[int, int]]) -> None:
    """``UserError`` naming step and layer for what is no routing of ``header``'s model: ids that are not whole, out of
    range or twice in a token, wrong shapes, a step and layer that are ``seen`` (which is added to) already."""
    where = f"trace: step {row.step}, layer {row.layer}"
    for name, value, least, most in (("step", row.step, 0, None), ("layer", row.layer, 0, header.num_layers - 1)):
        if value != int(value) or value < least or (most is not None and value > most):
            of = "" if most is None else f" {value} of {header.num_layers}"
            raise bad(where, value, f"{name}{of} is none; give whole numbers from {least} on")
    if (row.step, row.layer) in seen:
        raise bad(where, "twice", "give each step and layer once")
    seen.add((row.step, row.layer))
    if row.ids.ndim != 2 or row.ids.shape[1] != header.top_k or row.weights.shape != row.ids.shape:
        shapes = f"ids {list(row.ids.shape)}, weights {list(row.weights.shape)}"
        raise bad(where, shapes, f"must both be [tokens, top_k = {header.top_k}]")
    check_ids(row.ids, header.num_experts, f"{where}: ids")


def check_ids(ids: np.ndarray, num_experts: int, where: str) -> None:
    """``UserError`` naming ``where`` and the token, if ids [T, k] are not whole numbers of 0 to E - 1, no expert twice
    in a token."""
    if not np.issubdtype(ids.dtype, np.integer):
        broken = np.argwhere(~(ids == np.rint(ids))) if np.issubdtype(ids.dtype, np.floating) else [None]
        if len(broken):
            token, value = (0, str(ids.dtype)) if broken[0] is None else (int(broken[0][0]), float(ids[*broken[0]]))
            raise bad(f"{where}: token {token}", value, "expert ids must be whole numbers")
    outside = np.argwhere((ids < 0) | (ids >= num_experts))
    if len(outside):
        token, place = outside[0]
        wrong = ids[token, place].item()
        raise bad(f"{where}: token {token}", wrong, f"there is no expert {wrong} of {num_experts}, counted from 0")
    ordered = np.sort(ids, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if len(twice):
        token, place = twice[0]
        raise bad(f"{where}: token {token}", ordered[token, place].item(), "is chosen twice; experts must be distinct")


def _digest(header: bytes, table: pa.Table) -> str:
    """Of all that a trace says: Parquet's own checksums leave out the header and the numbers of its footer."""
    found = hashlib.sha256(header)
    for row in table.select(list(COLUMNS)).to_pylist():
        found.update(repr([row[name] for name in COLUMNS if name not in ("ids", "weights")]).encode())
        found.update(row["ids"] + row["weights"])
    return found.hexdigest()


def read_trace(path: Path) -> Trace:
    """Read and check a trace; the last few files stay in memory.

    Errors (``UserError``, naming the file and the remedy): missing, not Parquet or damaged, no header, made by a newer
    moebench, contents that contradict the header.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable(
            "trace", str(path), f"cannot be read ({error.strerror}); give an existing trace file"
        ) from None
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: Path, mtime_ns: int, size: int) -> Trace:
    again = "record it again with `moebench record`"
    try:
        table = pq.read_table(pa.BufferReader(path.read_bytes()), page_checksum_verification=True)
        metadata = dict(table.schema.metadata or {})
    except Exception as error:  # a damaged file makes Parquet's reader raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise unreadable("trace", str(path), f"not a readable Parquet file ({reason}); {again}") from None
    text = metadata.get(HEADER_KEY)
    if text is None:
        raise unreadable("trace", str(path), f"has no moebench header, so it is not a trace; {again}")
    try:
        fields = json.loads(text)
        version = int(fields["schema_version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise unreadable("trace", str(path), f"has a damaged header; {again}") from None
    if version > SCHEMA_VERSION:
        remedy = f"schema_version {version} is newer than this moebench reads ({SCHEMA_VERSION}); upgrade moebench"
        raise unreadable("trace", str(path), remedy)
    try:
        header = Header.parse(fields, "header")
        if header.top_k > header.num_experts:
            raise bad("header.top_k", header.top_k, f"is more than num_experts = {header.num_experts}")
        table = table.select(list(COLUMNS)).cast(pa.schema(COLUMNS))
        rows = _rows(table, header)
        if DIGEST_KEY in metadata and metadata[DIGEST_KEY] != _digest(text, table).encode():
            raise ValueError("its contents are not those of its digest")
    except (UserError, pa.ArrowException, KeyError, ValueError, TypeError, OverflowError) as error:
        raise unreadable("trace", str(path), f"is damaged ({error}); {again}") from None
    return Trace(path, header, rows)


def _rows(table: pa.Table, header: Header) -> dict[tuple[int, int], Recorded]:
    rows: dict[tuple[int, int], Recorded] = {}
    seen: set[tuple[int, int]] = set()
    for row in table.to_pylist():
        if row["num_tokens"] < 0:
            raise ValueError(f"num_tokens {row['num_tokens']}")
        shape = (row["num_tokens"], header.top_k)
        ids = np.frombuffer(row["ids"], header.ids_dtype).reshape(shape)
        weights = np.frombuffer(row["weights"], "u1").reshape(shape)
        found = Recorded(row["step"], row["layer"], ids, weights * np.float32(header.weight_scale / 255), row["loss"])
        check_row(found, header, seen)
        rows[found.step, found.layer] = found
    return rows


# ---- whole recordings --------------------------------------------------------------------------------------------


def all_layers(trace: Trace, step: int | None = None) -> np.ndarray:
    """Routing of all layers at one recorded step (by default the last), int32 [L, T, k]. ``UserError`` if the trace has
    no such step, or lacks a layer of it."""
    if not trace.steps:
        raise bad("trace", str(trace.path), "is empty; record it again with `moebench record`")
    step = trace.steps[-1] if step is None else step
    if step not in trace.steps:
        raise bad("--step", step, f"the trace {trace.path.name} has steps {', '.join(map(str, trace.steps))}")
    lacking = [layer for layer in range(trace.header.num_layers) if (step, layer) not in trace.rows]
    if lacking:
        raise bad("trace", str(trace.path), f"lacks layer {lacking[0]} at step {step}; record it again")
    return np.stack([trace.rows[step, layer].ids for layer in range(trace.header.num_layers)]).astype(np.int32)


def window_of(trace: Trace) -> int:
    """Tokens of one sequence of a recording."""
    try:
        return int(json.loads(str(trace.header.details["model"]))["seq"])
    except (KeyError, ValueError, TypeError):
        return WINDOW


def split(ids: np.ndarray, share: float, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """ids [L, T, k] -> (to profile, held out): ``share`` of the tokens is held out, in whole windows spread evenly, so
    that both parts are of the same text. ``UserError`` if either part would be empty."""
    if not 0 < share < 1:
        raise bad("held-out share", share, "must lie between 0 and 1")
    which = np.arange(ids.shape[1]) // window
    held = np.floor((which + 1) * share) > np.floor(which * share)
    if held.all() or not held.any():
        raise bad("held-out share", share, f"leaves nothing of {int(which[-1]) + 1} windows; record more tokens")
    return ids[:, ~held], ids[:, held]


# ---- the workload "trace" ----------------------------------------------------------------------------------------


class TraceParams(Spec):
    """``path`` of the trace, the ``layer`` that layer 0 of the model takes, the recorded ``step`` (None: the last)."""

    path: str
    layer: Annotated[int, Field(ge=0)] = 0
    step: Annotated[int, Field(ge=0)] | None = None


def find_trace(name: str) -> Path:
    """``name`` itself if absolute, else under results/traces/ of the repository, else under the working directory."""
    path = Path(name).expanduser()
    shipped = SHIPPED / path
    return shipped if shipped.is_file() else path.absolute()


def from_trace(workload: Workload, model: Model, topology: Topology, layer: int) -> np.ndarray:
    """ids int32 [T, k]: the first tokens of the trace in order, rank after rank, with the best k experts of each.

    The same at every step of an experiment: recorded steps lie further apart than an experiment is long.

    Errors: a trace of another number of experts, with a smaller k, fewer tokens, or without that layer or step.
    """
    where = f"workload {workload.name} (trace)"
    params = TraceParams.parse(workload.params, f"{where}.params")
    trace = read_trace(find_trace(params.path))
    header, steps, name = trace.header, trace.steps, trace.path.name
    if not steps:
        raise bad(f"{where}.params.path", params.path, "the trace is empty; record it again")
    if header.num_experts != model.num_experts:
        remedy = f"the trace {name} has {header.num_experts} experts; use a model or a trace with as many"
        raise bad("model.num_experts", model.num_experts, remedy)
    if header.top_k < model.top_k:
        raise bad("model.top_k", model.top_k, f"the trace {name} has only k = {header.top_k} experts per token")
    wanted_layer = params.layer + layer
    if wanted_layer not in trace.layers:
        listed = ", ".join(map(str, trace.layers))
        raise bad(f"{where}.params.layer", wanted_layer, f"the trace {name} has layers {listed}")
    listed = ", ".join(map(str, steps))
    if params.step is not None and params.step not in steps:
        raise bad(f"{where}.params.step", params.step, f"the trace {name} has steps {listed}")
    recorded_step = steps[-1] if params.step is None else params.step
    row = trace.rows.get((recorded_step, wanted_layer))
    if row is None:
        raise bad(f"{where}.params.layer", wanted_layer, f"the trace {name} lacks it at step {recorded_step}")
    num_tokens = sum(workload.tokens(topology.num_ranks))
    if num_tokens > len(row.ids):
        remedy = f"{num_tokens} tokens on {topology.num_ranks} ranks, but the trace {name} has {len(row.ids)}"
        remedy += (
            f"; give a rank {len(row.ids) // topology.num_ranks} at most, or record more (moebench record --tokens)"
        )
        raise bad(f"workload {workload.name}.tokens_per_rank", workload.tokens_per_rank, remedy)
    return row.ids[:num_tokens, : model.top_k].astype(np.int32)
