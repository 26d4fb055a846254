"""Rows as experts get them that have travelled in another format (``exchange_dtype``), by the format's definition.

Written apart from ``harness.comm.packing``, which it judges: arithmetic in float64, no conversion to 8 bits."""

from __future__ import annotations

import torch

from harness.specs import ExchangeDtype

_POWERS = torch.tensor([2.0**exponent for exponent in range(-130, 140)], dtype=torch.float64)


def rounded(rows: torch.Tensor, exchange_dtype: ExchangeDtype | None) -> torch.Tensor:
    """Rows [T, M] -> [T, M]; their gradients pass as they are."""
    if exchange_dtype is None:
        return rows
    exact = rows.detach().double()
    if exchange_dtype == "float8_e4m3":
        found = torch.cat([_nearest(part) for part in exact.split(128, dim=1)], dim=1)
    else:
        found = exact.to(torch.bfloat16).double()
    return rows + (found - exact).to(rows.dtype)


def _nearest(part: torch.Tensor) -> torch.Tensor:
    """Columns [T, 128] of one scale, the smallest power of two that makes none larger than 448: each to the nearest
    number with 3 bits behind its first, which stands for 2^-6 at least; of two as near to that whose last bit is 0."""
    powers = _POWERS.to(part.device)
    largest = part.abs().amax(1, keepdim=True).clamp_min(2.0**-100)
    scale = torch.searchsorted(powers * 448, largest).clamp_max(len(powers) - 6)  # its place among the powers
    exponent = torch.frexp(part / powers[scale]).exponent - 1
    step = powers[scale + exponent.clamp(-6, 8) - 3]
    return torch.round(part / step) * step
