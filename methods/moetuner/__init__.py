"""MoETuner (arXiv 2502.06643): experts placed by integer programming, from recorded routing, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from baselines.flat import Flat
from harness import placing
from harness.placement import Placement
from harness.plan.placings import Served
from harness.routing import Routing
from harness.system import Case

METHOD = "two-stage"


class Tuned(Served):
    """Experts where MoETuner (or a rival) puts them when a model is served."""

    title = "in serving: where MoETuner or a rival puts experts, or as a file of moebench place says"
    source = "arXiv 2502.06643"
    slot_options: ClassVar[dict[str, str]] = {
        "placement": "file that moebench place wrote (default: planned from routing of other tokens than those served)",
        "method": "how to plan: two-stage (the default: the paper's two programs), joint (both programs at once), "
        "seconds (fewest predicted seconds of a batch), exflow, greedy, random or contiguous",
    }

    @classmethod
    def place(cls, case: Case, profile: Sequence[Routing]) -> list[Placement]:
        if name := case.options.get("placement"):
            found = placing.read(Path(str(name)).expanduser())
            return found.fit(case.model, case.topology.num_ranks, "options.placement")
        return placing.planned(case, profile, str(case.options.get("method", METHOD)), "options.method")


class MoETuner(Tuned, Flat):
    """The flat all-to-all with each layer's experts where MoETuner (or a rival) puts them when a model is served. Ranks
    hold unequal numbers of experts. In other phases experts are in index order, so that it is ``flat``."""

    name = "moetuner"
    title = "MoETuner: placement by integer programming when serving, over the flat all-to-all"
    options: ClassVar[dict[str, str]] = Tuned.slot_options
    recipe: ClassVar[dict[str, str]] = {"placement": "moetuner"}


#: brought to recipes, by name
PLACINGS = {"moetuner": Tuned}
