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
import math
from collections.abc import Iterable
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from harness.comm.exchange import FlatExchange, FlatPlan
from harness.comm.handover import Handover, pop
from harness.comm.job import Job
from harness.comm.rows import accumulator
from harness.errors import bad
from harness.layer.experts import Experts
from harness.layer.gates import Gated
from harness.layer.weights import Weights
from harness.options import whole
from harness.plan.graph import COMPUTE, INTER, Plan, Work
from harness.plan.replicated import Policy, ReplicatedLayer, ReplicatedPassage, ReplicatedSystem
from harness.plan.segment import Segment
from harness.specs import DTYPE_BYTES, GEMMS
from harness.system import Case

FLOPS_PER_S, NET_BYTES_PER_S = 11.5e12, 6.25e9  # defaults of the public code, where a cluster does not say
GROUPS = 4  # of the smart schedule


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


def smart_schedule_s(
    send_s: np.ndarray | float,
    compute_s: np.ndarray | float,
    receive_s: np.ndarray | float,
    *,
    groups: int = GROUPS,
    weights_s: np.ndarray | float = 0.0,
    shadows_s: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Seconds from the first S_i to the last R_i, all arguments [...]: of whole S, C and R, here in ``groups`` equal
    parts; ``weights_s``: of shadows' weights; ``shadows_s``: of computing with them, which waits for the weights."""
    sent = np.zeros(np.broadcast_shapes(*(np.shape(x) for x in (send_s, compute_s, receive_s, weights_s, shadows_s))))
    computed = np.zeros_like(sent)
    done = []
    for _ in range(groups):
        sent = sent + np.asarray(send_s) / groups
        computed = np.maximum(computed, sent) + np.asarray(compute_s) / groups
        done.append(computed)
    line = sent + weights_s
    busy = np.where(np.asarray(shadows_s) > 0, np.maximum(computed, line) + shadows_s, computed)
    for each in done:
        line = np.maximum(line, each) + np.asarray(receive_s) / groups
    return np.maximum(line, busy)


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


class FasterLayer(ReplicatedLayer):
    """``num_groups``: n of the smart schedule."""

    num_groups = 1

    def passage(self, gated: Gated | None = None) -> FasterPassage:
        return FasterPassage(self, gated)


class Part(Handover):
    """One S, C and R: rows between ranks whose groups lie so far apart, or (``home``) those that stay with a shadow."""

    def __init__(self) -> None:
        self.dispatch, self.experts, self.combine = Segment(), Segment(), Segment()
        self.plan: FlatPlan
        self.arrived: torch.Tensor
        self.made: torch.Tensor
        self.home: torch.Tensor | None = None  # None: no row came
        self.grads: list[torch.Tensor | None] = [None, None]  # of the rows and the weights


class AtHome(FlatExchange):
    """Rows that go nowhere."""

    def _out(self, rows: torch.Tensor, plan: FlatPlan) -> torch.Tensor:
        return rows.index_select(0, plan.by_expert)

    def _home(self, rows: torch.Tensor, plan: FlatPlan) -> torch.Tensor:
        return rows.index_select(0, plan.by_source)


class FasterPassage(ReplicatedPassage):
    """The smart schedule: group i of ranks exchanges with group i + j at once, for j = 0, 1, ...; the experts compute
    on part j while part j + 1 travels, and on shadows' tokens last."""

    layer: FasterLayer

    def __init__(self, layer: FasterLayer, gated: Gated | None):
        super().__init__(layer, gated)
        self.parts = [Part() for _ in range(layer.num_groups)]
        self.shadows = Part()
        self.stay = AtHome(layer.job, layer.placement)
        self.smart = len(self.parts) > 1 and isinstance(layer.experts, Experts)

    def _plan(self, held: np.ndarray, weights: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
        if not self.smart:
            return super()._plan(held, weights, counts)
        num_ranks = self.layer.job.num_ranks
        distance = apart(num_ranks, len(self.parts))
        copied = self.hosts & ~self.own.hosts  # [E, rank]
        stays = copied[None] & np.eye(num_ranks, dtype=bool)[:, None]  # [source, E, rank]
        masks = [(distance == j)[:, None, :] & ~stays for j in range(len(self.parts))]
        for part, only in zip((*self.parts, self.shadows), (*masks, stays), strict=True):
            part.plan = self.layer.exchange_.plan_to(
                self.hosts, held, self.ids, weights, self.kept, counts, np.broadcast_to(only, stays.shape)
            )
        return weights

    def _combine_part(self, part: Part, exchange: FlatExchange) -> torch.Tensor:
        def combine(made: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            part.plan.weights = weights
            return exchange.combine(made, part.plan)

        return part.combine.forward(combine, pop(part, "made"), self.weights)

    def _compute(self, part: Part) -> None:
        def experts(arrived: torch.Tensor) -> torch.Tensor:
            own = len(self.layer.experts.local)
            if part is self.shadows:
                return self.layer.experts(arrived, part.plan.counts, [each.tensors for each in self.copies])
            return self.layer.experts(arrived, part.plan.counts[:own])

        part.made = part.experts.forward(experts, pop(part, "arrived"))

    def there_and_back(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        if not self.smart:
            return super().there_and_back(plan, prefix=prefix, after=after, gradients=gradients)
        exchange = self.layer.exchange_

        def metadata() -> None:
            self._metadata(self.weights)

        def send(part: Part) -> None:
            part.arrived = part.dispatch.forward(lambda rows: exchange.dispatch(rows, part.plan), self.rows)

        def receive(part: Part) -> None:
            part.home = self._combine_part(part, exchange)

        def shadows() -> None:
            part = self.shadows
            if not int(part.plan.counts.sum()):
                return
            part.arrived = part.dispatch.forward(lambda rows: self.stay.dispatch(rows, part.plan), self.rows)
            self._compute(part)
            part.home = self._combine_part(part, self.stay)

        plan.add(f"{prefix}metadata", INTER, after, run=metadata)
        sent = [plan.add(f"{prefix}dispatch[{j}]", INTER, run=partial(send, part)) for j, part in enumerate(self.parts)]
        ready = self.ready(plan, prefix)
        if gradients is not None:
            plan.add(f"{prefix}gradients", INTER, (), gradients.cost, gradients.run)
        made = [
            plan.add(f"{prefix}experts[{j}]", COMPUTE, [arrived], run=partial(self._compute, part))
            for j, (part, arrived) in enumerate(zip(self.parts, sent, strict=True))
        ]
        last = [plan.add(f"{prefix}experts", COMPUTE, [*sent, *ready], run=shadows)]
        for j, (part, computed) in enumerate(zip(self.parts, made, strict=True)):
            home = plan.add(f"{prefix}combine[{j}]", INTER, [computed], run=partial(receive, part))
        return [*last, home]

    def arrive(self) -> torch.Tensor:
        if not self.smart:
            return super().arrive()
        homes = [part.home for part in (*self.parts, self.shadows) if part.home is not None]
        whole = torch.stack([home.detach() for home in homes]).sum(0, dtype=accumulator(homes[0].dtype))
        return whole.to(homes[0].dtype).requires_grad_(any(home.requires_grad for home in homes))

    def back_and_there(
        self, plan: Plan, *, prefix: str = "", after: Iterable[str] = (), gradients: Work | None = None
    ) -> list[str]:
        if not self.smart:
            return super().back_and_there(plan, prefix=prefix, after=after, gradients=gradients)

        def send(part: Part) -> None:
            part.grads = part.combine.backward(self.dhome)

        def compute(part: Part) -> None:
            part.grads[:1] = part.experts.backward(part.grads[0])

        def receive(part: Part) -> None:
            part.grads[:1] = part.dispatch.backward(part.grads[0])

        def shadows() -> None:
            if self.shadows.home is not None:
                for step in (send, compute, receive):
                    step(self.shadows)

        sent = [
            plan.add(f"{prefix}combine[{j}]", INTER, after, run=partial(send, part))
            for j, part in enumerate(self.parts)
        ]
        made = [
            plan.add(f"{prefix}experts[{j}]", COMPUTE, [arrived], run=partial(compute, part))
            for j, (part, arrived) in enumerate(zip(self.parts, sent, strict=True))
        ]
        last = [plan.add(f"{prefix}experts", COMPUTE, after, run=shadows)]
        if gradients is not None:
            plan.add(f"{prefix}gradients", INTER, (), gradients.cost, gradients.run)
        for j, (part, computed) in enumerate(zip(self.parts, made, strict=True)):
            home = plan.add(f"{prefix}dispatch[{j}]", INTER, [computed], run=partial(receive, part))
        return [*last, home]

    def arrive_back(self) -> torch.Tensor | None:
        if not self.smart:
            return super().arrive_back()
        drows, dweights = zip(*(pop(part, "grads") for part in (*self.parts, self.shadows)), strict=True)
        self.dhome = None
        self.dweights = _sum(dweights)
        return _sum(drows)


def _sum(parts: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    if not there:
        return None
    return torch.stack(there).sum(0, dtype=accumulator(there[0].dtype)).to(there[0].dtype)


class FasterMoE(ReplicatedSystem):
    name = "fastermoe"
    title = "FasterMoE: shadowed experts, chosen after every gate, and the smart schedule"
    source = "PPoPP 2022 (He et al.), dynamic shadowing with the loads of experts, and the pairwise schedule"
    options: ClassVar[dict[str, str]] = {
        "shadows": "popular experts to shadow in every batch (default: as many as its latency model finds best)",
        "groups": f"of ranks in the smart schedule, 1: none (default: {GROUPS}, or as many as divide the ranks)",
    }
    variants: ClassVar[dict[str, dict[str, bool | int | float | str]]] = {"three shadows": {"shadows": 3}}

    @classmethod
    def policy(cls, case: Case, job: Job | None) -> Shadowing:
        wanted = whole(case, "shadows", 0, case.model.num_experts, 0) if "shadows" in case.options else None
        return Shadowing(LatencyModel.of(case), wanted)

    @classmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> FasterLayer:
        layer = FasterLayer(case, job, weights, cls.policy(case, job))
        layer.num_groups = num_groups(case)
        return layer

    @classmethod
    def copied_parameters(cls, case: Case) -> int:
        return (case.model.num_layers + 1) * (cls.policy(case, None).num_shadows or 0)  # with one layer's gradients


def num_groups(case: Case) -> int:
    """Of the smart schedule, by a case's options."""
    num_ranks = case.topology.num_ranks
    wanted = whole(case, "groups", math.gcd(GROUPS, num_ranks), num_ranks)
    if num_ranks % wanted:
        raise bad("options.groups", wanted, f"must divide the {num_ranks} ranks")
    return wanted


def apart(num_ranks: int, num_groups: int) -> np.ndarray:
    """How many groups lie from one rank to another, going around, int [source, rank]."""
    group = np.arange(num_ranks) * num_groups // num_ranks
    return (group[None, :] - group[:, None]) % num_groups
