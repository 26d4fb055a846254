"""Weights of a language model that ``moebench record`` trained, in a file of plain arrays (numpy's .npz)."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from harness import outputs
from harness.dtypes import TORCH_DTYPE
from harness.errors import bad, first_line, unreadable
from harness.layer.gpt import GPT, Block, Ffn
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
    """``UserError`` names the file if it cannot be read, is of another model, or holds what is no finite number.
    Reading executes nothing of it."""
    again = "make it with moebench record --weights FILE"
    try:
        arrays = _read(path)
    except Exception as error:  # a damaged archive makes zipfile, zlib and numpy raise many kinds
        reason = first_line(error)
        raise unreadable("weights", str(path), f"cannot be read ({reason.replace(str(path), 'it')}); {again}") from None
    expected = shapes(model)
    for name, shape in expected.items():
        if name not in arrays or arrays[name].shape != shape:
            own = list(arrays[name].shape) if name in arrays else "missing"
            raise bad(f"weights {path.name}: {name}", own, f"must be {list(shape)} for the model {model.name}")
        if arrays[name].dtype != np.float32:
            raise bad(f"weights {path.name}: {name}", str(arrays[name].dtype), f"must be float32; {again}")
        if not (finite := np.isfinite(arrays[name])).all():
            wrong = float(arrays[name][~finite][0])
            raise bad(f"weights {path.name}: {name}", wrong, f"must hold finite numbers; {again}")
    if more := sorted(arrays.keys() - expected.keys()):
        what = "more layers" if more[0].startswith("blocks.") else more[0]
        raise bad(
            f"weights {path.name}", what, f"the model {model.name} has {model.num_layers} layers and no {more[0]}"
        )
    return arrays


def _read(path: Path) -> Arrays:
    """Every member read to its end, so that its checksum is looked at."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with io.BytesIO(archive.read(member)) as file:
                arrays[member.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Of everything that ``save`` keeps of a model of ``moebench record``, by name."""
    m, h, num_experts = model.hidden, model.ffn, model.num_experts
    found: dict[str, tuple[int, ...]] = {"token.weight": (model.vocab, m), "position.weight": (model.seq, m)}
    with torch.device("meta"):
        block = {name: tuple(value.shape) for name, value in Block(model, nn.Identity()).state_dict().items()}
        ffn = {name: tuple(value.shape) for name, value in Ffn(model, model.dense_ffn or 1).state_dict().items()}
    experts: dict[str, tuple[int, ...]] = {"w1": (num_experts, m, h), "w2": (num_experts, h, m)}
    if model.ffn_type == "swiglu":
        experts["w3"] = (num_experts, m, h)
    size = model.shared_size
    shared = {"w1": (1, m, size), "w2": (1, size, m), "w3": (1, m, size)} if size else {}
    gate: dict[str, tuple[int, ...]] = {"router": (m, num_experts)}
    if model.gate == "xmoe":
        gate = {"router": (model.projection_dim, num_experts), "proj": (m, model.projection_dim)}
    moe: dict[str, tuple[int, ...]] = {f"experts.{name}": shape for name, shape in experts.items()}
    moe |= {f"gate.{name}": shape for name, shape in gate.items()} | {"bias": (num_experts,)}
    moe |= {f"shared.all.{name}": shape for name, shape in shared.items() if name in experts}
    for layer in range(model.num_layers):
        found |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
        has_experts = layer in model.moe_layers
        found |= {f"blocks.{layer}.moe.{name}": shape for name, shape in (moe if has_experts else ffn).items()}
    return {**found, "norm.weight": (m,), "head.weight": (model.vocab, m)}


@dataclasses.dataclass(frozen=True)
class StoredWeights(Weights):
    """One MoE layer's, rounded to ``dtype`` before anybody uses them."""

    arrays: Arrays = dataclasses.field(default_factory=dict, compare=False)

    def _stored(self, name: str) -> torch.Tensor:
        array = self.arrays[f"blocks.{self.model.moe_layers[self.layer]}.moe.{name}"]
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
        if index == self.model.num_experts:
            return {name: self._stored(f"shared.all.{name}")[0] for name in names}
        return {name: self._stored(f"experts.{name}")[index] for name in names}


@torch.no_grad()
def fill(gpt: GPT, arrays: Arrays, dtype: Dtype) -> None:
    """Everything outside the MoE layers, rounded to ``dtype``."""
    outside = {id(parameter) for parameter in gpt.replicated_parameters()}
    for name, parameter in gpt.named_parameters():
        if id(parameter) in outside:
            parameter.copy_(torch.from_numpy(arrays[name]).to(TORCH_DTYPE[dtype]))


__all__ = ["StoredWeights", "fill", "load", "save"]
