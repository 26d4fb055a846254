"""Flat expert parallelism: one copy of a token per chosen expert, one all-to-all-v over all ranks.

The control: what any framework's all-to-all dispatcher does, without a framework. It is FastMoE's own schedule as well
(arXiv 2103.13262, before FasterMoE): ranks exchange how many rows they have for each expert, then just these rows, with
nothing padded; experts compute once all have come, and nothing overlaps.
"""

from __future__ import annotations

from typing import ClassVar

from harness.plan.native import NativeSystem


class Flat(NativeSystem):
    name = "flat"
    title = "all-to-all-v expert parallelism, the control"
    source = "expert parallelism of GShard (arXiv 2006.16668) with exact sizes"
    recipe: ClassVar[dict[str, str]] = {}
