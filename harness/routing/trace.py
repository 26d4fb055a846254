"""Traces: recorded or imported routing, in one Parquet file each (``harness.routing.recorded`` has the format).

``Writer`` makes one, ``read_trace`` opens one; a row of it is read when it is asked for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import UserError, bad, first_line, unreadable
from harness.routing.checked import check_row
from harness.routing.recorded import (
    COLUMNS,
    DIGEST_KEY,
    FIRST_COLUMNS,
    HEADER_KEY,
    HEAVY,
    SCHEMA_VERSION,
    Header,
    Recorded,
    counts_of_ids,
    digest_of,
    fields_of,
)
from harness.routing.writing import Writer, check_writable, write_trace

WINDOW = 128  # tokens that follow one another in a recording, where its header does not say
SHIPPED = Path(__file__).resolve().parents[2] / "results" / "traces"
KEPT_BYTES = 64 << 20  # of rows in memory, of each trace
AGAIN = "record it again with `moebench record`"


class Trace(Mapping[tuple[int, int], Recorded]):
    """A trace on disk, by (step, layer): its header and its index are in memory, a row is read and checked when it is
    asked for, and the last ones are kept. ``UserError`` for a row that is damaged."""

    def __init__(self, path: Path, file: pq.ParquetFile, header: Header, index: pa.Table):
        self.path, self.header, self._file = path, header, file
        self._index: dict[str, list[Any]] = {name: index[name].to_pylist() for name in index.column_names}
        pairs = list(zip(self._index["step"], self._index["layer"], strict=True))
        self._at = {pair: number for number, pair in enumerate(pairs)}
        if len(self._at) < len(pairs):
            step, layer = next(pair for number, pair in enumerate(pairs) if self._at[pair] != number)
            raise bad(f"trace: step {step}, layer {layer}", "twice", "give each step and layer once")
        for step, layer in pairs:
            if step < 0 or not 0 <= layer < header.num_layers:
                raise bad(f"trace: step {step}, layer {layer}", layer, f"layer {layer} of {header.num_layers} is none")
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._group = np.repeat(np.arange(len(sizes)), sizes)
        self._first = np.cumsum(sizes) - sizes
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self._kept_bytes = 0

    @functools.cached_property
    def steps(self) -> list[int]:
        return sorted({step for step, _ in self._at})

    @functools.cached_property
    def layers(self) -> list[int]:
        return sorted({layer for _, layer in self._at})

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: object) -> bool:
        return key in self._at

    def __hash__(self) -> int:
        return id(self)

    def num_tokens(self, step: int, layer: int) -> int:
        return int(self._index["num_tokens"][self._at[step, layer]])

    def __getitem__(self, key: tuple[int, int]) -> Recorded:
        number = self._at[key]
        return self._keep(number, lambda: self._sound(lambda: self._row(number)))  # type: ignore[no-any-return]

    def counts(self, step: int, layer: int) -> np.ndarray:
        """Assignments of each rank's tokens to each expert, int64 [R, E]: R = 1 where ranks are not told. No token is
        read for it."""
        if self.header.schema_version == 1:
            return counts_of_ids(self[step, layer].ids, None, self.header.num_experts)
        number = self._at[step, layer]
        return self._sound(lambda: self._light(number)[1])  # type: ignore[no-any-return]

    def ranks(self, step: int, layer: int) -> tuple[int, ...] | None:
        """Tokens of each rank, where they are told."""
        if self.header.schema_version == 1:
            return None
        return self._sound(lambda: self._light(self._at[step, layer])[0])  # type: ignore[no-any-return]

    def loss(self, step: int, layer: int) -> float:
        """Held-out, nats per token; NaN if unknown."""
        number = self._at[step, layer]
        return float(self._sound(lambda: self._columns(number, ("loss",))["loss"]))

    # ---- a row

    def _row(self, number: int) -> Recorded:
        header, step, layer = self.header, self._index["step"][number], self._index["layer"][number]
        num_tokens = self._index["num_tokens"][number]
        if num_tokens < 0:
            raise ValueError(f"num_tokens {num_tokens}")
        heavy = self._columns(number, (*HEAVY, "loss"))
        ranks, counts = (None, np.zeros((0, 0), np.int64))
        if header.schema_version > 1:
            ranks, counts = self._light(number)
            if (
                digest_of(heavy["ids"] or b"", heavy["weights"] or b"")
                != self._columns(number, ("payload",))["payload"]
            ):
                raise ValueError(f"step {step}, layer {layer}: its tokens are not those of its digest")
        shape, none = (num_tokens, header.top_k), np.zeros((0, header.top_k), np.float32)
        if header.kind == "counts":
            row = Recorded(step, layer, none, none, heavy["loss"], ranks, counts)
            check_row(row, header)
            from harness.routing.loops import draw

            return dataclasses.replace(row, ids=draw(counts, header.top_k, header.seed, step, layer))
        ids = np.frombuffer(heavy["ids"], header.ids_dtype).reshape(shape)
        weights = none
        if heavy["weights"] is not None:
            weights = np.frombuffer(heavy["weights"], header.weight_dtype).reshape(shape)
            weights = weights * np.float32(header.weight_scale / 255) if header.weight_dtype == "u1" else weights
        row = Recorded(step, layer, ids, weights, heavy["loss"], ranks, counts)
        check_row(row, header)
        if header.schema_version > 1 and not np.array_equal(counts, counts_of_ids(ids, ranks, header.num_experts)):
            raise ValueError(f"step {step}, layer {layer}: its counts are not those of its tokens")
        return row

    def _light(self, number: int) -> tuple[tuple[int, ...] | None, np.ndarray]:
        """Tokens of each rank, and counts, checked."""
        index = {name: values[number] for name, values in self._index.items()}
        row = self._columns(number, ("loss", "ranks", "counts", "payload"))
        before = self._index["digest"][number - 1] if number else digest_of(self._file.metadata.metadata[HEADER_KEY])
        fields = fields_of(index["step"], index["layer"], index["num_tokens"], row["loss"], row["ranks"])
        if digest_of(before, *fields, row["counts"], row["payload"]) != index["digest"]:
            raise ValueError(f"step {index['step']}, layer {index['layer']}: it is not what its digest is of")
        ranks = None if row["ranks"] is None else tuple(row["ranks"])
        counts = np.frombuffer(row["counts"], "<i4").reshape(1 if ranks is None else len(ranks), -1)
        if counts.shape[1] != self.header.num_experts:
            raise ValueError(f"counts of {counts.shape[1]} experts")
        return ranks, counts.astype(np.int64)

    def _columns(self, number: int, names: tuple[str, ...]) -> dict[str, Any]:
        """Of a row."""
        group, heavy = int(self._group[number]), names[0] in HEAVY or self.header.schema_version == 1
        table = self._keep((group, heavy), lambda: self._file.read_row_group(group, self._of(heavy), use_threads=False))
        at = number - int(self._first[group])
        return {name: table[name][at].as_py() for name in names}

    def _of(self, heavy: bool) -> list[str]:
        if heavy:
            return [*HEAVY, "loss"]
        return ["loss", "ranks", "counts", "payload"]

    def _keep(self, key: Any, make: Any) -> Any:
        """What ``make`` gives, from memory if it is there."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        made = make()
        size = made.nbytes if isinstance(made, pa.Table) else made.ids.nbytes + made.weights.nbytes + made.counts.nbytes
        self._kept[key] = made, size
        self._kept_bytes += size
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1][1]
        return made

    def _sound(self, read: Any) -> Any:
        try:
            return read()
        except (UserError, pa.ArrowException, OSError, LookupError, ValueError, TypeError, OverflowError) as error:
            raise _damaged(self.path, self.header, error) from None


