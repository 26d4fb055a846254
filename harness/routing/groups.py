"""Gates that mind groups of consecutive experts: DeepSeek-V3's, under which a token's experts lie in at most
``topk_groups`` of ``num_groups`` groups, and MoGE's, under which equally many lie in each."""

from __future__ import annotations

import numpy as np

from harness.routing.draw import best, largest
from harness.specs import Model, Workload

BLOCK = 1 << 16  # tokens at a time: the work arrays are [tokens, E]
OWN = 1e6  # more than any other preference of a token


def limits_groups(model: Model) -> bool:
    """Whether the gate cannot choose all routings, as it minds expert groups."""
    few = model.gate == "sigmoid" and model.topk_groups is not None and model.topk_groups < model.num_groups
    return few or model.gate == "moge"


def bends(workload: Workload, model: Model) -> bool:
    """Whether ``within_groups`` may change what the workload's generator makes."""
    return limits_groups(model) and not (model.gate == "moge" and workload.generator == "grouped")


def num_even_groups(workload: Workload, model: Model) -> int | None:
    """Groups of which every token takes equally many experts, by the gate or the workload; None if by neither."""
    stated = workload.params.get("num_groups") if workload.generator == "grouped" else None
    if stated is None and (model.gate == "moge" or workload.generator == "grouped"):
        return model.num_groups
    return None if stated is None else int(stated)


def within_groups(ids: np.ndarray, model: Model, rng: np.random.Generator) -> np.ndarray:
    """The routing nearest to ``ids`` int [T, k] that the model's gate can choose, int32 [T, k].

    DeepSeek-V3's: a token keeps the groups in which most of its experts lie. MoGE's: of too many experts in a group it
    keeps some. Each other expert is replaced by one that the gate allows, drawn by how often the whole routing uses
    it, so that what was hot stays hot.
    """
    if not limits_groups(model):
        return ids
    log_use = np.log(np.bincount(ids.ravel(), minlength=model.num_experts) + 1.0)
    block = _from_each if model.gate == "moge" else _block
    parts = [block(ids[start : start + BLOCK], model, log_use, rng) for start in range(0, len(ids), BLOCK)]
    return np.concatenate(parts).astype(np.int32) if parts else ids


def _from_each(ids: np.ndarray, model: Model, log_use: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    size, num_each = model.num_experts // model.num_groups, model.top_k // model.num_groups
    used = (ids[:, :, None] // size == np.arange(model.num_groups)).sum(1)  # [T, groups]
    wrong = (used != num_each).any(1)
    few = ids[wrong]
    key = log_use + rng.gumbel(size=(len(few), model.num_experts))
    np.put_along_axis(key, few, np.take_along_axis(key, few, axis=1) + OWN, axis=1)
    chosen = best(key.reshape(-1, size), num_each).reshape(len(few), model.num_groups, num_each)
    found = ids.copy()
    found[wrong] = rng.permuted((chosen + size * np.arange(model.num_groups)[:, None]).reshape(few.shape), axis=1)
    return found


def _block(ids: np.ndarray, model: Model, log_use: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    group_of_expert = np.arange(model.num_experts) // (model.num_experts // model.num_groups)
    group = group_of_expert[ids]  # [T, k]
    used = (group[:, :, None] == np.arange(model.num_groups)).sum(1)  # [T, groups]
    kept = np.zeros_like(used, dtype=bool)
    score = used + 0.5 * rng.random(used.shape)  # ties at random: by index, the first groups would grow hot
    np.put_along_axis(kept, np.argsort(-score, axis=1)[:, : model.topk_groups], True, axis=1)
    outside = ~np.take_along_axis(kept, group, axis=1)

    key = log_use + rng.gumbel(size=(len(ids), model.num_experts))
    key[~kept[:, group_of_expert]] = -np.inf
    np.put_along_axis(key, ids, -np.inf, axis=1)
    best = largest(key, model.top_k)
    replacement = np.take_along_axis(best, np.maximum(outside.cumsum(1) - 1, 0), axis=1)
    return np.where(outside, replacement, ids)
