"""What inference servers and trainers write of their routing, each read by a few lines. Versions that were read:

SGLang    .pt of its expert recorder, modes stat, per_pass and per_token, a file a rank but for stat
          (python/sglang/srt/eplb/expert_distribution.py at 02295fe5)
vLLM      ``routed_experts`` [tokens, layers, k] of an answer, saved as .npy or .npz (--format vllm; documentation
          of v0.21.0, routed experts replay); its EPLB keeps loads in memory alone
Megatron  .jsonl of --moe-routing-trace-path, a file a rank (``harness.routing.tables`` knows its columns), and .pt
          of ``RouterReplay.get_recorded_data()``, a tensor [tokens, k] a layer (megatron-core, documentation of
          0.15.0 and, of the .jsonl, nightly)
DeepSpeed ``exp_counts`` [experts] that its MoE layer returns, a row a layer and rank (``harness.routing.tables``)
EPLB      load statistics ``weight`` [layers, experts], in any unit: --format loads, which takes --tokens too
          (deepseek-ai/EPLB, eplb.py)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import bad
from harness.routing.arrays import Part, Series, hints_of, of_pt, of_tensor, parts_of
from harness.routing.deal import in_whole_numbers


def of_torch(path: Path, kind: str | None, num_ranks: int | None, hints: dict[str, int]) -> tuple[Iterator[Part], str]:
    """Parts, and what kind of file it was. ``hints`` get what it says of itself."""
    found = of_pt(path)
    if isinstance(found, Mapping) and "records" in found:
        return _sglang_records(found, path.name), "SGLang, records"
    if isinstance(found, Mapping) and "logical_count" in found:
        return _sglang_stat(found["logical_count"], path.name), "SGLang, stat"
    if isinstance(found, (list, tuple)) and found and all(hasattr(each, "numpy") for each in found):
        return _megatron(found, path.name), "Megatron, RouterReplay"
    if hasattr(found, "numpy"):
        found = {"": found}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise bad(path.name, type(found).__name__, "must be a tensor, or a mapping from names to tensors")
    arrays = {name: of_tensor(value, name) for name, value in found.items() if value is not None}
    hints |= hints_of(arrays)
    return parts_of(arrays, path.name, kind, num_ranks), "torch"


def _sglang_stat(counts: Any, where: str) -> Iterator[Part]:
    """``counts`` [passes, layers, logical experts], of all ranks; passes that nobody made are zero."""
    for step, of_pass in enumerate(counts):
        of_pass = of_pass.numpy()
        for layer in range(len(of_pass)) if of_pass.any() else ():
            yield Part(f"{where}: logical_count", step, layer, counts=of_pass[layer][None])


def _sglang_records(found: Mapping[str, Any], where: str) -> Iterator[Part]:
    """Per token: of each rank. Per pass: of all ranks, where each has counted what came to it, or what it sent."""
    logical = np.asarray(found["last_physical_to_logical_map"])  # [layers, physical experts]
    for at, record in enumerate(found["records"]):
        place, step = f"{where}: record {at}", int(record["forward_pass_id"])
        if "topk_ids_of_layer" in record:
            physical = np.asarray(record["topk_ids_of_layer"])  # [layers, T, k], padded with -1
            whole = (physical >= 0).all((0, 2))
            if not (physical[:, ~whole] < 0).all():
                raise bad(place, "topk_ids_of_layer", "has tokens with experts in some layers alone")
            for layer, ids in enumerate(physical[:, whole]):
                yield Part(place, step, layer, ids=logical[layer][ids], rank=int(record["rank"]))
        else:
            counts = np.asarray(record["global_physical_count"])  # [layers, physical experts]
            for layer, of_layer in enumerate(counts):
                summed = np.bincount(logical[layer], weights=of_layer, minlength=int(logical.max()) + 1)
                yield Part(place, step, layer, counts=np.rint(summed).astype(np.int64)[None], adds=True)


def _megatron(layers: Iterable[Any], where: str) -> Iterator[Part]:
    for layer, ids in enumerate(layers):
        yield Part(f"{where}: layer {layer}", 0, layer, ids=ids.numpy())


def turned(arrays: Mapping[str, Series], where: str) -> dict[str, Series]:
    """vLLM's arrays have tokens first, then layers."""
    found = {}
    for name, series in arrays.items():
        if len(series.shape) != 3:
            raise bad(f"{where}: {name}", list(series.shape), "must be [tokens, layers, k], as vLLM answers")
        array = np.ascontiguousarray(series.whole().transpose(1, 0, 2))
        found[name] = Series(name, array.shape, array.dtype, lambda array=array: iter(array))  # type: ignore[misc]
    if {"prompt_routed_experts", "routed_experts"} == set(found):  # of one answer
        both = np.concatenate([found[name].whole() for name in ("prompt_routed_experts", "routed_experts")], axis=1)
        return {"ids": Series("ids", both.shape, both.dtype, lambda: iter(both))}
    if len(found) != 1:
        raise bad(where, ", ".join(found), "must be routed_experts, perhaps with prompt_routed_experts")
    return {"ids": next(iter(found.values()))}


def scaled(parts: Iterable[Part], num_tokens: int, top_k: int) -> Iterator[Part]:
    """Loads in any unit, as counts of ``num_tokens`` tokens of each row: in proportion, rounded, at most one of an
    expert a token."""
    for part in parts:
        if part.counts is None:
            raise bad(part.place, "ids", "have counts of their own; --tokens is for loads")
        loads = np.asarray(part.counts, np.float64)
        if not (np.isfinite(loads).all() and (loads >= 0).all() and (loads.sum(1) > 0).all()):
            wrong = loads[~(np.isfinite(loads) & (loads >= 0))]
            raise bad(part.place, float(wrong[0]) if len(wrong) else 0.0, "loads must be numbers from 0 on, not all 0")
        tokens = np.full(len(loads), num_tokens)
        wanted = loads / loads.sum(1, keepdims=True) * num_tokens * top_k
        yield dataclasses.replace(part, counts=in_whole_numbers(wanted, tokens, top_k))