def _damaged(path: Path, header: Header | None, error: Exception) -> UserError:
    again = "import it again with `moebench trace import`" if header is not None and header.source else AGAIN
    reason = first_line(error)
    return unreadable("trace", str(path), f"is damaged ({reason}); {again}")


def read_trace(path: Path) -> Trace:
    """Open a trace: its footer, header and index are read and checked now, a row when it is asked for. The last few
    files stay open.

    Errors (``UserError``, naming the file and the remedy): missing, not Parquet or damaged, no header, made by a newer
    moebench, contents that contradict the header.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise unreadable(
            "trace", str(path), f"cannot be read ({error.strerror}); give an existing trace file"
        ) from None
    return _read(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@functools.lru_cache(maxsize=4)
def _read(path: Path, mtime_ns: int, size: int, inode: int) -> Trace:
    try:
        file = pq.ParquetFile(pa.OSFile(str(path)), page_checksum_verification=True)
        metadata = dict(file.metadata.metadata or {})
    except Exception as error:  # a damaged file makes Parquet's reader raise many kinds
        reason = first_line(error)
        raise unreadable("trace", str(path), f"not a readable Parquet file ({reason}); {AGAIN}") from None
    header = _header(path, metadata.get(HEADER_KEY))
    try:
        if header.top_k > header.num_experts:
            raise bad("header.top_k", header.top_k, f"is more than num_experts = {header.num_experts}")
        columns, index = (FIRST_COLUMNS, 3) if header.schema_version == 1 else (COLUMNS, None)
        for name, kind in columns.items():
            if file.schema_arrow.field(name).type != kind:
                raise ValueError(f"column {name} is {file.schema_arrow.field(name).type}, not {kind}")
        light = list(columns)[:index] if index else ["step", "layer", "num_tokens", "digest"]
        found = Trace(path, file, header, file.read(light, use_threads=False))
        if header.schema_version == 1:
            _check_whole(file, metadata)
    except Exception as error:
        raise _damaged(path, header, error) from None
    return found


def _header(path: Path, text: bytes | None) -> Header:
    if text is None:
        remedy = "has no moebench header, so it is not a trace; record one with `moebench record`, or bring it in with"
        raise unreadable("trace", str(path), f"{remedy} `moebench trace import`")
    try:
        fields = json.loads(text)
        version = int(fields["schema_version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise unreadable("trace", str(path), f"has a damaged header; {AGAIN}") from None
    if version > SCHEMA_VERSION:
        remedy = f"schema_version {version} is newer than this moebench reads ({SCHEMA_VERSION}); upgrade moebench"
        raise unreadable("trace", str(path), remedy)
    try:
        return Header.parse(fields, "header")
    except UserError as error:
        raise _damaged(path, None, error) from None


def _check_whole(file: pq.ParquetFile, metadata: Mapping[bytes, bytes]) -> None:
    """The digest of schema 1 is of all that a trace says."""
    if DIGEST_KEY not in metadata:
        return
    found = hashlib.sha256(metadata[HEADER_KEY])
    for row in file.read(list(FIRST_COLUMNS)).to_pylist():
        found.update(repr([row[name] for name in FIRST_COLUMNS if name not in HEAVY]).encode())
        found.update(row["ids"] + row["weights"])
    if metadata[DIGEST_KEY] != found.hexdigest().encode():
        raise ValueError("its contents are not those of its digest")


def find_trace(name: str) -> Path:
    """``name`` itself if absolute, else under results/traces/ of the repository, else under the working directory."""
    path = Path(name).expanduser()
    shipped = SHIPPED / path
    return shipped if shipped.is_file() else path.absolute()


# ---- whole recordings --------------------------------------------------------------------------------------------


def all_layers(trace: Trace, step: int | None = None) -> np.ndarray:
    """Routing of all layers at one recorded step (by default the last), int32 [L, T, k]. ``UserError`` if the trace has
    no such step, or lacks a layer of it."""
    if not trace.steps:
        raise bad("trace", str(trace.path), "is empty; record it again with `moebench record`")
    step = trace.steps[-1] if step is None else step
    if step not in trace.steps:
        raise bad("--step", step, f"the trace {trace.path.name} has steps {', '.join(map(str, trace.steps))}")
    lacking = [layer for layer in range(trace.header.num_layers) if (step, layer) not in trace]
    if lacking:
        raise bad("trace", str(trace.path), f"lacks layer {lacking[0]} at step {step}; record it again")
    return np.stack([trace[step, layer].ids for layer in range(trace.header.num_layers)]).astype(np.int32)


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


__all__ = [
    "HEADER_KEY", "SCHEMA_VERSION", "SHIPPED", "Header", "Recorded", "Trace", "Writer", "all_layers", "check_writable",
    "find_trace", "read_trace", "split", "window_of", "write_trace",
]  # fmt: skip
