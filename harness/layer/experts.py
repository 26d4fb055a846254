"""This rank's experts as grouped GEMMs over rows sorted by expert.

The products are torch's grouped GEMM where that is known to be right and fast (``not_grouped``), else one GEMM an
expert, straight into the output.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from harness.layer.standin import wait
from harness.layer.weights import Weights
from harness.specs import Gemm
from harness.system import Case


class Experts(nn.Module):
    """``w1`` [E_local, M, H], ``w2`` [E_local, H, M] and, for swiglu, ``w3`` [E_local, M, H].

    gpt: gelu(x w1) w2 with the exact (erf) GELU; swiglu: (silu(x w1) * (x w3)) w2. No biases.
    """

    def __init__(self, weights: Weights, local: Sequence[int], device: torch.device | str = "cpu"):
        super().__init__()
        self.local = [int(e) for e in local]
        self.ffn_type = weights.model.ffn_type
        self.stand_in: Gemm | None = None  # instead of computing, wait as long as these costs say
        drawn = [weights.expert(e) for e in self.local]
        self.w1: torch.Tensor
        self.w2: torch.Tensor
        self.w3: torch.Tensor
        self.names = ("w1", "w2", "w3") if self.ffn_type == "swiglu" else ("w1", "w2")
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.stack([w[name] for w in drawn]).to(device)))

    def forward(
        self, x: torch.Tensor, counts: torch.Tensor, more: Sequence[Mapping[str, torch.Tensor]] = ()
    ) -> torch.Tensor:
        """x [R, M], rows of local expert 0 first; counts int64 [E_local] on the CPU, summing to R -> y [R, M].

        ``more``: weights of further experts by name, behind the own ones in ``x`` and ``counts``."""
        if self.stand_in is not None:
            given = [*self.parameters(), *(each[name] for each in more for name in self.names)]
            return wait(x, self.stand_in, len(self.names), len(self.names) * len(x) * self.w1.shape[1:].numel(), given)
        weights = {name: (getattr(self, name), *(each[name] for each in more)) for name in self.names}
        h = grouped_mm(x, weights["w1"], counts)
        h = F.silu(h) * grouped_mm(x, weights["w3"], counts) if self.ffn_type == "swiglu" else F.gelu(h)
        return grouped_mm(h, weights["w2"], counts)

    def how(self) -> str:
        """By which kernels they compute, and why not by others."""
        if self.stand_in is not None:
            return "a timed wait"
        reason = next(
            filter(None, (not_grouped(self.w1.device, self.w1.dtype, getattr(self, n)) for n in self.names)), ""
        )
        return f"one GEMM an expert: {reason}" if reason else "one grouped GEMM"

    def gradients(self) -> dict[int, dict[str, torch.Tensor]]:
        """Gradient of every local expert by name; zeros where no token came."""
        grads = {name: getattr(self, name).grad for name in self.names}
        full = {name: torch.zeros_like(getattr(self, name)) if g is None else g for name, g in grads.items()}
        return {e: {name: full[name][i] for name in self.names} for i, e in enumerate(self.local)}


class SharedExpert(nn.Module):
    """What every token goes through beside its experts: all shared experts side by side, whole on every rank. As a
    stand-in it adds nothing."""

    def __init__(self, weights: Weights, device: torch.device | str = "cpu"):
        super().__init__()
        self.all = Experts(weights, [weights.model.num_experts], device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, M] -> [T, M]."""
        made: torch.Tensor = self.all(x, torch.tensor([len(x)]))
        return made if self.all.stand_in is None else made * 0

    def gradients(self) -> dict[str, torch.Tensor]:
        """This rank's own part, by the names of ``shared_names``."""
        ((_, of),) = self.all.gradients().items()
        return {f"shared_{name}": gradient for name, gradient in of.items()}


def shared_expert(case: Case, weights: Weights) -> SharedExpert | None:
    """Of a rank; None where there is none, as in phase ``exchange``."""
    if case.identity_experts or not case.model.num_shared_experts:
        return None
    found = SharedExpert(weights, case.device)
    found.all.stand_in = case.stand_in_costs
    return found


class IdentityExperts(nn.Module):
    """For the exchange phase: every expert returns its input."""

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return x

    def gradients(self) -> dict[int, dict[str, torch.Tensor]]:
        return {}


