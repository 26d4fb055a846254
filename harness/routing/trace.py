"""Recorded routing on disk: one Parquet file, one row per (step, layer), header as JSON in the schema's metadata.

Columns: ``step``, ``layer``, ``num_tokens``, ``loss`` (held-out, nats per token, NaN if unknown) and, as raw bytes in
[T, k] order with the best expert first, ``ids`` (uint8, or little-endian uint16 above 256 experts) and ``weights``
(uint8; gate weight = value / 255 * header.weight_scale). Reading executes nothing of the file.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from harness.errors import UserError, bad
from harness.specs import Count, Model, Spec, Workload
from harness.topology import Topology

SCHEMA_VERSION = 1
WINDOW = 128  # tokens that follow one another in a recording, where its header does not say
HEADER_KEY = b"moebench.trace"
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
    weight_scale: Annotated[float, Field(gt=0)] = 1.0
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
    """Fail now and not after minutes of work. Errors: a folder that cannot be written to, a folder as ``path``."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    return bad("trace", str(path), f"cannot be written ({error.strerror or error}); choose another --out")


def write_trace(path: Path, header: Header, rows: Sequence[Recorded]) -> None:
    """Write the whole file or nothing. Errors: a folder that cannot be written to."""
    data: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for row in rows:
        assert row.ids.shape == row.weights.shape == (len(row.ids), header.top_k)
        quantised = np.rint(row.weights / header.weight_scale * 255).clip(0, 255).astype("u1")
        fields = (row.step, row.layer, len(row.ids), row.loss)
        for name, value in zip(
            COLUMNS, (*fields, row.ids.astype(header.ids_dtype).tobytes(), quantised.tobytes()), strict=True
        ):
            data[name].append(value)
    schema = pa.schema(COLUMNS).with_metadata({HEADER_KEY: header.model_dump_json()})
    table = pa.table(data, schema=schema)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            pq.write_table(
                table, file, compression="zstd", compression_level=19, use_dictionary=False, write_page_checksum=True
            )
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def read_trace(path: Path) -> Trace:
    """Read and check a trace; the last few files stay in memory.

    Errors (``UserError``, naming the file and the remedy): missing, not Parquet or damaged, no header, made by a newer
    moebench, contents that contradict the header.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise bad("trace", str(path), f"cannot be read ({error.strerror}); give an existing trace file") from None
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: Path, mtime_ns: int, size: int) -> Trace:
    again = "record it again with `moebench record`"
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise bad("trace", str(path), f"not a readable Parquet file ({reason}); {again}") from None
    text = (table.schema.metadata or {}).get(HEADER_KEY)
    if text is None:
        raise bad("trace", str(path), f"has no moebench header, so it is not a trace; {again}")
    try:
        fields = json.loads(text)
        version = int(fields["schema_version"])
    except (ValueError, KeyError, TypeError):
        raise bad("trace", str(path), f"has a damaged header; {again}") from None
    if version > SCHEMA_VERSION:
        remedy = f"schema_version {version} is newer than this moebench reads ({SCHEMA_VERSION}); upgrade moebench"
        raise bad("trace", str(path), remedy)
    try:
        header = Header.parse(fields, "header")
        rows = _rows(table, header)
    except (UserError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise bad("trace", str(path), f"is damaged ({error}); {again}") from None
    return Trace(path, header, rows)


def _rows(table: pa.Table, header: Header) -> dict[tuple[int, int], Recorded]:
    rows: dict[tuple[int, int], Recorded] = {}
    for row in table.select(list(COLUMNS)).cast(pa.schema(COLUMNS)).to_pylist():
        step, layer, shape = row["step"], row["layer"], (row["num_tokens"], header.top_k)
        ids = np.frombuffer(row["ids"], header.ids_dtype).reshape(shape)
        weights = np.frombuffer(row["weights"], "u1").reshape(shape)
        if ids.size and int(ids.max()) >= header.num_experts:
            raise ValueError(f"step {step}, layer {layer} has expert {ids.max()} of {header.num_experts}")
        if not 0 <= layer < header.num_layers:
            raise ValueError(f"layer {layer} of {header.num_layers}")
        weights = weights.astype(np.float32) * np.float32(header.weight_scale / 255)
        rows[step, layer] = Recorded(step, layer, ids, weights, row["loss"])
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
        raise bad(f"workload {workload.name}.tokens_per_rank", workload.tokens_per_rank, remedy)
    return row.ids[:num_tokens, : model.top_k].astype(np.int32)
