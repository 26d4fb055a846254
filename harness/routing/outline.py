"""A routing whose loads are known without its tokens, for plans of large models: ids are drawn when asked for.

Where a step has more than ``MOST_IDS`` ids, a sample of tokens tells who shares a rank or node. Against drawing every
token (4 layers of Qwen3-235B-A22B's shape on 2 x 8 ranks of 2,048 tokens, Zipf 4, 12 steps of warm-up, two seeds) a
step takes 0.1 % more under ``hiermoe-hd2`` and ``hiermoe-hd2-smart``, and 1.4 to 1.6 % more under ``hiermoe``, whose
swaps are decided by the sample too.
"""

from __future__ import annotations

import functools

import numpy as np

from harness.routing.groups import bends
from harness.routing.make import counts_of, planned_routing, sampled_routing
from harness.routing.types import Routing
from harness.specs import Model, Workload
from harness.topology import Topology

MOST_IDS = 1 << 22  # of a step: as many are drawn within a second or two
SAMPLE_TOKENS = 1 << 14  # of all ranks, of each layer
LEAST_TOKENS, MOST_TOKENS = 16, 128  # of a rank


class Outlined(Routing):
    """``planned_routing``. ``few``: tokens of a rank that stand for all where tokens are asked for one by one; None:
    none do."""

    few: int | None
    sampled: bool = False  # whether a sample has been asked for
    _of: tuple[Workload, Model, Topology]
    _at: tuple[int, int]  # step and layer

    def __init__(
        self, workload: Workload, model: Model, topology: Topology, *, step: int, layer: int, few: int | None = None
    ):
        values = self.__dict__  # which is frozen otherwise
        values["tokens"], values["num_experts"] = workload.tokens(topology.num_ranks), model.num_experts
        values["few"], values["_of"], values["_at"] = few, (workload, model, topology), (step, layer)

    @functools.cached_property
    def ids(self) -> np.ndarray:  # type: ignore[override]
        return planned_routing(*self._of, step=self._at[0], layer=self._at[1]).ids

    @property
    def top_k(self) -> int:
        return int(self._of[1].top_k)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        return _counts(self._of, self._at, self.few)

    @property
    def estimated(self) -> bool:
        """Whether loads are from a sample too."""
        workload, model, _ = self._of
        return self.few is not None and (workload.generator == "markov" or bends(workload, model))

    @property
    def sample(self) -> Routing:
        if self.few is None:
            return self
        self.__dict__["sampled"] = True
        return sampled_routing(*self._of, step=self._at[0], layer=self._at[1], most_tokens=self.few)


@functools.lru_cache(maxsize=256)  # the systems of a race ask for the same ones
def _counts(of: tuple[Workload, Model, Topology], at: tuple[int, int], few: int | None) -> np.ndarray:
    found = counts_of(*of, step=at[0], layer=at[1], most_tokens=few)
    found.setflags(write=False)
    return found


def few_tokens(workload: Workload, model: Model, topology: Topology, num_layers: int) -> int | None:
    """Of a rank, which stand for all where a step has more than ``MOST_IDS``; None: all are drawn."""
    ids = num_layers * sum(workload.tokens(topology.num_ranks)) * model.top_k
    return None if ids <= MOST_IDS else min(MOST_TOKENS, max(LEAST_TOKENS, SAMPLE_TOKENS // topology.num_ranks))


__all__ = ["MOST_IDS", "Outlined", "few_tokens"]
