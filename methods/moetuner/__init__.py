"""MoETuner (arXiv 2502.06643): experts placed by integer programming, from recorded routing, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from baselines.flat import Flat
from harness import placing
from harness.placement import Placement
from harness.routing import Routing
from harness.system import Case

METHOD = "two-stage"
ROUNDS = 8  # of annealing: what a few layers need, and the same wherever it is planned


class MoETuner(Flat):
    """The flat all-to-all with each layer's experts where MoETuner (or a rival) puts them when a model is served. Ranks
    hold unequal numbers of experts. In other phases experts are in index order, so that it is ``flat``."""

    name = "moetuner"
    title = "MoETuner: placement by integer programming when serving, over the flat all-to-all"
    source = "arXiv 2502.06643"
    places = True
    options: ClassVar[dict[str, str]] = {
        "placement": "file that moebench place wrote (default: planned from routing of other tokens than those served)",
        "method": "how to plan: two-stage (the default: the paper's two programs), joint (both programs at once), "
        "seconds (fewest predicted seconds of a batch), exflow, greedy, random or contiguous",
    }

    @classmethod
    def place(cls, case: Case, profile: Sequence[Routing]) -> list[Placement]:
        num_ranks = case.topology.num_ranks
        if name := case.options.get("placement"):
            found = placing.read(Path(str(name)).expanduser())
            return found.fit(case.model, num_ranks, "options.placement")
        planner = placing.placer(str(case.options.get("method", METHOD)), "options.method")
        bandwidth = np.ones((num_ranks, num_ranks))
        if case.cluster is not None:
            placing.check_memory(case.model, case.cluster, 1, num_ranks, case.dtype)
            bandwidth, _ = placing.bandwidths(case.cluster)
        ids = np.stack([routing.ids for routing in profile])
        request = placing.Request(
            *(case.model, case.topology, bandwidth, ids, ids),
            rounds=ROUNDS,
            cluster=case.cluster,
            tokens=tuple(case.routing.tokens),
            dtype=case.dtype,
        )
        return [Placement.of_slots(ranks) for ranks in placing.slots_of(planner.run(request).owner, num_ranks)]
