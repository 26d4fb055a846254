"""Writes a trace (``harness.routing.recorded`` has its format) as a stream."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness import outputs
from harness.errors import bad
from harness.routing.checked import check_row
from harness.routing.recorded import COLUMNS, HEADER_KEY, Header, Recorded, counts_of_ids, digest_of, fields_of

SMALL, FAST = 19, 1  # levels of zstd: for what is recorded once and shipped, and for what is imported
GROUP_BYTES = 1 << 20  # of a row group at least, but for the last one


class Writer:
    """Writes a trace row by row: the whole file or, after any error, nothing.

    Errors (``UserError``): a folder that cannot be written to, rows that a reader would not take (``check_row``),
    weights that are no numbers of 0 to ``header.weight_scale``, a step and layer twice."""

    def __init__(self, path: Path, header: Header, level: int = FAST):
        if header.top_k > header.num_experts:
            raise bad("header.top_k", header.top_k, f"is more than num_experts = {header.num_experts}")
        self.path, self.header, self.level = path, header, level
        self.text = header.model_dump_json().encode()
        self._seen: set[tuple[int, int]] = set()
        self._data: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._before, self._num_bytes, self._stack = digest_of(self.text), 0, contextlib.ExitStack()
        self._written: Future[None] | None = None  # the last group

    def __enter__(self) -> Writer:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(outputs.whole(self.path))
            schema = pa.schema(COLUMNS, metadata={HEADER_KEY: self.text})
            self._file = stack.enter_context(
                pq.ParquetWriter(
                    file,
                    schema,
                    compression="zstd",
                    compression_level=self.level,
                    use_dictionary=False,
                    write_page_checksum=True,
                )
            )
            self._thread = stack.enter_context(ThreadPoolExecutor(1))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None:
            try:
                self._flush().result()
            except BaseException as fault:
                if not self._stack.__exit__(type(fault), fault, fault.__traceback__):
                    raise
        return self._stack.__exit__(*error)

    def add(self, row: Recorded, where: str = "trace") -> None:
        """``where``: what the row is called in errors."""
        header = self.header
        check_row(row, header, where)
        place = f"{where}: step {row.step}, layer {row.layer}"
        if (row.step, row.layer) in self._seen:
            raise bad(place, "twice", "give each step and layer once")
        self._seen.add((row.step, row.layer))
        step_ended = bool(self._data["step"]) and self._data["step"][-1] != row.step
        if self._num_bytes >= (GROUP_BYTES if step_ended else 32 * GROUP_BYTES):
            self._flush()
        ids = weights = None
        counts, num_tokens = row.counts, int(row.counts.sum()) // header.top_k
        if header.kind == "tokens":
            plain, num_tokens = row.ids.astype(header.ids_dtype, copy=False), len(row.ids)
            counts, ids = counts_of_ids(plain, row.ranks, header.num_experts), plain.tobytes()
            weights = self._weights(row.weights, f"{place}: weights") if len(row.weights) or not num_tokens else None
        shown = counts.astype("<i4").tobytes()
        fields = (int(row.step), int(row.layer), num_tokens, float(row.loss))
        payload = digest_of(ids or b"", weights or b"")
        self._before = digest_of(self._before, *fields_of(*fields, row.ranks), shown, payload)
        values = (*fields, ids, weights, row.ranks, shown, payload, self._before)
        for name, value in zip(COLUMNS, values, strict=True):
            self._data[name].append(value)
        self._num_bytes += len(ids or b"") + len(weights or b"") + len(shown)

    def _weights(self, weights: np.ndarray, where: str) -> bytes:
        most = self.header.weight_scale * (1 + 1e-6) if self.header.weight_dtype == "u1" else np.finfo("<f4").max
        sound = (weights >= 0) & (weights <= most)  # so is NaN
        if not sound.all():
            least = "must lie in 0.." + (f"{self.header.weight_scale} (header.weight_scale)" if most < 1e38 else "inf")
            raise bad(where, float(weights[~sound][0]), least)
        if self.header.weight_dtype == "<f4":
            return weights.astype("<f4").tobytes()
        return np.rint(weights / self.header.weight_scale * 255).clip(0, 255).astype("u1").tobytes()

    def _flush(self) -> Future[None]:
        """Rows are compressed and written while the next ones are checked; one group waits at most."""
        table = pa.table(self._data, schema=pa.schema(COLUMNS))
        if self._written is not None:
            self._written.result()
        self._written = self._thread.submit(self._file.write_table, table)
        self._data, self._num_bytes = {name: [] for name in COLUMNS}, 0
        return self._written


def check_writable(path: Path) -> None:
    """Fail now and not after minutes of work. Errors: a folder that cannot be written to, a folder as ``path``, a file
    that is there and no trace."""
    outputs.check(path, is_ours=lambda there: HEADER_KEY in _tail(there))


def _tail(path: Path) -> bytes:
    """The end of a file, where Parquet has its metadata; twice, as Arrow's own schema repeats it."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - (64 << 20)))
        return file.read()


def write_trace(path: Path, header: Header, rows: Sequence[Recorded], level: int = SMALL) -> None:
    """Write the whole file or nothing; errors are those of ``Writer``."""
    with Writer(path, header, level) as writer:
        for row in rows:
            writer.add(row)
