"""FSMoE's way to the experts as an exchange: a rank's tokens in capacity slots [E, C, M] (``harness.layer.order``), cut
by the capacity into chunks (arXiv 2501.10714, section 3.1).

Hop 0 is an equal all-to-all between nodes, among ranks with equal local index; hop 1 an all-gather inside the node, so
that every rank of it sees all rows of the node's experts, and on the way home a reduce-scatter, which sums what each of
them made. Of whole experts there is the all-to-all alone, over all ranks.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.assign import Hosting
from harness.comm.exchange import Exchange
from harness.comm.job import Job
from harness.comm.journey import Cut, Journey, all_to_all
from harness.comm.trip import Trip
from harness.errors import bad
from harness.layer.order import Slots, assign_slots
from harness.placement import Placement
from harness.plan.cost import Cost, Even, InTurn, Transfer
from harness.plan.slots import ExchangeSlot, Fares, Options, Reach
from harness.routing.types import Routing
from harness.system import Case
from harness.topology import Topology
from methods.fsmoe.hooks import Hooks
from methods.fsmoe.sizes import LayerSizes, Sizes, layer_sizes, planned_capacity, sharded


class SlotTrip(Trip):
    """``begin`` and ``end`` have slots [E, C, M]; what arrives is a chunk [E_ep, N_ESP, N_EP, c, M] of the job's ranks.
    ``hooks`` see what crosses between EP ranks."""

    journey: SlotJourney

    def begin(self, x: torch.Tensor) -> None:
        num_experts, capacity, hidden = x.shape
        assert not capacity % self.degree, "padded to both degrees"
        self.source, self.result, self.width = x, x.new_empty(x.shape), capacity // self.degree
        num_ep = self.journey.exchange.num_ep
        self.shape = (num_ep, num_experts // num_ep, self.width, hidden)  # of a chunk that one rank sends

    def out(self, hop: int, chunk: int) -> None:
        exchange, hooks = self.journey.exchange, self.journey.exchange.hooks
        if not hop:
            parts = self.source[:, self.slots(chunk)].contiguous().view(self.shape)
            self.parts[chunk] = hooks.after_dispatch(exchange.there(hooks.before_dispatch(parts)))
        elif exchange.esp_group is not None:
            own = self.parts[chunk]
            gathered = own.new_empty(exchange.num_esp, *own.shape)
            dist.all_gather_into_tensor(gathered.flatten(0, -2), own.flatten(0, -2), exchange.esp_group)
            self.parts[chunk] = gathered

    def arrived(self, chunk: int | None) -> torch.Tensor:
        rows = self.parts.pop(chunk).view(self.journey.exchange.num_esp, *self.shape)
        return rows.permute(2, 0, 1, 3, 4)  # type: ignore[no-any-return]

    def give(self, chunk: int | None, made: torch.Tensor) -> None:
        self.parts[chunk] = made.permute(1, 2, 0, 3, 4).contiguous()

    def home(self, hop: int, chunk: int) -> None:
        exchange, hooks = self.journey.exchange, self.journey.exchange.hooks
        if not hop:
            parts = hooks.before_combine(self.parts.pop(chunk).view(-1, *self.shape[1:]))
            self.result[:, self.slots(chunk)] = hooks.after_combine(exchange.back(parts)).flatten(0, 1)
        elif exchange.esp_group is not None:
            partial = self.parts[chunk]
            own = partial.new_empty(self.shape)
            dist.reduce_scatter_tensor(own.flatten(0, -2), partial.flatten(0, -2), group=exchange.esp_group)
            self.parts[chunk] = own

    def end(self) -> torch.Tensor:
        return self.result

    def slots(self, chunk: int) -> slice:
        return slice(chunk * self.width, (chunk + 1) * self.width)


class SlotJourney(Journey):
    """Of which nothing need be told; gate weights are applied at home."""

    def __init__(self, exchange: SlotExchange, cut: Cut):
        super().__init__(cut, learns=False)
        self.exchange = exchange

    def tell(self, hop: int) -> None:
        pass

    def gradients(self) -> torch.Tensor:
        raise AssertionError("weights do not travel")


class SlotExchange(Exchange):
    """Between ``num_ep`` groups of ``num_esp`` ranks (expert parallelism, EP, and sharding, ESP); each holds
    ``1 / num_ep`` of the experts, each of its ranks a shard. ``sharded``: an expert's shards fill a node, as the paper
    assumes; else experts are whole, and ``algorithm`` is among all ranks."""

    trip = SlotTrip

    def __init__(self, job: Job, placement: Placement, sharded: bool, algorithm: str):
        super().__init__(job, placement)
        self.hooks, self.algorithm = Hooks(), _rail if sharded else ALGORITHMS[algorithm]
        self.num_esp = job.num_ranks // job.topology.shape[0] if sharded else 1
        self.num_ep = job.num_ranks // self.num_esp
        self.ep_index, self.esp_index = divmod(job.rank, self.num_esp)
        self.esp_group = job.inner(0) if sharded else None

    def across(self, parts: torch.Tensor) -> torch.Tensor:
        """parts [num_ep, ...] to every EP rank of this rank's shard -> parts from every one."""
        return self.algorithm(self.job, parts)

    def there(self, parts: torch.Tensor) -> torch.Tensor:
        """The outermost hop to the experts; an exchange of one hop gives what came from all ranks, [num_esp, num_ep,
        ...]."""
        return self.across(parts)

    def back(self, parts: torch.Tensor) -> torch.Tensor:
        """The same home; of one hop from [num_esp * num_ep, ...] partial sums, added up."""
        return self.across(parts)

    def journey(
        self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None, hosting: Hosting, cut: Cut
    ) -> SlotJourney:
        return SlotJourney(self, cut)

    def assign(self, ids: torch.Tensor, kept: torch.Tensor | None, multiple: int) -> Slots:
        """Collective: as many as the fullest expert of any rank takes, so that nothing is dropped beside what the gate
        drops. Interpretation of f = * and of ragged ranks: buffers are of one size everywhere, for an equal
        all-to-all."""
        num_experts = len(self.placement.hosts)
        chosen = ids.flatten() if kept is None else ids.flatten()[kept.flatten()]
        most = torch.bincount(chosen, minlength=num_experts).max()
        if self.job.num_ranks > 1:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.job.world)
        return assign_slots(ids, num_experts, max(1, int(most)), kept=kept, multiple=multiple)


