"""Arrays of a trace's source, .npy, .npz and .pt, read step by step: no file is held as a whole.

ids          [steps, layers, tokens, k], or without steps, or of one layer; ``weights`` alike
counts       [steps, ranks, layers, experts], or without ranks, or without steps too
rank_tokens  tokens of each rank, [ranks] or [steps, ranks], of ids
steps, layers, loss [steps] or [steps, layers], num_experts, top_k
"""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from harness.errors import bad

SMALL = ("steps", "layers", "rank_tokens", "loss", "num_experts", "top_k")
LARGE = ("ids", "weights", "counts")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Of one layer at one step, all tokens or some, of all ranks or one: ids [T, k] and perhaps weights alike, or
    counts [R, E]. ``told``: whether its rows are ranks; ``ranks``: tokens of each, of ids; ``adds``: counts of what
    came to a rank, whatever rank it came from, which are added up."""

    place: str  # in the source, for errors
    step: int
    layer: int
    ids: np.ndarray | None = None
    weights: np.ndarray | None = None
    counts: np.ndarray | None = None
    loss: float = np.nan
    rank: int | None = None
    ranks: tuple[int, ...] | None = None
    told: bool = False
    adds: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """An array whose first axis is read bit by bit."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Iterator[np.ndarray]]

    def whole(self) -> np.ndarray:
        if not self.shape:
            return next(self.read())
        return np.stack(list(self.read())) if self.shape[0] else np.zeros(self.shape, self.dtype)


# ---- files -------------------------------------------------------------------------------------------------------


def of_npy(path: Path) -> dict[str, Series]:
    return {"": _series(lambda: path.open("rb"), "", path.name, path.stat().st_size)}


def of_npz(path: Path) -> dict[str, Series]:
    def opened(member: str) -> Callable[[], IO[bytes]]:
        return lambda: zipfile.ZipFile(path).open(member)

    with zipfile.ZipFile(path) as archive:
        members = {each.filename: each.file_size for each in archive.infolist()}
    found = {}
    for member, size in members.items():
        name = member.removesuffix(".npy")
        found[name] = _series(opened(member), name, f"{path.name}: {name}", size)
    return found


def _series(opened: Callable[[], IO[bytes]], name: str, where: str, num_bytes: int) -> Series:
    with opened() as file:
        shape, dtype = _head(file, where)
        size = int(np.prod(shape)) * dtype.itemsize
        start = file.tell()
        if start + size != num_bytes:
            remedy = f"says it is {dtype} {list(shape)}, {size} bytes; it is cut off or damaged, copy it again"
            raise bad(where, f"{num_bytes - start} bytes", remedy)

    def read() -> Iterator[np.ndarray]:
        with opened() as file:
            _head(file, where)
            rows, each = (shape[0], shape[1:]) if shape else (1, ())
            size = int(np.prod(each)) * dtype.itemsize
            for at in range(rows):
                content = _exactly(file, size)
                if len(content) < size:
                    raise bad(where, f"[{at}]", "the file ends there; it is cut off, copy it again")
                yield np.frombuffer(content, dtype).reshape(each)

    return Series(name, shape, dtype, read)


def _exactly(file: IO[bytes], size: int) -> bytearray:
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size and (more := file.readinto(view[done:])):  # type: ignore[attr-defined]
        done += more
    return content if done == size else content[:done]


