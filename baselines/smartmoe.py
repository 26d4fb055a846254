"""SmartMoE's dynamic expert placement (Zhai et al., ATC 2023): now and then, experts go where load is least.

Of SmartMoE this is the part that acts during training, as in its artifact: every ``place_every`` steps the tokens of
each expert, counted over the last ``WINDOW`` steps of all ranks, are dealt out greedily, and the new placement is taken
if the busiest rank then has less. Exchange: the flat all-to-all-v. The offline search for hybrid-parallel plans, to
which its largest gains belong, is not.

Interpretation: the artifact moves parameters without their optimizer state, which then belongs to another expert.
``optimizer_state: false`` does so; by default the state goes along, and training is not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from baselines.flat import Flat
from harness.comm.job import Job
from harness.options import whole, yes
from harness.placement import Placement
from harness.plan.course import FollowedCourse
from harness.plan.following import Following
from harness.plan.native import NativeLayer
from harness.plan.placings import Placing
from harness.plan.rearrange import Rearranger
from harness.system import AfterStep, Case

WINDOW = 2  # steps whose tokens count
EVERY = 10
OPTIONS = {
    "place_every": f"training steps between placements (default {EVERY})",
    "optimizer_state": "false: parameters move alone, as in the artifact, and training changes (default true)",
}


def greedy(load: np.ndarray, placement: Placement) -> Placement:
    """``load`` [E] -> experts by descending load, each to the rank with the least load so far that has a free slot (its
    own one, of equals); ``placement`` itself if the busiest rank would not have less."""
    num_ranks = placement.hosts.shape[1]
    free = np.array([len(placement.local(rank)) for rank in range(num_ranks)])
    carried, owner = np.zeros(num_ranks), placement.owner.copy()
    for expert in np.argsort(-load, kind="stable"):
        least = carried[free > 0].min()
        open_ranks = np.flatnonzero((free > 0) & (carried == least))
        rank = owner[expert] if owner[expert] in open_ranks else open_ranks[0]
        owner[expert] = rank
        carried[rank] += load[expert]
        free[rank] -= 1
    before = np.bincount(placement.owner, load, num_ranks)
    return Placement.of_owner(owner, placement) if carried.max() < before.max() else placement


def following(case: Case) -> Following:
    """From a case's options."""
    return Following(greedy, whole(case, "place_every", EVERY, 10**9), WINDOW, yes(case, "optimizer_state", True))


class Follows(Placing):
    """Experts follow the load so."""

    title = "now and then to the ranks with the least load"
    source = "ATC 2023 (Zhai et al.), online placement as in its artifact"
    slot_options: ClassVar[dict[str, str]] = OPTIONS
    variant: ClassVar[dict[str, int]] = {"place_every": 3}

    @classmethod
    def mover(cls, layers: Sequence[NativeLayer], case: Case, job: Job) -> AfterStep:
        return Rearranger(job, layers, following(case))

    @classmethod
    def moves(cls, cases: Sequence[Case]) -> FollowedCourse:
        return FollowedCourse(cls, cases, following(cases[0]))


class SmartMoE(Follows, Flat):
    name = "smartmoe"
    title = "SmartMoE's dynamic expert placement, over the flat all-to-all"
    options: ClassVar[dict[str, str]] = OPTIONS
    recipe: ClassVar[dict[str, str]] = {"placement": "smartmoe"}


#: brought to recipes, by name
PLACINGS = {"smartmoe": Follows}
