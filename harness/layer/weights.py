"""Weights of one MoE layer, drawn from (seed, layer, expert) alone, in the oracle's layout.

Every rank can draw any expert by itself, so no rank ever needs to hold or receive all of them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from harness.dtypes import TORCH_DTYPE
from harness.specs import GEMMS, Dtype, Model

# Streams of the generators: 0 and 1 the router and its bias, 3 e + 2 and on expert e, and above all experts these.
_PROJECTION, _NOISE, _SLOTS = 900_000, 900_001, 900_002


@dataclasses.dataclass(frozen=True)
class Weights:
    """Deterministic weights of layer ``layer``; values are rounded to ``dtype`` before anybody uses them, so that
    the oracle in float64 and a system in bfloat16 start from the same numbers."""

    model: Model
    dtype: Dtype
    seed: int = 0
    layer: int = 0

    def _draw(self, stream: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.layer) * 1_000_003 + stream)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(TORCH_DTYPE[self.dtype])

    @property
    def router(self) -> torch.Tensor:
        """W_g [M, E]; of xmoe [d, E]."""
        rows = self.model.projection_dim if self.model.gate == "xmoe" else self.model.hidden
        return self._draw(0, (rows, self.model.num_experts), 1 / math.sqrt(rows))

    @property
    def _projection(self) -> torch.Tensor:
        """W_proj of xmoe [M, d]."""
        return self._draw(_PROJECTION, (self.model.hidden, self.model.projection_dim), 1 / math.sqrt(self.model.hidden))

    @property
    def bias(self) -> torch.Tensor:
        """Selection bias of the sigmoid gate [E] (DeepSeek-V3's e_score_correction_bias); small, never in weights."""
        return self._draw(1, (self.model.num_experts,), 0.01)

    def gate(self, max_tokens: int) -> dict[str, torch.Tensor]:
        """The gate's trainable parameters by name. ``max_tokens``: of the rank with the most tokens.

        ``router`` [M, E]; with noise also ``noise`` [M, E]; of xmoe ``proj`` [M, d] and ``router`` [d, E]; of softmoe
        ``router`` [M, E, C], a column for each of the C slots of an expert: a rank of fewer tokens uses the first.
        """
        model = self.model
        shape, scale = (model.hidden, model.num_experts), 1 / math.sqrt(model.hidden)
        if model.gate == "softmoe":
            num_slots = max(1, capacity(model, max_tokens))
            return {"router": torch.stack([self._draw(_SLOTS + s, shape, scale) for s in range(num_slots)], -1)}
        parameters = {"router": self.router}
        if model.gate == "xmoe":
            parameters["proj"] = self._projection
        if model.gate_noise:
            parameters["noise"] = self._draw(_NOISE, shape, scale)
        return parameters

    @property
    def directions(self) -> torch.Tensor:
        """[M, E]: the order of a row of x @ directions is the order in which the gate prefers experts."""
        if self.model.gate != "xmoe":
            return self.router
        router = self.router.double()
        return self._projection.double() @ (router / router.norm(dim=0))

    def normal_noise(self, step: int, rank: int, num_tokens: int) -> torch.Tensor:
        """N(0, 1) of the noisy gate for the tokens of one rank at one step, float64 [T_rank, E]."""
        rng = np.random.default_rng([_NOISE, self.seed, self.layer, step, rank])
        return torch.from_numpy(rng.standard_normal((num_tokens, self.model.num_experts)))

    def expert(self, index: int) -> dict[str, torch.Tensor]:
        """w1 [M, H], w2 [H, M]; for swiglu w1 is the gate projection and w3 [M, H] the up projection. Number E is all
        shared experts side by side, of size ``Model.shared_size`` in the place of H."""
        return _DRAWN.get((self, index), lambda: self._expert(index))

    def _expert(self, index: int) -> dict[str, torch.Tensor]:
        m, h = self.model.hidden, self.model.shared_size if index == self.model.num_experts else self.model.ffn
        weights = {
            "w1": self._draw(3 * index + 2, (m, h), 1 / math.sqrt(m)),
            "w2": self._draw(3 * index + 3, (h, m), 1 / math.sqrt(h)),
        }
        if self.model.ffn_type == "swiglu":
            weights["w3"] = self._draw(3 * index + 4, (m, h), 1 / math.sqrt(m))
        return weights


class _Drawn:
    """The experts drawn last, as far as they are small: all systems of a race draw the same ones."""

    MAX_BYTES = 1 << 25

    def __init__(self) -> None:
        self.kept: collections.OrderedDict[Any, dict[str, torch.Tensor]] = collections.OrderedDict()
        self.num_bytes = 0

    def get(self, key: Any, draw: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A copy, for whoever changes it."""
        if key not in self.kept:
            drawn = draw()
            if (size := _bytes(drawn)) > self.MAX_BYTES // 8:
                return drawn
            self.kept[key], self.num_bytes = drawn, self.num_bytes + size
            while self.num_bytes > self.MAX_BYTES:
                self.num_bytes -= _bytes(self.kept.popitem(last=False)[1])
        return {name: value.clone() for name, value in self.kept[key].items()}


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


_DRAWN = _Drawn()


def shared_names(model: Model) -> dict[str, str]:
    """Of the shared experts' matrices among replicated parameters, each with its name in ``Weights.expert``."""
    names = ("w1", "w2", "w3")[: GEMMS[model.ffn_type]] if model.num_shared_experts else ()
    return {f"shared_{name}": name for name in names}


def capacity(model: Model, num_tokens: int) -> int:
    """Assignments that one expert takes from one rank's ``num_tokens`` tokens: ceil(f k T / E); f is 1 where the
    model has none (gates in which experts choose need one)."""
    return math.ceil((model.capacity_factor or 1.0) * model.top_k * num_tokens / model.num_experts)