def _head(file: IO[bytes], where: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise bad(where, f"version {version}", "of the format .npy is not known; save it with numpy.save")
    of_version = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = of_version(file)
    if dtype.hasobject:
        raise bad(where, str(dtype), "is a pickle of Python objects, which is not opened; save an array of numbers")
    if fortran and len(shape) > 1:
        raise bad(where, "Fortran order", "cannot be read step by step; save numpy.ascontiguousarray of it")
    return shape, dtype


def of_pt(path: Path) -> Any:
    """What a torch file holds, its tensors on disk until they are read. Nothing of it is executed."""
    import torch

    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with contextlib.suppress(RuntimeError):  # of an older kind, which has to be held
        return torch.load(path, mmap=True, **options)
    return torch.load(path, **options)


def of_tensor(value: Any, name: str) -> Series:
    """A torch tensor, or plain numbers."""
    if not hasattr(value, "numpy"):
        array = np.asarray(value)
        return Series(name, array.shape, array.dtype, lambda: iter(array if array.shape else [array]))
    dtype = value[:0].numpy().dtype if value.ndim else value.numpy().dtype
    parts = value if value.ndim else [value]
    return Series(name, tuple(value.shape), dtype, lambda: (np.array(part.numpy()) for part in parts))


# ---- parts -------------------------------------------------------------------------------------------------------


def parts_of(arrays: Mapping[str, Series], where: str, kind: str | None, num_ranks: int | None) -> Iterator[Part]:
    """``kind``: tokens or counts, of an array without a name that says it."""
    named = dict(arrays)
    unknown = [name for name in named if name not in (*SMALL, *LARGE)]
    if unknown and not {"ids", "counts"} & set(named) and len(unknown) == 1:
        named[_called(unknown[0], where, kind)] = named.pop(unknown[0])
    elif unknown:
        raise bad(where, unknown[0], f"unknown; known arrays are {', '.join((*LARGE, *SMALL))}")
    if ("ids" in named) == ("counts" in named):
        raise bad(where, ", ".join(named) or "nothing", "must hold ids or counts, one of the two")
    small = {name: named[name].whole() for name in SMALL if name in named}
    yield from _of_ids(named, small, where, num_ranks) if "ids" in named else _of_counts(named["counts"], small, where)


def _called(name: str, where: str, kind: str | None) -> str:
    if kind is None:
        text = f"{name} {where}".lower()
        kind = "counts" if "count" in text or "load" in text else "tokens"
    return {"tokens": "ids", "counts": "counts"}[kind]


def _of_ids(
    named: Mapping[str, Series], small: Mapping[str, np.ndarray], where: str, num_ranks: int | None
) -> Iterator[Part]:
    ids = named["ids"]
    if not 2 <= len(ids.shape) <= 4:
        raise bad(f"{where}: ids", list(ids.shape), "must be [steps, layers, tokens, k], or without steps or layers")
    if "weights" in named and named["weights"].shape != ids.shape:
        raise bad(f"{where}: weights", list(named["weights"].shape), f"must be as ids, {list(ids.shape)}")
    shape = (1,) * (4 - len(ids.shape)) + ids.shape
    steps, layers, loss = _labels(small, shape[0], shape[1], where)
    tokens = _rank_tokens(small, shape, where, num_ranks)
    weights = _by_step(named["weights"], shape) if "weights" in named else iter([None] * shape[0])
    for at, (of_step, of_weights) in enumerate(zip(_by_step(ids, shape), weights, strict=True)):
        for layer, number in enumerate(layers):
            yield Part(
                where,
                steps[at],
                number,
                ids=of_step[layer],
                weights=None if of_weights is None else of_weights[layer],
                loss=float(loss[at, layer]),
                ranks=None if tokens is None else tokens[at],
            )


def _of_counts(counts: Series, small: Mapping[str, np.ndarray], where: str) -> Iterator[Part]:
    if not 2 <= len(counts.shape) <= 4:
        remedy = "must be [steps, layers, experts] or [steps, ranks, layers, experts]"
        raise bad(f"{where}: counts", list(counts.shape), remedy)
    told = len(counts.shape) == 4
    shape = (1,) * (3 - len(counts.shape)) + counts.shape
    steps, layers, loss = _labels(small, shape[0], shape[-2], where)
    for at, of_step in enumerate(_by_step(counts, shape)):
        by_rank = of_step if told else of_step[None]  # [R, L, E]
        for layer, number in enumerate(layers):
            yield Part(where, steps[at], number, counts=by_rank[:, layer], told=told, loss=float(loss[at, layer]))


def _by_step(series: Series, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    if series.shape == shape:
        return series.read()
    return iter(series.whole().reshape(shape))


def _labels(
    small: Mapping[str, np.ndarray], num_steps: int, num_layers: int, where: str
) -> tuple[list[int], list[int], np.ndarray]:
    """Numbers of steps and layers, and losses [steps, layers]."""
    found = []
    for name, number in (("steps", num_steps), ("layers", num_layers)):
        values = small.get(name, np.arange(number))
        if values.shape != (number,) or not np.issubdtype(values.dtype, np.integer):
            raise bad(f"{where}: {name}", f"{values.dtype} {list(values.shape)}", f"must be {number} whole numbers")
        if len(np.unique(values)) < number or (values < 0).any():
            raise bad(f"{where}: {name}", values.tolist(), "must be from 0 on, and none may stand there twice")
        found.append(values.tolist())
    loss = np.asarray(small.get("loss", np.full(num_steps, np.nan)), dtype=np.float64)
    if loss.shape not in ((num_steps,), (num_steps, num_layers)):
        raise bad(f"{where}: loss", list(loss.shape), f"must be [{num_steps}] or [{num_steps}, {num_layers}]")
    return found[0], found[1], np.broadcast_to(loss.reshape(num_steps, -1), (num_steps, num_layers))


def _rank_tokens(
    small: Mapping[str, np.ndarray], shape: tuple[int, ...], where: str, num_ranks: int | None
) -> list[tuple[int, ...]] | None:
    """Of each step, tokens of each rank."""
    tokens = small.get("rank_tokens")
    if tokens is None and num_ranks is None:
        return None
    if tokens is None:
        assert num_ranks is not None
        if shape[2] % num_ranks:
            raise bad("--ranks", num_ranks, f"does not divide the {shape[2]} tokens of {where}; give rank_tokens")
        tokens = np.full(num_ranks, shape[2] // num_ranks)
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and len(tokens) != shape[0]):
        raise bad(f"{where}: rank_tokens", list(tokens.shape), f"must be [ranks] or [{shape[0]} steps, ranks]")
    every = np.broadcast_to(tokens, (shape[0], tokens.shape[-1]))
    if (every < 0).any() or (every.sum(1) != shape[2]).any():
        raise bad(f"{where}: rank_tokens", tokens.tolist(), f"must sum to {shape[2]} tokens")
    return [tuple(map(int, each)) for each in every]


def hints_of(arrays: Mapping[str, Series]) -> dict[str, int]:
    """What a source says itself of ``num_experts`` and ``top_k``."""
    return {name: int(arrays[name].whole()) for name in ("num_experts", "top_k") if name in arrays}


__all__ = ["LARGE", "SMALL", "Part", "Series", "hints_of", "of_npy", "of_npz", "of_pt", "of_tensor", "parts_of"]
