"""Steps of an experiment whose routing drifts: what the routing of each was, as no two times are of the same batch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from harness.case import num_layers
from harness.groups import Groups
from harness.routing.certificate import expert_counts, imbalance
from harness.routing.generators import DRIFTING
from harness.routing.outline import Outlined, few_tokens
from harness.specs import Experiment, Model, Workload
from harness.topology import Topology

HASHED_IDS = 1 << 18  # of a step that never ran: its tokens are drawn in a moment


@dataclasses.dataclass(frozen=True)
class StepCertificate:
    """Measured facts about the routing of one step, experts in index order."""

    digest: str  # of the routing of all layers; "" where it was not drawn token by token
    max_over_mean: dict[str, float]  # per "expert", "rank", "node" and "link", the mean over layers
    #: part of the assignments that went to another expert in the step before, the mean over layers; NaN at the first
    drift: float


def drifts(experiment: Experiment) -> bool:
    """Whether its workload says that loads change from step to step. What a natural router will choose nobody knows."""
    workload = experiment.workload
    return experiment.goes_on and (bool(workload.params.get("replay")) or workload.generator in DRIFTING)


def certify_step(experiment: Experiment, step: int, *, ran: bool) -> StepCertificate:
    """``ran``: its tokens were drawn, so that they can be drawn once more for their hash."""
    topology, layers = Topology(experiment.cluster.shape), num_layers(experiment)
    return _certified(experiment.workload, experiment.model, topology, experiment.groups, layers, step, ran)


@functools.lru_cache(maxsize=1024)  # the systems of a race have the same ones
def _certified(
    workload: Workload, model: Model, topology: Topology, groups: Groups | None, layers: int, step: int, ran: bool
) -> StepCertificate:
    few = None if ran else few_tokens(workload, model, topology, layers)
    here, before = (
        [Outlined(workload, model, topology, step=at, layer=layer, few=few) for layer in range(layers)]
        for at in (step, max(step - 1, 0))
    )
    whole = groups or Groups(topology, topology.shape)
    placement = whole.contiguous(model.num_experts)
    found = [imbalance(expert_counts(each), placement, topology, groups) for each in here]
    digest, num_ids = "", layers * sum(workload.tokens(topology.num_ranks)) * model.top_k
    if ran or num_ids <= HASHED_IDS:
        digest = hashlib.sha256("".join(each.digest for each in here).encode()).hexdigest()[:16]
    shares, earlier = (np.stack([_shares(each) for each in outlines]) for outlines in (here, before))  # [L, E]
    drift = float(np.abs(shares - earlier).sum(1).mean() / 2) if step else np.nan
    return StepCertificate(
        digest, {level: float(np.mean([each[level] for each in found])) for level in found[0]}, drift
    )


def _shares(routing: Outlined) -> np.ndarray:
    load = expert_counts(routing).sum(0)
    return np.asarray(load / max(1, load.sum()))


__all__ = ["StepCertificate", "certify_step", "drifts"]
