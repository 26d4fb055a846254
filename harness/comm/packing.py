"""Rows in the format in which they travel: packed ahead of each hop, restored behind it (``exchange_dtype``).

``bfloat16``      whatever travels is rounded to bfloat16
``float8_e4m3``   rows on their way to the experts in the forward are float8 (e4m3: 8 bits, 3 of them of fraction)
                  with a float32 scale for every 128 columns beside them, as DeepEP sends them
                  (github.com/deepseek-ai/DeepEP); what experts made, and gradients both ways, is bfloat16

Interpretations: a scale is the smallest power of two by which the largest number of its columns does not exceed 448
(DeepEP's option ``round_scale``). So what was restored is packed again without a change, and a row is the same after
any number of hops, at home too. DeepSeek-V3's report (arXiv 2412.19437, section 3.3) rounds gradients on their way
to the experts as well; here they are bfloat16, as DeepEP's own backward sends them. Gradients go through the rounding
of rows as if it were not there. Packing takes its time where it runs, on the lane of its hop; the price leaves it out,
as kernels do it on the way.
"""

from __future__ import annotations

import torch

from harness.dtypes import COLUMNS
from harness.specs import ExchangeDtype

LARGEST = 448.0  # of float8_e4m3
_SMALLEST = 2.0**-100  # of what a scale is made for: it stays a normal float32


def pack(rows: torch.Tensor, exchange_dtype: ExchangeDtype, part: str) -> torch.Tensor:
    """rows [R, M] in ``part`` of an exchange (``System.planned_bytes``) -> what is sent: bfloat16 [R, M], or bytes
    [R, M + 4 ceil(M / 128)]."""
    if exchange_dtype != "float8_e4m3" or part != "dispatch":
        return rows.to(torch.bfloat16)
    scale = _scales(rows)  # [R, ceil(M / 128)]
    numbers = (rows.float() / _wide(scale, rows.shape[1])).to(torch.float8_e4m3fn)
    return torch.cat([numbers.view(torch.uint8), scale.view(torch.uint8)], dim=1)


def restore(sent: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """What ``pack`` made of rows of ``dtype`` -> rows [R, M]."""
    if sent.dtype != torch.uint8:
        return sent.to(dtype)
    numbers, scale = (part.clone(memory_format=torch.contiguous_format) for part in sent.tensor_split([hidden], 1))
    return (numbers.view(torch.float8_e4m3fn).float() * _wide(scale.view(torch.float32), hidden)).to(dtype)


def _scales(rows: torch.Tensor) -> torch.Tensor:
    """Powers of two [R, ceil(M / 128)], float32; NaN where a column is not finite."""
    padded = torch.nn.functional.pad(rows.float().abs(), (0, -rows.shape[1] % COLUMNS))
    most = padded.unflatten(1, (-1, COLUMNS)).amax(-1).clamp_min(_SMALLEST)
    fraction, exponent = torch.frexp(most / LARGEST)  # 1/2 <= fraction < 1
    exponent = exponent - (fraction == 0.5).int()
    return (exponent + 127 << 23).view(torch.float32).masked_fill(~most.isfinite(), torch.nan)


def _wide(scale: torch.Tensor, hidden: int) -> torch.Tensor:
    """[R, M]: of each column its own."""
    return scale.repeat_interleave(COLUMNS, 1)[:, :hidden]
