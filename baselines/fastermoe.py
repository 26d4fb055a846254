"""FasterMoE (He et al., PPoPP 2022): shadowed experts, chosen at every step by a latency model, and its smart schedule.

*Shadowing*: the weights of a popular expert go to all ranks, so that its tokens stay where they are. In the paper's
symbols, of one layer with B_w tokens at worker w, H the hidden size, alpha H that of an expert, P the rate of a
device, W_net that of its network:

    Lat_comp = max_w 4 B_w alpha H^2 / P            Lat_comm = max_w B_w H / W_net
    without shadows     3 Lat_comp + 4 Lat_comm
    with r of them      3 Lat_comp(B') + 4 Lat_comm(B') + 2 r (2 alpha H^2 / W_net)

Experts are tried by descending load, one more as long as the time falls (Algorithm 1). The public code's default policy
sums the gathered counts over the wrong axis and so ranks *workers*; here loads are those of experts, as in the paper.

*Smart schedule*: the exchange in n groups of ranks, and the experts on what has arrived: S_i, C_i and R_i on two lanes.

Interpretations: the printed latency with shadows leaves out Lat_comm(B'), the tokens that still travel (and then one
shadow would seem to end all traffic): here it counts, unless ``as_printed``. Lat_comm counts tokens of other workers
only. All S_i come first, then weights of shadows, then all R_i; a shadow's tokens are computed after the C_i. Four
groups, and groups of ranks cost no bandwidth.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from baselines._smart_schedule import GroupedLayer, Groups, PricedGroups
from harness.comm.job import Job
from harness.layer.weights import Weights
from harness.options import whole
from harness.plan.passage import Passage
from harness.plan.replicated import Policy, ReplicatedSystem
from harness.specs import DTYPE_BYTES, GEMMS
from harness.system import Case

FLOPS_PER_S, NET_BYTES_PER_S = 11.5e12, 6.25e9  # defaults of the public code, where a cluster does not say


@dataclasses.dataclass(frozen=True)
class LatencyModel:
    """``hidden`` H, ``ffn`` alpha H, ``flops_per_s`` P and ``net_bytes_per_s`` W_net of one worker, ``gemms`` of an
    expert (2, or 3 for SwiGLU)."""

    hidden: int
    ffn: int
    flops_per_s: float
    net_bytes_per_s: float
    element_bytes: int = 2
    gemms: int = 2

    @classmethod
    def of(cls, case: Case) -> LatencyModel:
        """By the cluster's gemm costs or data sheet, and a worker's part of its node's port."""
        model, cluster = case.model, case.cluster
        flops, width = FLOPS_PER_S, NET_BYTES_PER_S
        if cluster is not None:
            if cluster.gemm is not None and cluster.gemm.beta_s_per_mac:
                flops = 2 / cluster.gemm.beta_s_per_mac
            elif cluster.device_flops_per_s is not None:
                flops = cluster.device_flops_per_s
            if (port := cluster.levels[0].unit_bytes_per_s) is not None:
                width = port * case.topology.shape[0] / case.topology.num_ranks
        return cls(model.hidden, model.ffn, flops, width, DTYPE_BYTES[case.dtype], GEMMS[model.ffn_type])

    @property
    def token_compute_s(self) -> float:
        """Of one token through one expert, forward."""
        return 2.0 * self.gemms * self.hidden * self.ffn / self.flops_per_s

    @property
    def token_travel_s(self) -> float:
        return self.hidden * self.element_bytes / self.net_bytes_per_s

    @property
    def expert_s(self) -> float:
        """Of an expert's weights through the network, and of their gradients."""
        return float(self.gemms * self.hidden * self.ffn * self.element_bytes / self.net_bytes_per_s)


def latencies(counts: np.ndarray, owner: np.ndarray, model: LatencyModel, *, as_printed: bool = False) -> np.ndarray:
    """Seconds of a layer's step with the 0, 1, ..., E most loaded experts shadowed, float64 [..., E + 1].

    ``counts`` [..., W, E]: tokens of each worker for each expert; ``owner`` int [E]."""
    counts = np.asarray(counts, dtype=np.float64)
    num_ranks, num_experts = counts.shape[-2:]
    order = popular(counts)
    total = np.take_along_axis(counts.sum(-2), order, -1)  # [..., E] by rank of popularity
    own = np.take_along_axis(counts, np.broadcast_to(order[..., None, :], counts.shape), -1)
    mine = owner[order][..., None, :] == np.arange(num_ranks)[:, None]  # [..., W, E]
    computed = own - mine * total[..., None, :]  # what a shadow changes at every worker
    arriving = mine * (own - total[..., None, :])
    at_first = (mine * total[..., None, :]).sum(-1, keepdims=True)
    computed = np.concatenate([at_first, computed], -1).cumsum(-1)
    arriving = np.concatenate([-arriving.sum(-1, keepdims=True), arriving], -1).cumsum(-1)
    travel = 4 * model.token_travel_s * arriving
    if as_printed:
        travel[..., 1:] = 0
    shadows_s = 2 * np.arange(num_experts + 1) * model.expert_s
    return (3 * model.token_compute_s * computed + travel).max(-2) + shadows_s