# ------------------------------------------------------------------------- the all-to-all algorithms, on [num_ep, ...]


def _equal(parts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    each = [1] * len(parts)
    return all_to_all(parts, each, each, group)


def _rail(job: Job, parts: torch.Tensor) -> torch.Tensor:
    """Among ranks with equal local index."""
    return _equal(parts, job.rail(0))


def _flat(job: Job, parts: torch.Tensor) -> torch.Tensor:
    """One all-to-all over all ranks (NCCL's)."""
    return _equal(parts, job.world if job.num_ranks > 1 else None)


def _two_dimensional(job: Job, parts: torch.Tensor) -> torch.Tensor:
    """2DH (Tutel, DeepSpeed-MoE): inside the node to the rank with the destination's local index, then between nodes
    among like ranks: fewer and larger messages cross."""
    by_local = parts.unflatten(0, (job.topology.shape[0], -1)).transpose(0, 1).contiguous()  # [L to, nodes to, ...]
    here = _equal(by_local, job.inner(0))  # [L from, nodes to, ...]
    return _rail(job, here.transpose(0, 1).contiguous()).view(parts.shape)  # [nodes from, L from, ...]


def _one_dimensional(job: Job, parts: torch.Tensor) -> torch.Tensor:
    """1DH (Hetu): a node's ranks hand all to its first, the first ranks exchange, and hand out what came."""
    nodes, inner = job.topology.shape[0], job.inner(0)
    if inner is None:
        return _flat(job, parts)
    num_local, leads = job.num_ranks // nodes, dist.get_rank(inner) == 0
    gathered = handed = None
    if leads:
        gathered = list(parts.new_empty(num_local, *parts.shape))  # [L from, ranks to, ...]
    dist.gather(parts, gathered, group=inner, group_dst=0)
    if gathered is not None:
        by_node = torch.stack(gathered).unflatten(1, (nodes, num_local)).transpose(0, 1).contiguous()
        arrived = _rail(job, by_node)  # [nodes from, L from, L to, ...]
        handed = list(arrived.flatten(0, 1).transpose(0, 1).contiguous())  # [L to, ranks from, ...]
    received = torch.empty_like(parts)
    dist.scatter(received, handed, group=inner, group_src=0)
    return received


ALGORITHMS = {"flat": _flat, "1dh": _one_dimensional, "2dh": _two_dimensional}

# --------------------------------------------------------------------------------------------------------- in recipes


@dataclasses.dataclass(frozen=True)
class SlotFares(Fares):
    """The same there and back, in both directions."""

    sizes: Sizes
    topology: Topology
    num_hops: int  # type: ignore[assignment]

    def bytes(self, part: str) -> np.ndarray | None:
        if part.startswith("metadata"):
            return None
        return np.sum([_sent(self.cost(part, hop, 1), self.topology) for hop in range(self.num_hops)], axis=0)  # type: ignore[no-any-return]

    def cost(self, part: str, hop: int, degree: int) -> Cost | None:
        return self.sizes.hop(hop, "ag" if part in ("dispatch", "combine_grad") else "rs", degree)


def _sent(cost: Cost | None, topology: Topology) -> np.ndarray:
    """Of collectives in which every rank has something of equal size for, or of, every other of its group."""
    num_ranks, nodes = topology.num_ranks, topology.shape[0]
    match cost:
        case None:
            return np.zeros((num_ranks, num_ranks))
        case InTurn():
            return np.sum([_sent(part, topology) for part in cost.parts], axis=0)  # type: ignore[no-any-return]
        case Transfer():
            return cost.matrix
    assert isinstance(cost, Even), cost
    node, place = np.divmod(np.arange(num_ranks), num_ranks // nodes)
    alike = {"inter": place, "intra": node, "flat": np.zeros(num_ranks)}[cost.scope]
    group = alike[:, None] == alike
    return (group & ~np.eye(num_ranks, dtype=bool)) * (cost.num_bytes / group.sum(1))


class CapacitySlots(ExchangeSlot):
    name = "slots"
    title = "capacity slots: an equal all-to-all between nodes, all-gather and reduce-scatter inside them"
    source = "arXiv 2501.10714, section 3.1"
    options: ClassVar[Options] = {
        "all_to_all": "of whole experts: flat, 1dh (through one rank a node) or 2dh (inside nodes, then between them); "
        "default flat"
    }
    reaches: ClassVar[Reach] = "node"

    def refuse(self, case: Case) -> str | None:
        groups = case.topology.shape[0] if sharded(case) else case.topology.num_ranks
        if case.model.num_experts % groups:
            return f"num_experts = {case.model.num_experts} does not divide over {groups} groups of ranks"
        return None

    def num_hops(self, case: Case) -> int:
        return 2 if sharded(case) else 1

    def make(self, case: Case, job: Job) -> SlotExchange:
        algorithm = one_of(case, "all_to_all", *ALGORITHMS)
        if sharded(case) and algorithm != "flat":
            raise bad("options.all_to_all", algorithm, "is a choice for whole experts; add experts: whole")
        return SlotExchange(job, case.placement, sharded(case), algorithm)

    def links(self, case: Case) -> tuple[str, ...]:
        """Costs of its hops."""
        return ("a2a.inter", "ag.intra", "rs.intra") if sharded(case) else ("a2a.flat",)

    def sizes(self, case: Case, capacity: int) -> LayerSizes:
        """Of a layer with ``capacity`` slots an expert and rank."""
        found = layer_sizes(case, capacity)
        return dataclasses.replace(found, forward=self.sent(found.forward), backward=self.sent(found.backward))

    def sent(self, sizes: Sizes) -> Sizes:
        """In hops of its own, where these are others than FSMoE's."""
        return sizes

    def fares(self, case: Case, routing: Routing, hosts: np.ndarray, cut: Cut, counted: bool = False) -> SlotFares:
        sizes = self.sizes(case, planned_capacity(case, routing, cut.pieces)).forward
        return SlotFares(sizes, case.topology, self.num_hops(case))


def one_of(case: Case, option: str, *known: str) -> str:
    """One of ``known``; by default the first."""
    value = case.options.get(option, known[0])
    if value not in known:
        raise bad(f"options.{option}", value, f"must be one of {', '.join(known)}")
    return str(value)
