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
from harness.plan.course import Course, FollowedCourse
from harness.plan.following import Following
from harness.plan.rearrange import Rearranger
from harness.system import AfterStep, Case, MoELayer, System

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


class Follows(System):
    """A native system whose experts follow the load so."""

    slot_options: ClassVar[dict[str, str]] = OPTIONS

    @classmethod
    def after_step(cls, layers: Sequence[MoELayer], case: Case, job: Job) -> AfterStep:
        return Rearranger(job, layers, following(case))  # type: ignore[arg-type]

    @classmethod
    def course(cls, cases: Sequence[Case]) -> Course:
        return FollowedCourse(cls, cases, following(cases[0]))


class SmartMoE(Follows, Flat):
    name = "smartmoe"
    title = "SmartMoE's dynamic expert placement, over the flat all-to-all"
    source = "ATC 2023 (Zhai et al.), online placement as in its artifact"
    options: ClassVar[dict[str, str]] = OPTIONS


#: brought to recipes, by name
PLACINGS = {"smartmoe": Follows}