def popular(counts: np.ndarray) -> np.ndarray:
    """counts [..., W, E] -> experts by descending tokens of all workers, int [..., E]."""
    return np.argsort(-np.asarray(counts).sum(-2), axis=-1, kind="stable")


def shadowed(counts: np.ndarray, owner: np.ndarray, model: LatencyModel, *, as_printed: bool = False) -> np.ndarray:
    """Which experts to shadow, bool [..., E]: popular ones, one more as long as the latency falls.

    >>> model = LatencyModel(hidden=4, ffn=8, flops_per_s=1e3, net_bytes_per_s=1e3)
    >>> counts = np.array([[0, 40, 1, 1], [2, 40, 0, 0]])  # both workers want expert 1, which worker 0 owns
    >>> shadowed(counts, np.array([0, 0, 1, 1]), model).tolist()
    [False, True, False, False]
    """
    found = latencies(counts, owner, model, as_printed=as_printed)
    falls = found[..., 1:] < found[..., :-1]
    num_shadows = np.where(falls.all(-1), falls.shape[-1], falls.argmin(-1))  # the first that does not pay ends it
    chosen = np.zeros(falls.shape, dtype=bool)
    first = np.arange(falls.shape[-1]) < num_shadows[..., None]
    np.put_along_axis(chosen, popular(counts), first, -1)
    return chosen


class Shadowing(Policy):
    """``num_shadows``: of every batch; None: as many as the latency model finds best."""

    revises = True

    def __init__(self, model: LatencyModel, num_shadows: int | None):
        self.model, self.num_shadows = model, num_shadows

    def revise(self, hosts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        if self.num_shadows is None:
            chosen = shadowed(counts, hosts.argmax(1), self.model)
        else:
            chosen = np.zeros(len(hosts), dtype=bool)
            chosen[popular(counts)[: self.num_shadows]] = True
        return hosts | chosen[:, None]


class FasterMoE(ReplicatedSystem):
    name = "fastermoe"
    title = "FasterMoE: shadowed experts, chosen after every gate, and the smart schedule"
    source = "PPoPP 2022 (He et al.), dynamic shadowing with the loads of experts, and the pairwise schedule"
    slot_options: ClassVar[dict[str, str]] = {
        "shadows": "popular experts to shadow in every batch (default: as many as its latency model finds best)"
    }
    options: ClassVar[dict[str, str]] = {**slot_options, **Groups.options}
    schedule = Groups()
    recipe: ClassVar[dict[str, str]] = {"state": "fastermoe", "schedule": "fastermoe"}
    in_groups: ClassVar[bool] = True  # that schedule's
    variants: ClassVar[dict[str, dict[str, bool | int | float | str]]] = {"three shadows": {"shadows": 3}}

    @classmethod
    def policy(cls, case: Case, job: Job | None) -> Shadowing:
        wanted = whole(case, "shadows", 0, case.model.num_experts, 0) if "shadows" in case.options else None
        return Shadowing(LatencyModel.of(case), wanted)

    @classmethod
    def laid(cls, case: Case, policy: Policy) -> Passage | None:
        routing = cls.planned_routing(case)
        return None if routing is None else PricedGroups(cls, dataclasses.replace(case, routing=routing), policy)

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> GroupedLayer:
        return GroupedLayer(cls, case, job, weights)

    @classmethod
    def copied_parameters(cls, case: Case) -> int:
        return (case.model.num_moe_layers + 1) * (cls.policy(case, None).num_shadows or 0)  # with one layer's gradients


#: brought to recipes, by name
SCHEDULES = {"fastermoe": Groups()}
STATES = {"fastermoe": FasterMoE}
#: what the name alone gives
SHORT = {"fastermoe": "state"}
