"""This rank's experts as grouped GEMMs over rows sorted by expert."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from harness.layer.weights import Weights
from harness.specs import GEMMS, Gemm, Model


class Experts(nn.Module):
    """``w1`` [E_local, M, H], ``w2`` [E_local, H, M] and, for swiglu, ``w3`` [E_local, M, H].

    gpt: gelu(x w1) w2 with the exact (erf) GELU; swiglu: (silu(x w1) * (x w3)) w2. No biases.
    """

    def __init__(self, weights: Weights, local: Sequence[int], device: torch.device | str = "cpu"):
        super().__init__()
        self.local = [int(e) for e in local]
        self.ffn_type = weights.model.ffn_type
        drawn = [weights.expert(e) for e in self.local]
        self.w1: torch.Tensor
        self.w2: torch.Tensor
        self.w3: torch.Tensor
        self.names = ("w1", "w2", "w3") if self.ffn_type == "swiglu" else ("w1", "w2")
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.stack([w[name] for w in drawn]).to(device)))

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """x [R, M], rows of local expert 0 first; counts int64 [E_local] on the CPU, summing to R -> y [R, M]."""
        h = grouped_mm(x, self.w1, counts)
        h = F.silu(h) * grouped_mm(x, self.w3, counts) if self.ffn_type == "swiglu" else F.gelu(h)
        return grouped_mm(h, self.w2, counts)

    def gradients(self) -> dict[int, dict[str, torch.Tensor]]:
        """Gradient of every local expert by name; zeros where no token came."""
        grads = {name: getattr(self, name).grad for name in self.names}
        full = {name: torch.zeros_like(getattr(self, name)) if g is None else g for name, g in grads.items()}
        return {e: {name: full[name][i] for name in self.names} for i, e in enumerate(self.local)}


class IdentityExperts(nn.Module):
    """For the exchange phase: every expert returns its input."""

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return x

    def gradients(self) -> dict[int, dict[str, torch.Tensor]]:
        return {}


class StandInExperts(IdentityExperts):
    """Wait as long as a device with the costs ``gemm`` would compute: one grouped GEMM for all experts of each of an
    expert's matrices, twice that backward. Rows go home as they came."""

    def __init__(self, model: Model, gemm: Gemm):
        super().__init__()
        self.start_s = GEMMS[model.ffn_type] * gemm.alpha_s
        self.row_s = GEMMS[model.ffn_type] * model.hidden * model.ffn * gemm.beta_s_per_mac

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return _Waiting.apply(x, self.start_s + self.row_s * len(x) if len(x) else 0.0)


class _Waiting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):  # type: ignore[no-untyped-def, override]
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        time.sleep(2 * ctx.seconds)
        return dy, None


def grouped_mm(x: torch.Tensor, w: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """y[rows of e] = x[rows of e] @ w[e]: x [R, K], w [E, K, N], counts [E] on the CPU -> [R, N].

    bfloat16 on CUDA: torch's grouped GEMM. Elsewhere: one GEMM per expert straight into the output.
    """
    if x.is_cuda and x.dtype == torch.bfloat16:
        return F.grouped_mm(x, w, offs=counts.cumsum(0).to(x.device, torch.int32))
    return _LoopedMM.apply(x, w, [int(c) for c in counts])


class _LoopedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, counts):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, w)
        ctx.counts = counts
        y = x.new_empty(len(x), w.shape[2])
        for e, (a, b) in enumerate(_ranges(counts)):
            torch.mm(x[a:b], w[e], out=y[a:b])
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        x, w = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        for e, (a, b) in enumerate(_ranges(ctx.counts)):
            if dx is not None:
                torch.mm(dy[a:b], w[e].t(), out=dx[a:b])
            if dw is not None:
                torch.mm(x[a:b].t(), dy[a:b], out=dw[e])
        return dx, dw, None


def _ranges(counts: Sequence[int]) -> list[tuple[int, int]]:
    ranges, start = [], 0
    for count in counts:
        ranges.append((start, start + count))
        start += count
    return ranges
