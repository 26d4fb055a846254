"""DeepSeek-V3's group limit: a token's experts lie in at most ``topk_groups`` of ``num_groups`` expert groups."""

from __future__ import annotations

import numpy as np

from harness.routing.generators import largest
from harness.specs import Model

BLOCK = 1 << 16  # tokens at a time: the work arrays are [tokens, E]


def limits_groups(model: Model) -> bool:
    return model.gate == "sigmoid" and model.topk_groups is not None and model.topk_groups < model.num_groups


def within_groups(ids: np.ndarray, model: Model, rng: np.random.Generator) -> np.ndarray:
    """The routing nearest to ``ids`` int [T, k] that the model's gate can choose, int32 [T, k].

    A token keeps the groups in which most of its experts lie. Each expert outside them is replaced by one inside,
    drawn by how often the whole routing uses it, so that what was hot stays hot.
    """
    if not limits_groups(model):
        return ids
    log_use = np.log(np.bincount(ids.ravel(), minlength=model.num_experts) + 1.0)
    parts = [_block(ids[start : start + BLOCK], model, log_use, rng) for start in range(0, len(ids), BLOCK)]
    return np.concatenate(parts).astype(np.int32) if parts else ids


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
