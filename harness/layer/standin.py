"""Computation as a timed wait, as long as a cluster's gemm costs say, so that two cores can stand for eight GPUs.

What waits hands its input on, and its parameters get gradients of zeros: what is sent keeps its size, and so does what
the optimizer does. Values mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from harness.specs import Gemm


def wait(x: torch.Tensor, gemm: Gemm, count: int, macs: float, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """x as it is, after ``count`` matrix products of ``macs`` multiply-adds together; its backward takes twice as
    long."""
    return _Wait.apply(x, count * gemm.alpha_s + macs * gemm.beta_s_per_mac, *parameters)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds, *parameters):  # type: ignore[no-untyped-def, override]
        ctx.seconds, ctx.parameters = seconds, parameters
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        time.sleep(2 * ctx.seconds)
        needed = zip(ctx.parameters, ctx.needs_input_grad[2:], strict=True)
        return dy, None, *(torch.zeros_like(p) if wanted else None for p, wanted in needed)
