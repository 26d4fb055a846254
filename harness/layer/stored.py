"""Weights of a language model that ``moebench record`` trained, in a file of plain arrays (numpy's .npz)."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harness.dtypes import TORCH_DTYPE
from harness import outputs
from harness.errors import bad
from harness.layer.gpt import GPT
from harness.layer.weights import Weights
from harness.specs import Dtype, Model

Arrays = dict[str, np.ndarray]


def save(path: Path, gpt: nn.Module) -> None:
    """Every parameter and buffer by name, float32; ``UserError`` for a file that cannot be written."""
    with outputs.whole(path, "--weights") as file:
        np.savez_compressed(file, **{name: value.numpy() for name, value in gpt.state_dict().items()})  # type: ignore[arg-type]


def check_out(path: Path) -> None:
    """``UserError`` if ``save`` could not write, or would replace what are no weights of a model."""
    outputs.check(path, "--weights", outputs.starts_with(b"token.weight.npy"))


def load(path: Path, model: Model) -> Arrays:
    """``UserError`` names the file if it cannot be read or is of another model. Reading executes nothing of it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        again = "make it with moebench record --weights FILE"
        raise bad("weights", str(path), f"cannot be read ({str(error).splitlines()[0]}); {again}") from None
    last, experts = f"blocks.{model.num_layers - 1}", (model.num_experts, model.hidden, model.ffn)
    shapes = {
        "token.weight": (model.vocab, model.hidden),
        "position.weight": (model.seq, model.hidden),
        f"{last}.moe.experts.w1": experts,
        f"{last}.moe.gate.router": (model.hidden, model.num_experts),
    }
    for name, shape in shapes.items():
        if name not in arrays or arrays[name].shape != shape:
            own = list(arrays[name].shape) if name in arrays else "missing"
            raise bad(f"weights {path.name}: {name}", own, f"must be {list(shape)} for the model {model.name}")
    if f"blocks.{model.num_layers}.moe.experts.w1" in arrays:
        raise bad(f"weights {path.name}", "more layers", f"the model {model.name} has {model.num_layers}")
    return arrays


@dataclasses.dataclass(frozen=True)
class StoredWeights(Weights):
    """One MoE layer's, rounded to ``dtype`` before anybody uses them."""

    arrays: Arrays = dataclasses.field(default_factory=dict, compare=False)

    def _stored(self, name: str) -> torch.Tensor:
        array = self.arrays[f"blocks.{self.layer}.moe.{name}"]
        return torch.from_numpy(array).double().to(TORCH_DTYPE[self.dtype])

    @property
    def router(self) -> torch.Tensor:
        return self._stored("gate.router")

    @property
    def bias(self) -> torch.Tensor:
        return self._stored("bias")

    def gate(self, max_tokens: int) -> dict[str, torch.Tensor]:
        return {name: self._stored(f"gate.{name}") for name in super().gate(max_tokens)}

    def expert(self, index: int) -> dict[str, torch.Tensor]:
        names = ("w1", "w2", "w3") if self.model.ffn_type == "swiglu" else ("w1", "w2")
        return {name: self._stored(f"experts.{name}")[index] for name in names}


@torch.no_grad()
def fill(gpt: GPT, arrays: Arrays, dtype: Dtype) -> None:
    """Everything outside the MoE layers, rounded to ``dtype``."""
    inside = {name for name, _ in gpt.named_parameters() if ".moe." in name}
    for name, parameter in gpt.named_parameters():
        if name not in inside:
            parameter.copy_(torch.from_numpy(arrays[name]).to(TORCH_DTYPE[dtype]))


__all__ = ["StoredWeights", "fill", "load", "save"]
