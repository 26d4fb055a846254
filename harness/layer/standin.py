"""Computation as a timed wait, as long as a cluster's gemm costs say, so that two cores can stand for eight GPUs.

What waits hands its input on, and its parameters get gradients of zeros, once: what is sent keeps its size, and so does
what the optimizer does. Values mean nothing. It is the processor that waits: a GPU would go on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from harness.specs import Gemm


def refusal(device: torch.device | str, gemm: Gemm | None) -> str | None:
    """Why computation on ``device`` cannot be a wait of as long as ``gemm`` says; None if it can."""
    if torch.device(device).type != "cpu":
        return "stand-in compute is for ranks that share a CPU; on a GPU give compute: real"
    return None if gemm is not None else "stand-in compute needs the gemm constants of the cluster"


def wait(x: torch.Tensor, gemm: Gemm, count: int, macs: float, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """x as it is, after ``count`` matrix products of ``macs`` multiply-adds together; its backward takes twice as
    long."""
    assert x.device.type == "cpu"
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
        # Where experts are computed by pieces, adding the zeros of each piece would take longer than the wait.
        return dy, None, *(torch.zeros_like(p) if wanted and p.grad is None else None for p, wanted in needed)
