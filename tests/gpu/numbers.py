"""Steps 3, 4 and 5: every number that the device computes against the same on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from harness.bench import conformance as checks
from harness.comm.rows import dot_rows, scale_rows, stable_order, sum_rows
from harness.layer.experts import grouped_mm
from tests.gpu.machine import Machine
from tests.gpu.step import need

K, N = 64, 48
COUNTS = {
    "first empty": [0, 5, 9, 2],
    "middle empty": [7, 0, 0, 9],
    "last empty": [3, 13, 0, 0],
    "one expert only": [0, 0, 16, 0],
    "no rows": [0, 0, 0, 0],
}
SHAPES = [(K, N), (8, N), (K, 8), (1000, N), (K, 1000), (20, N), (K, 20)]  # 20: rows that do not start at 16 bytes
EMULATED_TRIALS = ("uniform", "rank-without-tokens", "experts-without-tokens", "drops", "softmoe", "exchange")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def conformance(machine: Machine) -> dict[str, Any]:
    """All trials of the control against the float64 oracle, in every format."""
    trials = EMULATED_TRIALS if machine.emulated else tuple(checks.TRIALS)
    rows = checks.check(machine.job, {"systems": ["flat"], "trials": trials})
    wrong = [
        f"{row['trial']} {row['dtype']}: {row['reason']}" for row in rows if row["status"] not in ("ok", "refused")
    ]
    need(not wrong, f"{len(wrong)} of {len(rows)} checks are wrong, first {wrong[0] if wrong else ''}")
    worst: dict[str, float] = {}
    for row in rows:
        worst[row["dtype"]] = max([worst.get(row["dtype"], 0.0), *row["errors"].values()])
    refused = sorted({row["trial"] for row in rows if row["status"] == "refused"})
    return {"checks": len(rows), "refused": refused, "largest_errors": worst}


def grouped_products(machine: Machine) -> dict[str, Any]:
    """bfloat16 products of experts, forward and both gradients, where kernels go wrong: empty experts, odd widths.

    Freed memory is full of NaN, so that what a kernel leaves unwritten is seen."""
    worst, wrong = 0.0, []
    for (k, n), (name, counts) in itertools.product(SHAPES, COUNTS.items()):
        if (k, n) != (K, N) and name != "middle empty":
            continue
        try:
            found = _products(machine, k, n, counts)
        except RuntimeError as error:
            wrong.append(f"{name} {k}x{n}: {str(error).splitlines()[0]}")
            continue
        worst = max(worst, *found.values())
        wrong += [f"{name} {k}x{n}: {what} off by {error:.1e}" for what, error in found.items() if not error <= 2e-2]
    need(not wrong, f"{len(wrong)} are wrong: {'; '.join(wrong[:4])}")
    return {"largest_error": worst} | _bare(machine) | machine.unseen("kernels of the device: the CPU computes")


def _products(machine: Machine, k: int, n: int, counts: list[int]) -> dict[str, float]:
    """Largest errors of y, dx and dw relative to the largest entry; infinite where an empty expert has a gradient."""
    generator = torch.Generator().manual_seed(k + n)
    x, w = torch.randn(sum(counts), k, generator=generator), torch.randn(len(counts), k, n, generator=generator)
    dy = torch.randn(sum(counts), n, generator=generator)
    on_device = [each.bfloat16().to(machine.device) for each in (x, w, dy)]
    exact = [each.double().cpu() for each in on_device]
    _poison(machine.device, on_device[1])
    found, expected = _both(*on_device, counts, grouped_mm), _both(*exact, counts, grouped_mm)
    errors = {}
    for name, one, other in zip(("y", "dx", "dw"), found, expected, strict=True):
        one = one.double().cpu()
        error = (one - other).abs().max() / other.abs().max().clamp_min(1e-9) if other.numel() else torch.zeros(())
        errors[name] = float(error.nan_to_num(nan=torch.inf))
    empty = torch.tensor(counts) == 0
    if found[2][empty.to(machine.device)].cpu().count_nonzero():
        errors["dw of empty experts"] = torch.inf
    return errors


def _both(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, counts: list[int], product: Any) -> list[torch.Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = product(x, (w,), torch.tensor(counts))
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    return [y.detach(), dx, dw]


def _poison(device: torch.device, like: torch.Tensor) -> None:
    """Leave NaN in what the allocator gives out next."""
    blocks = [torch.full_like(like, torch.nan) for _ in range(8)]
    blocks.append(torch.full((1 << 20,), torch.nan, device=device))
    del blocks


def _bare(machine: Machine) -> dict[str, Any]:
    """What torch's own grouped product says to a width that is no multiple of 16 bytes: facts, nothing is judged."""
    if machine.emulated:
        return {}
    x, w = (torch.ones(shape, device=machine.device, dtype=torch.bfloat16) for shape in ((16, 20), (2, 20, N)))
    offsets = torch.tensor([8, 16], device=machine.device, dtype=torch.int32)
    try:
        torch.nn.functional.grouped_mm(x, w, offs=offsets)
    except (RuntimeError, AttributeError) as error:
        return {"torch_on_20_columns": str(error).splitlines()[0]}
    return {"torch_on_20_columns": "takes them"}


def rows(machine: Machine) -> dict[str, Any]:
    """Copying, summing and multiplying rows, with and without any, on the device as on the CPU."""
    errors: dict[str, float] = {}
    for dtype, tolerance in TOLERANCE.items():
        worst = max(_rows(machine.device, dtype, num_rows) for num_rows in (0, 1, 257))
        errors[str(dtype).removeprefix("torch.")] = worst
        need(worst <= tolerance, f"rows in {dtype} are off by {worst:.1e}, allowed {tolerance:.0e}")
    for bound in (7, 1 << 20):
        key = torch.randint(bound, (1000,), generator=torch.Generator().manual_seed(1))
        found, expected = stable_order(key.to(machine.device), bound).cpu(), key.argsort(stable=True)
        need(torch.equal(found, expected), f"the order of keys below {bound} is another one")
    return {"largest_errors": errors}


def _rows(device: torch.device, dtype: torch.dtype, num_rows: int) -> float:
    """The largest error of all functions, relative to the largest entry."""
    generator = torch.Generator().manual_seed(num_rows)
    a, b = torch.randn(2, num_rows, 96, generator=generator, dtype=torch.float64).to(dtype)
    source = torch.randperm(num_rows, generator=generator)
    starts = torch.arange(0, num_rows, 3)
    weights = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def everything(where: Any) -> list[torch.Tensor]:
        on = [each.to(where) for each in (a, b, source, starts, weights)]
        return [
            sum_rows(on[0], on[2], on[3]),
            sum_rows(on[0], on[2], on[3], on[4]),
            scale_rows(on[0], on[2], on[4]),
            dot_rows(on[0], on[2], on[1]),
        ]

    worst = 0.0
    for found, expected in zip(everything(device), everything("cpu"), strict=True):
        need(found.shape == expected.shape and found.dtype == expected.dtype, f"{found.shape} and {expected.shape}")
        if expected.numel():
            scale = expected.double().abs().max().clamp_min(1e-9)
            worst = max(worst, float((found.cpu().double() - expected.double()).abs().max() / scale))
    return worst
