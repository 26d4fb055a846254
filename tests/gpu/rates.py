"""Step 10: what the device computes a second, of products as the profile measures them, and of experts."""

from __future__ import annotations

import types
from typing import Any

import torch

from harness import devices
from harness.comm import profile
from harness.layer.experts import Experts
from harness.presets.this_machine import data_sheet
from harness.specs import Model
from tests.gpu.machine import Machine
from tests.gpu.step import need

#: experts of one rank: the whole of Mixtral-8x7B's layer, and a quarter of Qwen3-30B-A3B's
SHAPES = {
    "mixtral-8x7b": (Model(name="mixtral", num_layers=1, hidden=4096, ffn=14336, num_experts=8, top_k=2), 16384),
    "qwen3-30b-a3b": (Model(name="qwen3", num_layers=1, hidden=2048, ffn=768, num_experts=32, top_k=8), 65536),
}
REPEATS = 10


def rates(machine: Machine) -> dict[str, Any]:
    """Fits of plain and grouped products, random data against ones, and the peak that experts reach."""
    found: dict[str, Any] = {"clocks_before": devices.conditions()}
    found |= _profile(machine) | _random_against_ones(machine)
    for name, (model, num_rows) in SHAPES.items():
        if machine.emulated:
            model, num_rows = model.model_copy(update={"hidden": 64, "ffn": 32, "num_experts": 4}), 64
        found[name] = _experts(machine, model, num_rows)
    found["clocks_after"] = devices.conditions()
    if machine.emulated:
        return machine.unseen("rates: the CPU computes")
    return found


def _profile(machine: Machine) -> dict[str, Any]:
    """As ``moebench profile`` has them."""
    if machine.emulated:  # the same on a toy's shapes
        profile.SIDE, profile.CUDA_ROWS, profile.CUDA_SIZES = {**profile.SIDE, "cuda": 32}, 1, 1
    _, products = profile.fit([profile.measure(machine.job, {"levels": [], "repeats": 3})])
    need(set(products) == {"gemm", "grouped_gemm"}, f"the profile has {sorted(products)}")
    found = {}
    for name, fit in products.items():
        rate = 2 / fit.beta_s_per_mac if fit.beta_s_per_mac else None
        if not machine.emulated:
            need(not fit.refused, f"{name}: {fit.refused}")
            need(
                rate and rate <= (data_sheet(machine.name).flops_per_s or torch.inf),
                f"{name}: {rate} FLOP/s are above the peak",
            )
        found[name] = {"flops_per_s": rate, "alpha_s": fit.alpha_s, "r2": fit.r2, "held_out_error": fit.held_out_error}
    return found


def _random_against_ones(machine: Machine) -> dict[str, Any]:
    """How much faster a product of ones is: it draws less power, so its time must not stand for real data."""
    side = 64 if machine.emulated else 8192
    times = {}
    for name, make in (("ones", torch.ones), ("random", torch.randn), ("ones again", torch.ones)):
        a, b = (make(side, side, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
        torch.mm(a, b)
        times[name] = machine.seconds(lambda a=a, b=b: torch.mm(a, b), 20)  # type: ignore[misc]
    ones = min(times["ones"], times["ones again"])
    rate = 2 * side**3 / times["random"]
    return {"random_over_ones": times["random"] / ones, "product_8192": _rate(machine, rate)}


def _experts(machine: Machine, model: Model, num_rows: int) -> dict[str, Any]:
    """FLOP/s of a rank's experts over ``num_rows`` rows, as many for each, and with most on a few of them."""
    model = model.model_copy(update={"ffn_type": "swiglu"})
    experts = Experts(_drawn(machine, model), range(model.num_experts), machine.device)
    x, dy = (torch.randn(num_rows, model.hidden, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    flops = 2 * 3 * num_rows * model.hidden * model.ffn
    even = torch.full((model.num_experts,), num_rows // model.num_experts)
    skewed = (even * torch.linspace(1.75, 0.25, model.num_experts)).long()
    skewed[0] += num_rows - skewed.sum()
    found: dict[str, Any] = {"rows": num_rows, "experts": model.num_experts}
    for name, counts in (("even", even), ("skewed", skewed)):

        def step(counts: torch.Tensor = counts) -> None:
            experts(x, counts).backward(dy)

        with torch.no_grad():
            experts(x, counts)
            forward = machine.seconds(lambda counts=counts: experts(x, counts), REPEATS)  # type: ignore[misc]
        step()
        both = machine.seconds(step, REPEATS)
        found[f"forward_{name}"] = _rate(machine, flops / forward)
        found[f"forward_and_backward_{name}"] = _rate(machine, 3 * flops / both)
    return found


def _drawn(machine: Machine, model: Model) -> Any:
    """Weights made on the device, in the shapes of ``harness.layer.weights``."""

    def expert(_: int) -> dict[str, torch.Tensor]:
        shapes = {"w1": (model.hidden, model.ffn), "w2": (model.ffn, model.hidden), "w3": (model.hidden, model.ffn)}
        return {
            name: torch.randn(shape, device=machine.device, dtype=torch.bfloat16) / shape[0] ** 0.5
            for name, shape in shapes.items()
        }

    return types.SimpleNamespace(model=model, expert=expert)


def _rate(machine: Machine, flops_per_s: float) -> dict[str, float | None]:
    limit = data_sheet(machine.name).flops_per_s
    return {"flops_per_s": flops_per_s, "share_of_peak": flops_per_s / limit if limit else None}
