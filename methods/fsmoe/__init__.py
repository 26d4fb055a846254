"""FSMoE (arXiv 2501.10714): co-scheduled links, adaptive degrees and gradient partitioning over sharded experts, and
the rivals that the paper measures it against, as schedules of the same layer.

Reading order: ``step`` (what a schedule decides), ``chunks`` (and from which costs), ``slots`` (the way to the
experts), ``shards`` (their parts on the ranks of a node), ``sizes`` (what all of it costs).
"""

from __future__ import annotations

from typing import ClassVar

from methods.fsmoe.chunks import SCHEDULES
from methods.fsmoe.shards import Sharded

#: brought to recipes, by name
EXCHANGES = {"slots": Sharded.exchange}
STATES = {"shards": Sharded}


class FSMoE(Sharded):
    """All-to-all between nodes beside all-gather and reduce-scatter inside; both degrees and the gradients adaptive.
    Rivals are the same layer under their own schedules."""

    name = "fsmoe"
    title = "FSMoE: links side by side, adaptive degrees, gradients cut to measure"
    source = "arXiv 2501.10714, sections 3 to 5"
    schedule = SCHEDULES["fsmoe"]
    options: ClassVar[dict[str, str]] = {**Sharded.exchange.options, **schedule.options, **Sharded.options}
    chunked: ClassVar[dict[str, bool | int | float | str]] = dict(schedule.chunked)
    recipe: ClassVar[dict[str, str]] = {"exchange": "slots", "schedule": name, "state": "shards"}

    def __init_subclass__(cls) -> None:
        cls.schedule, cls.recipe = SCHEDULES[cls.name], {**FSMoE.recipe, "schedule": cls.name}


class NoOverlap(FSMoE):
    name = "fsmoe-no-overlap"
    title = "sharded experts, no overlap at all"
    source = "arXiv 2501.10714, section 6: the schedule that overlaps nothing"


class Tutel(FSMoE):
    name = "fsmoe-tutel"
    title = "Tutel's schedule with PipeMoE's degree, on FSMoE's layer"
    source = "arXiv 2501.10714, section 6: Tutel (with PipeMoE)"


class TutelImproved(FSMoE):
    name = "fsmoe-tutel-improved"
    title = "Tutel's schedule with gradients beside the dense part, on FSMoE's layer"
    source = "arXiv 2501.10714, section 6: Tutel-Improved"


class Lina(FSMoE):
    name = "fsmoe-lina"
    title = "PipeMoE's degree and Lina's fixed gradient chunks, on FSMoE's layer"
    source = "arXiv 2501.10714, section 6: PipeMoE + Lina"


class NoIIO(FSMoE):
    name = "fsmoe-no-iio"
    title = "FSMoE without the overlap of inter- and intra-node links"
    source = "arXiv 2501.10714, section 6: FSMoE-No-IIO"
