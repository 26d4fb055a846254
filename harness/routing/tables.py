"""Tables of a trace's source, .parquet, .jsonl and .csv, read piece by piece.

A row is a token (``ids`` of k experts), a layer's tokens (``ids`` [T, k]), a step's (``ids`` [L, T, k]), or a layer's
``counts`` [E]; ``step``, ``layer``, ``rank``, ``weights`` and ``loss`` as far as they are known. In .csv, where nothing
is nested, columns are id0, id1, ..., weight0, ..., count0, ...; in .parquet
they may be too, or ``ids`` bytes [T, k], which are read fastest.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from harness.errors import bad, first_line
from harness.routing import lines
from harness.routing.ahead import ahead
from harness.routing.arrays import Part
from harness.routing.recorded import HEADER_KEY

PIECE_BYTES = 8 << 20  # of text at a time
MOST_BYTES = 64 << 20  # of a Parquet file at a time
MOST_LINE = 1 << 30
FAST_BYTES = 1 << 20  # of lines; for fewer a compiled loop is not worth its start
MTP = "mtp_idx"  # names Megatron's layers of multi-token prediction
#: what servers and trainers call them; the first name is ours
CALLED = {
    "ids": ("ids", "top_indices", "topk_ids", "expert_ids", "routed_experts"),
    "weights": ("weights", "topk_weights"),
    "counts": ("counts", "exp_counts", "tokens_per_expert", "logical_count", "expert_load"),
    "step": ("step", "iteration", "forward_pass_id"),
    "layer": ("layer", "layer_id"),
    "rank": ("rank",),
    "loss": ("loss",),
}
NOT_FAST = (*CALLED["weights"], *CALLED["loss"], MTP)
WIDE = {"ids": r"(?:id|expert)_?(\d+)", "weights": r"weight_?(\d+)", "counts": r"count_?(\d+)"}


# ---- files -------------------------------------------------------------------------------------------------------


def of_parquet(path: Path, top_k: int | None, num_experts: int | None) -> Iterator[Rows | None]:
    """``top_k`` and ``num_experts`` are needed where ids are bytes."""
    file = pq.ParquetFile(pa.OSFile(str(path)), pre_buffer=False)  # which would keep all that was read
    if HEADER_KEY in (file.metadata.metadata or {}):
        raise bad("source", str(path), "is a moebench trace already; use it as it is")
    num_bytes = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
    batch = max(1, min(1 << 18, MOST_BYTES * max(1, file.metadata.num_rows) // max(1, 8 * num_bytes)))
    row = 0
    for each in file.iter_batches(batch_size=batch):
        yield _rows_of(_of_bytes(_nested(pa.table(each), path), path, top_k, num_experts), path.name, "row", row)
        row += len(each)


def _of_bytes(table: pa.Table, path: Path, top_k: int | None, num_experts: int | None) -> pa.Table:
    """Ids of a layer as bytes [T, k], as a trace has them: uint8, or little-endian uint16 above 256 experts."""
    if "ids" not in table.column_names or table["ids"].type != pa.binary():
        return table
    for name, given in (("--top-k", top_k), ("--experts", num_experts)):
        if given is None:
            raise bad(name, None, f"ids of {path.name} are bytes, which do not say it; give it")
    assert top_k is not None
    assert num_experts is not None
    kind = np.dtype("u1" if num_experts <= 256 else "<u2")
    column = table["ids"].combine_chunks()
    sizes = np.asarray(pc.binary_length(column).to_numpy(zero_copy_only=False))
    if column.null_count or (sizes % (kind.itemsize * top_k)).any():
        remedy = f"must be bytes [tokens, k = {top_k}] of {kind.name} in every row"
        raise bad(f"{path.name}: ids", f"{column.null_count} null", remedy)
    ends = np.cumsum([0, *sizes]) // (kind.itemsize * top_k)
    start = int(np.frombuffer(column.buffers()[1], "<i4")[column.offset])
    values = np.frombuffer(column.buffers()[2] or b"", "u1")[start : start + int(sizes.sum())].view(kind)
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(values), top_k)
    found = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), tokens)
    return table.set_column(table.column_names.index("ids"), "ids", found)


def of_jsonl(path: Path) -> Iterator[Rows | None]:
    """Two pieces are parsed at a time."""
    line, coming = 1, deque[Future[Rows | None]]()
    with path.open("rb") as file, ThreadPoolExecutor(2) as threads:
        for piece in _pieces(file, path):
            coming.append(threads.submit(_of_lines, piece, path, line))
            line += piece.count(b"\n")
            if len(coming) > 2:
                yield coming.popleft().result()
        for each in coming:
            yield each.result()


def _of_lines(piece: bytes, path: Path, line: int) -> Rows | None:
    fast = lines.read(piece, CALLED, NOT_FAST) if len(piece) >= FAST_BYTES else None
    if fast is not None:
        return Rows(path.name, "line", line, *fast)
    return _rows_of(_parsed(piece, f"{path.name}: from line {line} on"), path.name, "line", line)


def _parsed(piece: bytes, where: str) -> pa.Table:
    options = pa.json.ReadOptions(use_threads=False, block_size=len(piece) + 1)
    try:
        return pa.json.read_json(pa.BufferReader(piece), options)
    except pa.ArrowException as error:
        raise bad(where, "not JSON", f"{first_line(error)}; give one object a line") from None


def _pieces(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Whole lines."""
    rest: list[bytes] = []
    while block := file.read(PIECE_BYTES):
        cut = block.rfind(b"\n") + 1
        if cut:
            yield b"".join([*rest, block[:cut]])
            rest = []
        rest.append(block[cut:])
        if sum(map(len, rest)) > MOST_LINE:
            raise bad("source", str(path), f"has a line of more than {MOST_LINE >> 20} MiB; give one layer a line")
    if (last := b"".join(rest)).strip():
        yield last


