"""From a trace to anybody's file: ``moebench trace export``. What is exported can be imported, equal to the bit."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from harness import outputs
from harness.errors import bad, first_line
from harness.routing.trace import Trace

FORMATS = ("npz", "npy", "parquet", "jsonl", "csv", "pt")
Array = tuple[tuple[int, ...], np.dtype[Any], Iterator[np.ndarray]]  # shape, type, and what stands at each step
Row = dict[str, Any]  # step, layer, perhaps rank and loss; ids [T, k] and perhaps weights, or counts [E]


def export_trace(trace: Trace, out: Path, *, weights: bool = True) -> int:
    """Write ``trace`` as the suffix of ``out`` says -> bytes. Without ``weights`` they are left out. ``UserError``
    where the format cannot hold all that the trace says; then nothing is written."""
    suffix = out.suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise bad("--out", str(out), f"must end in one of {', '.join(f'.{each}' for each in FORMATS)}")
    if not len(trace):
        raise bad("trace", str(trace.path), "is empty; there is nothing to export")
    outputs.check(out)
    writers: dict[str, Callable[[Trace, IO[bytes], bool], None]] = {
        "npz": _npz, "npy": _npy, "parquet": _parquet, "jsonl": _jsonl, "csv": _csv, "pt": _pt
    }  # fmt: skip
    try:
        with outputs.whole(out, list_it=True) as file:
            writers[suffix](trace, file, weights)
    except pa.ArrowInvalid as error:  # ranks or weights in some rows alone
        reason = first_line(error)
        raise bad("trace", str(trace.path), f"is no table of equal rows ({reason}); export .jsonl") from None
    return out.stat().st_size


# ---- tables ------------------------------------------------------------------------------------------------------


def _table_rows(trace: Trace, weights: bool) -> Iterator[Row]:
    with_loss = any(np.isfinite(trace.loss(*key)) for key in trace)
    for step in trace.steps:
        for layer in (each for each in trace.layers if (step, each) in trace):
            head: Row = {"step": step, "layer": layer}
            if with_loss:
                head["loss"] = trace.loss(step, layer)
            if trace.header.kind == "counts":
                told = trace.ranks(step, layer) is not None
                for rank, own in enumerate(trace.counts(step, layer)):
                    yield head | ({"rank": rank} if told else {}) | {"counts": own}
                continue
            row = trace[step, layer]
            edges = np.cumsum([0, *(row.ranks or (len(row.ids),))])
            for rank, (low, high) in enumerate(itertools.pairwise(edges)):
                found: Row = head | ({"rank": rank} if row.ranks is not None else {}) | {"ids": row.ids[low:high]}
                yield found | ({"weights": row.weights[low:high]} if weights and len(row.weights) else {})


def _columns(row: Row, *, nested: bool) -> dict[str, Any]:
    """Of a row, ids flat: a row a token. ``nested``: counts as one column."""
    of_rows = row["ids"] if "ids" in row else row["counts"][None]
    num = len(of_rows)
    found: dict[str, Any] = {name: np.full(num, row[name]) for name in ("step", "layer", "rank", "loss") if name in row}
    if "counts" in row and nested:
        return found | {"counts": pa.array([row["counts"]])}
    word = "id" if "ids" in row else "count"
    found |= {f"{word}{j}": of_rows[:, j] for j in range(of_rows.shape[1])}
    if "weights" in row:
        of_weights = row["weights"] if nested else row["weights"].astype(np.float64)
        found |= {f"weight{j}": of_weights[:, j] for j in range(of_rows.shape[1])}
    return found


def _parquet(trace: Trace, file: IO[bytes], weights: bool) -> None:
    writer, waiting, num_bytes = None, [], 0
    for row in _table_rows(trace, weights):
        waiting.append(pa.table(_columns(row, nested=True)))
        num_bytes += waiting[-1].nbytes
        if num_bytes > 1 << 24:
            writer = _flush(writer, file, waiting)
            num_bytes = 0
    _flush(writer, file, waiting).close()


def _flush(writer: Any, file: IO[bytes], waiting: list[pa.Table]) -> Any:
    if waiting:
        table = pa.concat_tables(waiting)
        writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd", use_dictionary=["step", "layer"])
        writer.write_table(table)
        waiting.clear()
    return writer


def _jsonl(trace: Trace, file: IO[bytes], weights: bool) -> None:
    for row in _table_rows(trace, weights):
        plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()}
        if np.isnan(row.get("loss", 0.0)):
            del plain["loss"]
        file.write((json.dumps(plain, separators=(",", ":")) + "\n").encode())


def _csv(trace: Trace, file: IO[bytes], weights: bool) -> None:
    """A row a token, or of counts a row a layer and rank."""
    first = True
    for row in _table_rows(trace, weights):
        sink = pa.BufferOutputStream()
        pa.csv.write_csv(pa.table(_columns(row, nested=False)), sink, pa.csv.WriteOptions(include_header=first))
        file.write(sink.getvalue())
        first = False


# ---- arrays ------------------------------------------------------------------------------------------------------


def _small(trace: Trace) -> dict[str, np.ndarray]:
    """All but ids, weights and counts. ``UserError`` where a trace is no array."""
    keys = [(step, layer) for step in trace.steps for layer in trace.layers]
    if len(keys) != len(trace):
        raise bad("trace", str(trace.path), "lacks layers in some steps, so it is no array; export .parquet or .jsonl")
    tokens = {trace.num_tokens(*key) for key in keys}
    ranks = {key: trace.ranks(*key) for key in keys}
    by_step = [{ranks[step, layer] for layer in trace.layers} for step in trace.steps]
    if trace.header.kind == "tokens" and len(tokens) > 1:
        remedy = f"{min(tokens)} to {max(tokens)} tokens a step, so it is no array; export .parquet or .jsonl"
        raise bad("trace", str(trace.path), remedy)
    if any(len(each) > 1 for each in by_step) and trace.header.kind == "tokens":
        raise bad("trace", str(trace.path), "has other ranks in other layers; export .parquet or .jsonl")
    if len({None if each is None else len(each) for each in ranks.values()}) > 1:
        raise bad("trace", str(trace.path), "has other numbers of ranks in other steps; export .parquet or .jsonl")
    found = {"steps": np.array(trace.steps), "num_experts": np.array(trace.header.num_experts)}
    found |= {"top_k": np.array(trace.header.top_k)}
    told = next(iter(ranks.values()))
    if told is not None and trace.header.kind == "tokens":
        found["rank_tokens"] = np.array([next(iter(each)) for each in by_step])
    loss = np.array([[trace.loss(step, layer) for layer in trace.layers] for step in trace.steps])
    if not np.isnan(loss).all():
        found["loss"] = loss
    return found


def _large(trace: Trace, weights: bool) -> dict[str, Array]:
    """Shape, type, and what stands at each step."""
    steps, layers, header = trace.steps, trace.layers, trace.header
    first = steps[0], layers[0]
    if header.kind == "counts":
        told = trace.ranks(*first) is not None
        of_step = (len(layers), header.num_experts)
        shape: tuple[int, ...] = (len(steps), *((len(trace.counts(*first)),) if told else ()), *of_step)

        def counts() -> Iterator[np.ndarray]:
            for step in steps:
                array = np.stack([trace.counts(step, layer) for layer in layers], axis=1)  # [R, L, E]
                yield array if told else array[0]

        return {"counts": (shape, np.dtype("<i8"), counts())}

    def of(name: str, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
        for step in steps:
            yield np.stack([getattr(trace[step, layer], name) for layer in layers]).astype(dtype)

    shape = (len(steps), len(layers), trace.num_tokens(*first), header.top_k)
    found: dict[str, Array] = {"ids": (shape, header.ids_dtype, of("ids", header.ids_dtype))}
    if weights and len(trace[first].weights):
        found["weights"] = (shape, np.dtype("<f4"), of("weights", np.dtype("<f4")))
    return found


def _write_array(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], of_steps: Iterator[np.ndarray]) -> None:
    head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)  # type: ignore[no-untyped-call]
    for each in of_steps:
        file.write(np.ascontiguousarray(each, dtype).tobytes())


def _npy(trace: Trace, file: IO[bytes], weights: bool) -> None:
    small, large = _small(trace), _large(trace, weights)
    lost = [name for name in ("weights",) if name in large] + [n for n in ("loss", "rank_tokens") if n in small]
    lost += [] if trace.steps == list(range(len(trace.steps))) else ["numbers of steps"]
    if lost:
        raise bad("--out", ".npy", f"holds one array and would lose {', '.join(lost)}; export .npz (or --no-weights)")
    ((shape, dtype, of_steps),) = large.values()
    _write_array(file, shape, dtype, of_steps)


def _npz(trace: Trace, file: IO[bytes], weights: bool) -> None:
    small = _small(trace)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        for name, (shape, dtype, of_steps) in _large(trace, weights).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write_array(member, shape, dtype, of_steps)


def _pt(trace: Trace, file: IO[bytes], weights: bool) -> None:
    """Held in memory as a whole, as torch writes it so."""
    import torch

    small, large = _small(trace), _large(trace, weights)
    found = {name: torch.from_numpy(np.asarray(array)) for name, array in small.items()}
    for name, (_, _, of_steps) in large.items():
        found[name] = torch.from_numpy(np.stack(list(of_steps)))
    torch.save(found, file)


__all__ = ["FORMATS", "export_trace"]
