"""From anybody's routing to a trace: ``moebench trace import``.

Each format yields parts (``harness.routing.arrays.Part``), step after step; one way behind them puts the parts of a
layer together, checks and writes them. A step is held at a time.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from harness.errors import UserError, bad, first_line
from harness.routing import arrays, dumps, tables
from harness.routing.arrays import Part
from harness.routing.recorded import Header, Recorded
from harness.routing.writing import FAST, Writer, check_writable

FORMATS = ("npz", "npy", "parquet", "jsonl", "csv", "pt", "vllm", "loads")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the source itself may leave open. ``format``: of ``FORMATS``, by default the suffix's; ``num_ranks``: that
    share each layer's tokens equally; ``num_tokens``: of each row of loads."""

    top_k: int | None = None
    num_experts: int | None = None
    kind: Literal["tokens", "counts"] | None = None
    format: str | None = None
    num_ranks: int | None = None
    num_tokens: int | None = None
    seed: int = 0
    model: str = ""
    corpus: str = "imported"


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import made."""

    path: str
    num_bytes: int
    kind: str
    steps: int
    layers: int
    experts: int
    top_k: int
    tokens: int  # of all steps, of one layer
    read_as: str


def import_trace(
    sources: Sequence[Path],
    out: Path,
    wanted: Wanted,
    command: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> Imported:
    """Several ``sources``, or a folder's files, are those of the ranks. ``UserError`` with file, place and remedy for
    what is no routing; then nothing is written."""
    check_writable(out)
    files = _files(sources)
    if any(path.resolve() == out.resolve() for path in files):
        raise bad("--out", str(out), "is the source itself; choose another place")
    read_as: list[str] = []
    hints: dict[str, int] = {}
    streams = [_parts(path, wanted, read_as, hints) for path in files]
    top_k, num_experts = (getattr(wanted, name) or hints.get(name) for name in ("top_k", "num_experts"))
    wanted = dataclasses.replace(wanted, top_k=top_k, num_experts=num_experts)
    with _readable(files):
        steps = _together([_by_step(stream) for stream in streams], files)
        first = next(steps, None)
        if first is None:
            raise bad("source", files[0].name, "is empty; there is no step in it")
        header = _header(first, files, wanted, read_as, command)
        layers, num_steps, num_tokens = [row.layer for row in _rows(first, header.top_k)], 0, 0
        with Writer(out, header, FAST) as writer:
            for parts in itertools.chain([first], steps):
                rows, place = _rows(parts, header.top_k), parts[0].place
                if [row.layer for row in rows] != layers:
                    _refuse_layers([row.layer for row in rows], layers, rows[0].step, place)
                for number, row in enumerate(rows):
                    writer.add(dataclasses.replace(row, layer=number), place)
                num_steps, num_tokens = num_steps + 1, num_tokens + _num_tokens(rows[0], header.top_k)
                progress(f"step {rows[0].step}")
    size = out.stat().st_size
    shape = (num_steps, len(layers), header.num_experts, header.top_k)
    return Imported(str(out), size, header.kind, *shape, num_tokens, header.source["format"])


def _files(sources: Sequence[Path]) -> list[Path]:
    found = []
    for source in sources:
        found += sorted(each for each in source.iterdir() if each.is_file()) if source.is_dir() else [source]
    for path in found:
        if not path.is_file():
            raise bad("source", str(path), "there is no such file; give the routing to import")
        if not path.stat().st_size:
            raise bad("source", str(path), "is empty; there is nothing in it")
    if not found:
        raise bad("source", str(sources[0]), "is an empty folder; give the routing to import")
    return found


def _parts(path: Path, wanted: Wanted, read_as: list[str], hints: dict[str, int]) -> Iterator[Part]:
    """``read_as`` and ``hints`` get what the file is and says of itself."""
    suffix = path.suffix.removeprefix(".").lower()
    chosen = {"ndjson": "jsonl", "pth": "pt", "json": "jsonl"}.get(suffix, suffix)
    if wanted.format not in (None, *FORMATS):
        raise bad("--format", wanted.format, f"unknown; known formats are {', '.join(FORMATS)}")
    if wanted.format not in (None, "vllm", "loads"):
        chosen = str(wanted.format)
    if chosen not in FORMATS[:6]:
        remedy = f"is of no known format: {', '.join(FORMATS[:6])}; a pickle is not opened"
        raise bad("source", str(path), f"{remedy}; save numbers alone, or give --format")
    if wanted.format == "vllm" and chosen not in ("npy", "npz"):
        raise bad("--format", "vllm", f"is of arrays, .npy or .npz, and {path.name} is none")
    with _readable([path]):
        if chosen in ("npy", "npz"):
            found = arrays.of_npy(path) if chosen == "npy" else arrays.of_npz(path)
            if wanted.format == "vllm":
                found = dumps.turned(found, path.name)
            kind = "counts" if wanted.format == "loads" else wanted.kind
            hints |= arrays.hints_of(found)
            parts, words = arrays.parts_of(found, path.name, kind, wanted.num_ranks), chosen
        elif chosen == "pt":
            kind = "counts" if wanted.format == "loads" else wanted.kind
            parts, words = dumps.of_torch(path, kind, wanted.num_ranks, hints)
        else:
            if chosen == "parquet":
                rows = tables.of_parquet(path, wanted.top_k, wanted.num_experts)
            else:
                rows = tables.of_jsonl(path) if chosen == "jsonl" else tables.of_csv(path)
            parts, words = tables.parts_of(rows), chosen
    read_as.append(words if wanted.format in (None, chosen) else f"{words}, {wanted.format}")
    if wanted.format == "loads":
        if wanted.num_tokens is None or wanted.top_k is None:
            raise bad("--tokens", wanted.num_tokens, "loads say neither tokens nor k; give --tokens and --top-k")
        return dumps.scaled(parts, wanted.num_tokens, wanted.top_k)
    return parts


class _readable:
    """What a damaged file makes its reader raise, as one line."""

    def __init__(self, files: Sequence[Path]):
        self.names = ", ".join(path.name for path in files[:3])

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, pickle.UnpicklingError):
            remedy = "holds objects beside tensors and plain values, and a pickle is not opened; save tensors alone"
            raise bad("source", self.names, remedy) from None
        kinds = (
            pa.ArrowException,
            zipfile.BadZipFile,
            EOFError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
            LookupError,
        )
        if isinstance(error, kinds) and not isinstance(error, UserError):
            reason = first_line(error)[:300]
            raise bad("source", self.names, f"cannot be read ({reason}); it is damaged, cut off, or of another format")


# ---- parts of a step, put together -------------------------------------------------------------------------------


def _by_step(parts: Iterable[Part]) -> Iterator[list[Part]]:
    for _, of_step in itertools.groupby(parts, key=lambda part: part.step):
        yield list(of_step)


def _together(streams: Sequence[Iterator[list[Part]]], files: Sequence[Path]) -> Iterator[list[Part]]:
    """Of each step the parts of all files, which have the same steps; each file is a rank, unless it says another."""
    if len(streams) == 1:
        yield from streams[0]
        return
    for of_files in itertools.zip_longest(*streams):
        steps = {None if parts is None else parts[0].step for parts in of_files}
        if len(steps) > 1:
            lists = [(path.name, None if p is None else p[0].step) for path, p in zip(files, of_files, strict=True)]
            lacking = next(name for name, step in lists if step != lists[0][1])
            remedy = f"has not the steps of {files[0].name}, which are at {lists[0][1]}; give files of the same steps"
            raise bad("source", lacking, remedy)
        found = []
        for number, parts in enumerate(of_files):
            for part in parts:
                own = part.rank is None and not part.told and not part.adds
                found.append(dataclasses.replace(part, rank=number) if own else part)
        yield found


def _rows(parts: Sequence[Part], top_k: int) -> list[Recorded]:
    """Of each layer of a step, in order."""
    layers: dict[int, list[Part]] = {}
    for part in parts:
        layers.setdefault(part.layer, []).append(part)
    return [_row(layers[layer], top_k) for layer in sorted(layers)]


def _row(parts: Sequence[Part], top_k: int) -> Recorded:
    first = parts[0]
    where = f"{first.place}: step {first.step}, layer {first.layer}"
    kinds = {(part.ids is None, part.weights is None, part.rank is None) for part in parts}
    if len(kinds) > 1:
        raise bad(where, "mixed", "ids, counts, weights and ranks must be given for all of a layer or for none of it")
    ranks: list[list[Part]] = [list(parts)]
    if first.rank is not None:
        by_rank: dict[int, list[Part]] = {}
        for part in parts:
            by_rank.setdefault(part.rank or 0, []).append(part)
        if sorted(by_rank) != list(range(len(by_rank))):
            lacking = next(rank for rank in range(len(by_rank)) if rank not in by_rank)
            raise bad(where, f"rank {lacking}", "is missing; give every rank at every step and layer")
        ranks = [by_rank[rank] for rank in sorted(by_rank)]
    if first.counts is not None:
        if all(part.adds for part in parts):
            counts = np.sum([part.counts for part in parts if part.counts is not None], axis=0)
        else:
            for of_rank in ranks:
                if len(of_rank) > 1:
                    raise bad(f"{of_rank[1].place}: step {first.step}, layer {first.layer}", "twice", "give it once")
            if len({len(of_rank[0].counts[0]) for of_rank in ranks}) > 1:  # type: ignore[index]
                raise bad(where, "counts", "must be as many experts on every rank")
            counts = np.concatenate([of_rank[0].counts for of_rank in ranks])  # type: ignore[misc]
        told = first.told or first.rank is not None
        return Recorded.of_counts(first.step, first.layer, counts, told=told, top_k=top_k, loss=first.loss)
    every = [part for of_rank in ranks for part in of_rank]
    ids = _joined([part.ids for part in every], where)
    weights = np.zeros((0, top_k)) if first.weights is None else _joined([part.weights for part in every], where)
    told_ranks = first.ranks
    if first.rank is not None:
        told_ranks = tuple(sum(len(part.ids) for part in of_rank if part.ids is not None) for of_rank in ranks)
    return Recorded(first.step, first.layer, ids, weights, first.loss, told_ranks)


def _joined(parts: Sequence[np.ndarray | None], where: str) -> np.ndarray:
    found = [part for part in parts if part is not None]
    if len({part.shape[1:] for part in found}) > 1:
        raise bad(where, str([list(part.shape) for part in found][:4]), "all tokens must have the same k")
    return found[0] if len(found) == 1 else np.concatenate(found)


def _refuse_layers(layers: list[int], wanted: list[int], step: int, place: str) -> None:
    lacking, more = sorted(set(wanted) - set(layers)), sorted(set(layers) - set(wanted))
    text = f"layer {lacking[0]} is missing" if lacking else f"layer {more[0]} is one more"
    remedy = f"{text}: the first step has layers {wanted}; give the same at every step"
    raise bad(f"{place}: step {step}", layers, remedy)


def _num_tokens(row: Recorded, top_k: int) -> int:
    return len(row.ids) if len(row.ids) else int(np.nan_to_num(row.counts).sum()) // top_k


def _header(
    first: Sequence[Part], files: Sequence[Path], wanted: Wanted, read_as: Sequence[str], command: str
) -> Header:
    part = first[0]
    found_k = None if part.ids is None or part.ids.ndim != 2 else part.ids.shape[1]
    found_experts = None if part.counts is None else part.counts.shape[1]
    for name, given, found in (("--top-k", wanted.top_k, found_k), ("--experts", wanted.num_experts, found_experts)):
        if given is not None and found is not None and given != found:
            raise bad(name, given, f"but {part.place} has {found}; leave it out, or give the right source")
    top_k, num_experts = wanted.top_k or found_k, wanted.num_experts or found_experts
    if top_k is None:
        raise bad("--top-k", None, "counts do not say how many experts a token has; give it")
    if num_experts is None:
        raise bad("--experts", None, "ids do not say how many experts there are; give it, or --kind counts")
    if not 1 <= top_k <= num_experts:
        raise bad("--top-k", top_k, f"must lie in 1..{num_experts}, the number of experts")
    kind: Literal["tokens", "counts"] = "counts" if part.ids is None else "tokens"
    if wanted.kind not in (None, kind):
        raise bad("--kind", wanted.kind, f"but {part.place} has {kind}; leave it out, or give the right source")
    rule, source = "", _source(files, read_as)
    if kind == "counts":
        from harness.routing.loops import RULE

        rule = RULE
        if wanted.format == "loads":
            source["loads"] = f"scaled to {wanted.num_tokens} tokens a row, rounded, at most one an expert a token"
    numbers = sorted({each.layer for each in first})
    details: dict[str, str | int | float] = {}
    if numbers != list(range(len(numbers))):
        details["layers"] = ", ".join(map(str, numbers))  # as the source numbers them
    return Header(
        model=wanted.model or files[0].stem,
        num_experts=num_experts,
        top_k=top_k,
        num_layers=len(numbers),
        corpus=wanted.corpus,
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        weight_dtype="<f4",
        kind=kind,
        seed=wanted.seed,
        rule=rule,
        source=source,
        details=details,
    )


def _source(files: Sequence[Path], read_as: Sequence[str]) -> dict[str, str]:
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    names = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} to {files[-1].name}"
    return {"file": names, "sha256": sha256, "format": read_as[0] if read_as else ""}


__all__ = ["FORMATS", "Imported", "Wanted", "import_trace"]
