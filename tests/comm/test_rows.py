from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.comm.rows import Spread, dot_rows


@settings(max_examples=40, deadline=None)
@given(num_items=st.integers(0, 40), num_rows=st.integers(0, 200), seed=st.integers(0, 9), weighted=st.booleans())
def test_gather_is_the_transpose_of_spread(num_items: int, num_rows: int, seed: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_rows = num_rows if num_items else 0
    item = torch.randint(0, max(1, num_items), (num_rows,), generator=generator)
    items = torch.randn(num_items, 5, generator=generator, dtype=torch.float64)
    rows = torch.randn(num_rows, 5, generator=generator, dtype=torch.float64)
    weights = torch.randn(num_rows, generator=generator, dtype=torch.float64) if weighted else None
    spread = Spread(item, num_items)
    left = (dot_rows(items, spread.item, rows) * (1 if weights is None else weights)).sum()
    right = (items * spread.gather(rows, weights)).sum()
    torch.testing.assert_close(left, right)


def test_bfloat16_sums_are_kept_in_float32() -> None:
    """256 ones and 384 times 2^-8 are 257.5: one rounding at the end gives 258, a bfloat16 accumulator stays at 256."""
    rows = torch.cat([torch.ones(256, 1), torch.full((384, 1), 2.0**-8)]).bfloat16()
    spread = Spread(torch.zeros(640, dtype=torch.int64), 1)
    assert spread.gather(rows).item() == 258
    assert spread.gather(rows, torch.full((640,), 3.0)).item() == 772  # 772.5, spacing 4
