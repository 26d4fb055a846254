"""What is wrong with a tensor, and where: in words that tell whom to ask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from harness.dtypes import MOST
from harness.specs import Dtype
from harness.system import System

ZERO = 1e-12  # a tensor that is zero in exact arithmetic


def allowed(system: type[System], dtype: Dtype) -> float:
    """The largest relative error that ``system`` may have: what it states itself, as far as anybody may go."""
    stated = system.tolerance(dtype)
    return stated if stated <= MOST[dtype] else MOST[dtype]


@dataclasses.dataclass(frozen=True)
class Worst:
    """The largest error of a tensor, relative to the largest entry of what it should be, and where it is."""

    error: float
    where: str = ""


def worst_of(found: torch.Tensor, expected: torch.Tensor, scale: float, name: Callable[[Sequence[int]], str]) -> Worst:
    """Of ``found`` against ``expected``; ``scale``: the largest entry of the whole tensor that this is a part of, whose
    error is absolute where it is zero in exact arithmetic (the router's gradient when softmax over one chosen logit is
    1). ``name``: words for an index."""
    if found.shape != expected.shape:
        return Worst(math.inf, f"{name(())}: has shape {list(found.shape)} instead of {list(expected.shape)}")
    if not expected.numel():
        return Worst(0.0)
    difference = (found - expected).abs().nan_to_num(nan=math.inf)
    index = [int(each) for each in torch.unravel_index(difference.argmax(), difference.shape)]
    here, there = float(found[tuple(index)]), float(expected[tuple(index)])
    error = float(difference.max()) / (scale if scale > ZERO else 1.0)
    return Worst(error, f"{name(index)}: {apart(here, there, ' instead of ')}")


def worst(found: Iterable[Worst]) -> Worst:
    """The largest of them."""
    return max(found, key=lambda each: each.error, default=Worst(0.0))


def reason(found: Mapping[str, Worst], tolerance: float) -> str:
    """Which tensors are further off than allowed, by how much, and where; empty if none is."""
    return "; ".join(
        f"{tensor} off by {apart(each.error, tolerance, ', allowed ')}{each.where and f', at {each.where}'}"
        for tensor, each in found.items()
        if not each.error <= tolerance
    )


def apart(one: float, other: float, between: str) -> str:
    """Two numbers with as many digits as show that they differ, and at least four.

    >>> apart(0.1004, 0.1, ", allowed "), apart(1.00000009e-5, 1e-5, " > ")
    ('1.004e-01, allowed 1.000e-01', '1.0000001e-05 > 1.0000000e-05')
    """
    for digits in range(3, 17):
        texts = f"{one:.{digits}e}", f"{other:.{digits}e}"
        if texts[0] != texts[1] or one == other:
            break
    return between.join(texts)
