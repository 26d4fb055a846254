"""AdamW of a training step; of float16 with loss scaling and float32 weights behind those that the layers compute with
(Micikevicius et al., ICLR 2018, arXiv 1710.03740).

float16 has no numbers below 6e-8 and none above 65,504. So the loss is multiplied by a power of two ahead of backward,
and gradients are divided by it where AdamW reads them, in float32; the gradients themselves stay scaled. A scale is
static, or dynamic as ``torch.amp.GradScaler``'s: it begins at 2^16, is halved by each step in which a gradient of any
rank is no number (which updates nothing), and is doubled behind 2,000 others in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.adamw import adamw as functional

LEARNING_RATE = 1e-3
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000
Scale = int | str  # a power of two, or dynamic


def adamw(parameters: Sequence[nn.Parameter], scale: Scale = "dynamic") -> torch.optim.AdamW:
    """Fused: one pass over a parameter, its gradient and its moments, and nothing held beside them. ``scale``: of the
    loss, where a parameter is float16."""
    if any(parameter.dtype == torch.float16 for parameter in parameters):
        return ScaledAdamW(parameters, scale)
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, foreach=False, fused=True)


class ScaledAdamW(torch.optim.AdamW):
    """``scale``: of the loss whose gradients the next ``step`` reads; ``skipped``: whether the last updated nothing.

    Its state of a float16 parameter: both moments, and ``rest``, what rounding has left off the float32 weight. So
    somebody may put other numbers into the parameter, or move it with its state."""

    def __init__(self, parameters: Sequence[nn.Parameter], scale: Scale):
        super().__init__(parameters, lr=LEARNING_RATE, foreach=False, fused=True)
        first = FIRST_SCALE if scale == "dynamic" else float(scale)
        self.param_groups[0].update(scale=first, dynamic=scale == "dynamic", since=0)  # as these go into a checkpoint
        self.skipped = False

    @property
    def scale(self) -> float:
        return float(self.param_groups[0]["scale"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Collective over all ranks."""
        (group,) = self.param_groups
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        self.skipped = _some_overflow(parameters)
        for parameter in () if self.skipped else parameters:
            self._update(parameter, group)
        self._rescale(group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq", *(("rest",) if parameter.dtype == torch.float16 else ())):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        assert parameter.grad is not None
        gradient = parameter.grad.to(torch.float32, copy=True).div_(group["scale"])
        weight = state["rest"].add_(parameter) if "rest" in state else parameter
        functional(
            [weight], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True,
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        if "rest" in state:
            parameter.copy_(weight)
            weight.sub_(parameter)

    def _rescale(self, group: dict[str, Any]) -> None:
        if self.skipped:
            if not group["dynamic"] or group["scale"] <= 1:
                remedy = "at that scale of the loss a gradient overflows float16"
                raise OverflowError(f"loss_scale: {group['scale']:g}: {remedy}; give a smaller one, or dynamic")
            group.update(scale=group["scale"] / 2, since=0)
        elif group["dynamic"]:
            grows = group["since"] + 1 == GROWTH_STEPS
            group.update(scale=group["scale"] * (2 if grows else 1), since=0 if grows else group["since"] + 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """In the formats in which it was saved; torch's gives moments that of their parameter."""
        super().load_state_dict(state_dict)
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            if number in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][number])


def _some_overflow(parameters: Sequence[nn.Parameter]) -> bool:
    """Collective: whether a gradient of any rank is no number."""
    finite = [parameter.grad.isfinite().all() for parameter in parameters if parameter.grad is not None]
    wrong = (~torch.stack(finite).all()).float().reshape(1)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
    return bool(wrong)
