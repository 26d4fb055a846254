"""A piece of autograd of its own: cut off from what made its inputs, so that its backward is a task of its own, as
pipeline runtimes do it. Forward and backward of a step may then be cut differently, and other work may stand between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Optional = torch.Tensor | None


class Segment:
    """One pass, forward and then backward. It does not keep its function: what holds a segment is mostly held by that
    too, and memory in a circle is only freed by the collector, which stands still while times are taken."""

    def __init__(self) -> None:
        self.inputs: Sequence[Optional] = ()
        self.outputs: Sequence[Optional] = ()

    def forward(self, function: Callable[..., Any], *inputs: Optional) -> Any:
        """What ``function`` makes of the inputs (tensors, or None): a tensor, or a tuple of tensors and None, still
        with their graph; hand them to the next segment as they are."""
        self.inputs = [None if each is None else cut(each) for each in inputs]
        made = function(*self.inputs)
        self.outputs = made if isinstance(made, tuple) else (made,)
        return made

    def backward(self, *doutputs: Optional) -> list[Optional]:
        """Gradients of the inputs, None where none is wanted or nothing depends on one. Those of parameters are added
        to their ``grad``. Once; what forward kept is let go."""
        found: dict[int, torch.Tensor] = {}
        roots, grads = [], []
        for output, doutput in zip(self.outputs, doutputs, strict=True):
            if output is None or not output.requires_grad or doutput is None:
                continue
            same = next((i for i, each in enumerate(self.inputs) if each is output), None)
            if same is None:
                roots.append(output)
                grads.append(doutput)
            else:  # handed through: autograd would copy the gradient
                found[same] = doutput if same not in found else found[same] + doutput
        if roots:
            torch.autograd.backward(roots, grads)
        for i, each in enumerate(self.inputs):
            if each is not None and each.grad is not None:
                found[i] = each.grad if i not in found else found[i] + each.grad
        gradients = [found.get(i) for i in range(len(self.inputs))]
        self.inputs = self.outputs = ()
        return gradients


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, from nowhere."""
    return tensor.detach().requires_grad_(tensor.requires_grad)
