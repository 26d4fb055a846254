"""Which of two placements is better on tokens that neither was planned with, and whether that could be chance.

Held-out tokens are drawn again, window by window with replacement; ``J`` of both placements on the same draws gives the
interval of their ratio. Units are those of the whole held-out part.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from methods.moetuner.objective import Problem
from methods.moetuner.profile import Profile

DRAWS, MAX_WINDOWS = 400, 64
INTERVAL = (2.5, 97.5)


def ratios(
    problem: Problem, held: np.ndarray, owners: Mapping[str, np.ndarray], own: str, window: int
) -> dict[str, tuple[float, float, float]]:
    """J of the placement ``own`` over that of each other one: on ``held`` int [L, T, k], and the ends of its 95 %
    interval. Below 1 ``own`` is better. ``window``: tokens that follow one another and are drawn together."""
    num_experts, num_ranks = problem.profile.num_experts, problem.num_ranks
    each = max(window, -(-held.shape[1] // MAX_WINDOWS))
    parts = [Profile.of_ids(held[:, at : at + each], num_experts) for at in range(0, held.shape[1], each)]
    whole = Problem(Profile.of_ids(held, num_experts), problem.cost, problem.node)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), DRAWS)
    weights = np.concatenate([np.ones((1, len(parts))), drawn]).astype(np.float64)  # first: each once
    found = {}
    for name, owner in owners.items():
        on = (owner[:, :, None] == np.arange(num_ranks)).astype(np.float64)  # [L, E, G]
        loads = np.stack([np.einsum("le,leg->lg", part.load, on) for part in parts])
        between = np.stack([on[:-1].transpose(0, 2, 1) @ part.flow @ on[1:] for part in parts])
        load = np.tensordot(weights, loads, 1)  # [draws, L, G]
        o1 = np.abs(load - load.mean(2, keepdims=True)).sum((1, 2))
        o2 = (np.tensordot(weights, between, 1) * problem.cost).max((2, 3)).sum(1) if len(on) > 1 else np.zeros(len(o1))
        found[name] = sum(
            (value / scale if scale else value * 0.0 for value, scale in zip((o1, o2), whole.yardstick, strict=True)),
            np.zeros(len(o1)),
        )
    answer = {}
    for name, value in found.items():
        ratio = found[own] / np.maximum(value, 1e-12)
        low, high = np.percentile(ratio[1:], INTERVAL)
        answer[name] = (float(ratio[0]), float(low), float(high))
    return answer


__all__ = ["ratios"]