def of_csv(path: Path) -> Iterator[Rows | None]:
    row = 2
    options = pa.csv.ReadOptions(use_threads=False, block_size=PIECE_BYTES)
    with pa.csv.open_csv(path, read_options=options) as reader:
        for batch in reader:
            yield _rows_of(_nested(pa.table(batch), path), path.name, "line", row)
            row += len(batch)


def _nested(table: pa.Table, path: Path) -> pa.Table:
    """Columns id0, id1, ... as one."""
    found = {name: table[name] for name in table.column_names}
    for name, pattern in WIDE.items():
        numbered = {int(m[1]): column for column in table.column_names if (m := re.fullmatch(pattern, column))}
        if not numbered:
            continue
        if sorted(numbered) != list(range(len(numbered))):
            first = next(at for at in range(len(numbered)) if at not in numbered)
            raise bad(path.name, sorted(numbered.values())[0], f"there is no number {first} of these columns")
        columns = [table[numbered[at]].to_numpy() for at in range(len(numbered))]
        if any(column.dtype == object for column in columns):
            raise bad(path.name, name, "must be numbers")
        values = np.stack(columns, axis=1)
        found[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.table(found)


# ---- parts -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rows:
    """``first``: the number of the first row in ``where``, in words a ``unit``. ``keys``: step, layer and rank of each
    row, as far as they are known; ``heavy``: ids or counts, ``values`` all its numbers, ``lengths`` how long the lists
    are, outermost first; ``weights`` as flat as ids."""

    where: str
    unit: str
    first: int
    keys: dict[str, np.ndarray]
    heavy: str
    values: np.ndarray
    lengths: list[np.ndarray]
    weights: np.ndarray | None = None
    loss: np.ndarray | None = None


def _rows_of(table: pa.Table, where: str, unit: str, first: int) -> Rows | None:
    if not len(table):
        return None
    columns = {}
    for name, names in CALLED.items():
        there = [each for each in names if each in table.column_names]
        if there:
            columns[name] = table[there[0]].combine_chunks()
    if MTP in table.column_names:  # layers of another kind beside the model's own
        keep = pc.is_null(table[MTP]).combine_chunks()
        columns = {name: column.filter(keep) for name, column in columns.items()}
    if ("ids" in columns) == ("counts" in columns):
        remedy = "must have a column ids or a column counts, one of the two (moebench trace import --help)"
        raise bad(where, ", ".join(table.column_names)[:150], remedy)
    keys: dict[str, np.ndarray] = {
        name: _key(columns[name], f"{where}: {name}", unit, first)
        for name in ("step", "layer", "rank")
        if name in columns
    }
    heavy = "ids" if "ids" in columns else "counts"
    values, lengths = _flat(columns[heavy], f"{where}: {heavy}", unit, first)
    rows = Rows(where, unit, first, keys, heavy, values, lengths)
    rows.loss = _numbers(columns["loss"]) if "loss" in columns else None
    if "weights" in columns:
        rows.weights, of_weights = _flat(columns["weights"], f"{where}: weights", unit, first)
        if len(of_weights) != len(lengths) or not all(map(np.array_equal, of_weights, lengths)):
            raise bad(f"{where}: weights", f"{unit} {first} on", "must be as many as ids")
    return rows


def parts_of(pieces: Iterator[Rows | None]) -> Iterator[Part]:
    """Of one of the readers above, which reads the next piece while one is in use."""
    for rows in ahead(pieces):
        if rows is not None and len(rows.lengths[0]):
            yield from _parts_of(rows)


def _parts_of(rows: Rows) -> Iterator[Part]:
    where, unit, first = rows.where, rows.unit, rows.first
    num, keys, lengths, by_number = len(rows.lengths[0]), rows.keys, rows.lengths, "layer" not in rows.keys
    step, layer = (keys.get(name, np.zeros(num, np.int64)) for name in ("step", "layer"))
    rank = keys.get("rank")

    def part(row: int, layer_: int, **arrays: np.ndarray | None) -> Part:
        return Part(
            f"{where}: {unit} {first + row}",
            int(step[row]),
            layer_,
            loss=np.nan if rows.loss is None else float(rows.loss[row]),
            rank=None if rank is None else int(rank[row]),
            **arrays,  # type: ignore[arg-type]
        )

    if rows.heavy == "ids" and len(lengths) == 1:  # a row is a token
        runs = np.stack([step, layer, rank if rank is not None else step])
        starts = np.flatnonzero(np.r_[True, (np.diff(runs) != 0).any(0)])
        _even(lengths[0], f"{where}: ids", unit, first)
        ids, weights = rows.values.reshape(num, -1), None if rows.weights is None else rows.weights.reshape(num, -1)
        for start, end in zip(starts, np.r_[starts[1:], num], strict=True):
            own = None if weights is None else weights[start:end]
            yield part(int(start), int(layer[start]), ids=ids[start:end], weights=own)
        return
    edges, ends = _edges(lengths), np.arange(num + 1)
    for each in edges:
        ends = each[ends]
    for row in range(num):
        cut, place = slice(ends[row], ends[row + 1]), f"{where}: {unit} {first + row}"
        shape = _shape(lengths, edges, row, f"{place}: {rows.heavy}")
        array, own = rows.values[cut].reshape(shape), None if rows.weights is None else rows.weights[cut].reshape(shape)
        if rows.heavy == "ids":
            if array.ndim > 3 or (array.ndim == 3 and not by_number):
                raise bad(place, f"ids {list(shape)}", "a layer's ids must be [tokens, k]")
            for at in range(len(array)) if array.ndim == 3 else [None]:
                number = int(layer[row]) if at is None else at
                of_layer = own if own is None or at is None else own[at]
                yield part(row, number, ids=array if at is None else array[at], weights=of_layer)
        elif array.ndim == 1:
            yield part(row, int(layer[row]), counts=array[None])
        elif array.ndim == 2 and by_number:
            for at in range(len(array)):
                yield part(row, at, counts=array[at][None])
        else:
            raise bad(place, f"counts {list(shape)}", "must be [experts], a row a rank")


def _numbers(column: pa.Array) -> np.ndarray:
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _key(column: pa.Array, where: str, unit: str, first: int) -> np.ndarray:
    """Whole numbers from 0 on, int64."""
    values = _numbers(column)
    if values.dtype == np.int64 and values.min(initial=0) >= 0:
        return values
    if values.dtype.kind not in "iuf":
        raise bad(where, str(column.type), "must be whole numbers from 0 on")
    wrong = ~((values >= 0) & (values == np.floor(values)))
    if wrong.any():
        at = int(wrong.argmax())
        raise bad(f"{where}, {unit} {first + at}", values[at].item(), "must be a whole number from 0 on")
    return values.astype(np.int64)


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def _flat(column: pa.Array, where: str, unit: str, first: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """All numbers of nested lists, and how long the lists are, outermost first."""
    lengths: list[np.ndarray] = []
    while any(is_one(column.type) for is_one in _LISTS):
        if column.null_count:
            at = int(pc.is_null(column).to_numpy(zero_copy_only=False).argmax())
            raise bad(where, f"{unit} {first + at}" if not lengths else "null", "is missing there")
        if pa.types.is_fixed_size_list(column.type):
            lengths.append(np.full(len(column), column.type.list_size))
        else:
            lengths.append(pc.list_value_length(column).to_numpy(zero_copy_only=False))
        column = column.flatten()
    if not lengths or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        if lengths and len(column) == 0:
            return np.zeros(0, np.int64), lengths
        raise bad(where, str(column.type), "must be lists of numbers")
    return _numbers(column), lengths


def _even(lengths: np.ndarray, where: str, unit: str, first: int) -> None:
    wrong = lengths != lengths[0]
    if wrong.any():
        at = int(wrong.argmax())
        remedy = f"has {lengths[at]} experts, others have k = {lengths[0]}"
        raise bad(f"{where}, {unit} {first + at}", int(lengths[at]), remedy)


def _edges(lengths: list[np.ndarray]) -> list[np.ndarray]:
    """Of each depth, where its lists begin and end in the next one."""
    return [np.concatenate([[0], np.cumsum(each)]) for each in lengths]


def _shape(lengths: list[np.ndarray], edges: list[np.ndarray], row: int, where: str) -> tuple[int, ...]:
    """Of a row's nested lists; ``UserError`` if they are ragged."""
    low, high, shape = row, row + 1, []
    for each, edge in zip(lengths, edges, strict=True):
        own = each[low:high]
        if len(own) and own.min() != own.max():
            remedy = f"lists of {int(own.min())} to {int(own.max())}; all must be as long"
            raise bad(where, "ragged", remedy)
        shape.append(int(own[0]) if len(own) else 0)
        low, high = edge[low], edge[high]
    return tuple(shape)