def grouped_mm(x: torch.Tensor, ws: Sequence[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """y[rows of e] = x[rows of e] @ w[e]: x [R, K], counts [E] on the CPU -> [R, N]. The E matrices w [K, N] are
    those of all ``ws`` [E_i, K, N], one after another."""
    looped = not len(x) or any(not_grouped(x.device, x.dtype, w) for w in ws)
    return (_LoopedMM if looped else _GroupedMM).apply(x, [int(c) for c in counts], *ws)


def not_grouped(device: torch.device, dtype: torch.dtype, w: torch.Tensor) -> str | None:
    """Why rows of ``dtype`` on ``device`` do not meet w [E, K, N] in one grouped GEMM; None: they do.

    torch's kernel takes bfloat16 and strides of whole 16 bytes. On Hopper it is a kernel of its own; on older devices
    it is a loop that waits for the host, or missing, and on Blackwell gradients of experts without rows were seen to
    be wrong (pytorch/pytorch#172439).
    """
    if device.type != "cuda":
        return "the grouped GEMM is for CUDA"
    if dtype != torch.bfloat16:
        return f"the grouped GEMM takes bfloat16, not {str(dtype).removeprefix('torch.')}"
    if (found := _capability(device))[0] != 9:
        return f"the grouped GEMM is trusted on devices of capability 9 only, not {found[0]}.{found[1]}"
    num_experts, *sides = w.shape
    if any(side % _ALIGNED for side in sides):
        return f"the grouped GEMM takes multiples of {_ALIGNED}, not {sides[0]} x {sides[1]}"
    return None if num_experts < _MOST_GROUPS else f"the grouped GEMM takes less than {_MOST_GROUPS} experts"


_ALIGNED = 8  # numbers of bfloat16 in 16 bytes
_MOST_GROUPS = 1024


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class _GroupedMM(torch.autograd.Function):
    """One grouped GEMM for each of ``ws``; those without a row take part in none."""

    @staticmethod
    def forward(ctx, x, counts, *ws):  # type: ignore[no-untyped-def, override]
        ctx.counts = [part.tolist() for part in torch.tensor(counts).split([len(w) for w in ws])]
        ctx.offs = [torch.tensor(part).cumsum(0).to(x.device, torch.int32) for part in ctx.counts]
        x = x.contiguous()
        ctx.save_for_backward(x, *ws)
        made = [
            F.grouped_mm(rows, w, offs=offs)
            for rows, w, offs in zip(x.split([sum(part) for part in ctx.counts]), ws, ctx.offs, strict=True)
            if len(rows)
        ]
        return made[0] if len(made) == 1 else torch.cat(made)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        x, *ws = ctx.saved_tensors
        lengths = [sum(part) for part in ctx.counts]
        parts = list(zip(x.split(lengths), dy.contiguous().split(lengths), ws, ctx.offs, strict=True))
        dx = None
        if ctx.needs_input_grad[0]:
            made = [F.grouped_mm(own, w.transpose(1, 2), offs=offs) for _, own, w, offs in parts if len(own)]
            dx = made[0] if len(made) == 1 else torch.cat(made)
        dws: list[torch.Tensor | None] = []
        for (rows, own, w, offs), counts, needed in zip(parts, ctx.counts, ctx.needs_input_grad[2:], strict=True):
            if not needed:
                dws.append(None)
                continue
            dw = F.grouped_mm(rows.t(), own, offs=offs) if len(rows) else torch.zeros_like(w)
            for each, count in zip(dw, counts, strict=True):
                if not count and len(rows):  # not every kernel writes what no row adds to
                    each.zero_()
            dws.append(dw)
        return dx, None, *dws


class _LoopedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, counts, *ws):  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, *ws)
        ctx.counts = counts
        y = x.new_empty(len(x), ws[0].shape[2])
        for (a, b), w in zip(_ranges(counts), _each(ws), strict=True):
            torch.mm(x[a:b], w, out=y[a:b])
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        x, *ws = ctx.saved_tensors
        dy = dy.contiguous()
        ranges = _ranges(ctx.counts)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dws = [torch.empty_like(w) if needed else None for w, needed in zip(ws, ctx.needs_input_grad[2:], strict=True)]
        if dx is not None:
            for (a, b), w in zip(ranges, _each(ws), strict=True):
                torch.mm(dy[a:b], w.t(), out=dx[a:b])
        start = 0
        for w, dw in zip(ws, dws, strict=True):
            if dw is not None:
                for (a, b), own in zip(ranges[start : start + len(w)], dw, strict=True):
                    torch.mm(x[a:b].t(), dy[a:b], out=own)
            start += len(w)
        return dx, None, *dws


def _each(ws: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [w for group in ws for w in group]


def _ranges(counts: Sequence[int]) -> list[tuple[int, int]]:
    ranges, start = [], 0
    for count in counts:
        ranges.append((start, start + count))
        start += count
    return ranges
