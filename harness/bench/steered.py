"""A GPT whose MoE layers stand behind a prescribed routing, or behind none: systems' layers, or the oracle's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from harness.dtypes import TORCH_DTYPE
from harness.layer import gates
from harness.layer.gpt import GPT
from harness.layer.oracle import Oracle
from harness.layer.weights import Weights
from harness.specs import EXPERTS_CHOOSE, Experiment
from harness.system import Case, MoELayer, System


class Steered(nn.Module):
    """``layer`` behind a prescribed routing: ``ids`` of the current step, or None to let the gate choose."""

    layer: MoELayer | OracleLayer

    def __init__(self, layer: MoELayer | OracleLayer, directions: torch.Tensor | None):
        super().__init__()
        self.layer = layer
        self.directions: torch.Tensor | None
        self.inverse: torch.Tensor | None
        self.register_buffer("directions", directions)  # ``Weights.directions`` in float32 or float64; None: natural
        self.register_buffer("inverse", None if directions is None else torch.linalg.pinv(directions))
        self.ids: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, M] -> y [T, M]."""
        return self.layer(self.steer(x))

    def steer(self, x: torch.Tensor) -> torch.Tensor:
        """What enters the layer: x [T, M] so that the gate chooses ``ids``."""
        if self.ids is None:
            return x
        assert self.directions is not None
        return gates.steer(x.to(self.directions.dtype), self.directions, self.ids, self.inverse).to(x.dtype)


class OracleLayer(nn.Module):
    """The dense oracle with the system's documented drop rule, over the tokens of all ranks."""

    def __init__(self, weights: Weights, system: type[System], case: Case):
        super().__init__()
        self.oracle = Oracle(weights, tokens=case.routing.tokens, exchange_dtype=case.exchange_dtype)
        self.system, self.case = system, case

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = None
        if self.case.model.capacity_factor is not None and self.case.model.gate not in EXPERTS_CHOOSE:
            probabilities = self.oracle.logits(x).softmax(-1).detach()
            kept = self.system.kept(self.case, list(probabilities.split(list(self.case.routing.tokens))))
        return self.oracle(x, None if kept is None else torch.cat(kept))


def steered_gpt(
    experiment: Experiment,
    moe: Callable[[int, Weights], MoELayer | OracleLayer],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    weights_of: Callable[[int], Weights] | None = None,
) -> GPT:
    """The experiment's GPT with MoE layers from ``moe`` (layer, its weights), each behind a ``Steered``.
    ``weights_of``: a layer's weights, by default drawn."""
    model, seed = experiment.model, experiment.workload.seed
    prescribed = experiment.workload.generator != "natural"
    steer_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def make(layer: int) -> nn.Module:
        weights = weights_of(layer) if weights_of else Weights(model, experiment.dtype, seed=seed, layer=layer)
        return Steered(moe(layer, weights), weights.directions.to(device, steer_dtype) if prescribed else None)

    gpt = GPT(model, make, seed=seed, dtype=dtype, device=device)
    # Drawn in the experiment's format, so that the oracle starts from the same numbers.
    with torch.no_grad():
        for parameter in gpt.replicated_parameters():
            parameter.copy_(parameter.to(TORCH_DTYPE[experiment.dtype]))
    return gpt
