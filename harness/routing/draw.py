"""What a generator of routings may depend on, and the tools that several of them use."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

from harness.errors import bad
from harness.routing.deal import rounded
from harness.specs import Model, Spec, Workload
from harness.topology import Topology

CHUNK_ELEMENTS = 1 << 22  # of a [tokens, E] work array
PROFILE_STEP = 1_000_000  # whose tokens placements are planned by: far from all that is served


class NoParams(Spec):
    """The generator has no parameters."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """What a generator may depend on."""

    where: str  # names the workload in errors
    num_experts: int
    top_k: int
    tokens: tuple[int, ...]  # of each rank
    topology: Topology
    generator: str
    seed: int
    step: int
    layer: int
    num_groups: int = 1  # of the model's experts

    @classmethod
    def of(cls, workload: Workload, model: Model, topology: Topology, step: int, layer: int) -> Draw:
        where = f"workload {workload.name} ({workload.generator}).params"
        tokens = workload.tokens(topology.num_ranks)
        shape = model.num_experts, model.top_k, tokens, topology
        return cls(where, *shape, workload.generator, workload.seed, step, layer, model.num_groups)

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([zlib.crc32(self.generator.encode()), self.seed, self.layer, *stream])

    def popularity_rng(self) -> np.random.Generator:
        """The same at every step and rank: who is hot."""
        return self._rng(0)

    def step_rng(self) -> np.random.Generator:
        """The same on every rank of a step."""
        return self._rng(1, self.step)

    def rank_rng(self, rank: int) -> np.random.Generator:
        return self._rng(2, self.step, rank)

    def sample_rng(self) -> np.random.Generator:
        return self._rng(3, self.step)

    def walk_rng(self, level: int, index: int) -> np.random.Generator:
        """Of one point of time, whatever the step."""
        return self._rng(4, level, index)

    def bad(self, param: str, value: object, remedy: str) -> Exception:
        return bad(f"{self.where}.{param}", value, remedy)


def rounded_use(draw: Draw, use: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """int64 [W, E]: every rank uses expert e ``T_rank * use[e]`` times, rounded up or down. ``rng``: by default the
    step's."""
    assert np.isclose(use.sum(), draw.top_k)
    assert use.max() <= 1 + 1e-9
    rng, tokens = rng or draw.step_rng(), np.array(draw.tokens)
    order, phase = rng.permutation(draw.num_experts), rng.random()
    golden = (5**0.5 - 1) / 2  # spreads the ranks' phases, so that their roundings cancel in the sum
    phases = (phase + np.arange(len(tokens)) * golden) % 1
    return rounded(tokens[:, None] * use, tokens * draw.top_k, order, phases)


def largest(keys: np.ndarray, top_k: int) -> np.ndarray:
    """Columns of the k largest keys of each row, largest first."""
    found = best(keys, top_k)
    order = (-np.take_along_axis(keys, found, 1)).argsort(1)
    return np.take_along_axis(found, order, 1)


def best(keys: np.ndarray, top_k: int) -> np.ndarray:
    """The same columns in any order."""
    return np.argpartition(keys, -top_k, axis=1)[:, -top_k:]


def chunks(num_tokens: int, num_experts: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // num_experts)
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
