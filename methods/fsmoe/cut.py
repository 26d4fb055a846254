"""From a case and the cluster's costs to how the layer is cut: what FSMoE's planners decide before training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from harness import ledger
from harness.comm.fits import Fit
from harness.errors import UserError, bad
from harness.layer import gates
from harness.layer.work import ATTENTION_GEMMS, attention_macs, expert_products
from harness.ledger import Calibration
from harness.plan.cost import Even, Experts, Transfer
from harness.routing.certificate import expert_counts
from harness.routing.types import Routing
from harness.specs import DTYPE_BYTES, EXPERTS_CHOOSE, GEMMS, Cluster
from harness.system import Case, GradientSlices
from methods.fsmoe.costs import attention_gradient_elements, layer_costs, reduce_costs, stated_costs
from methods.fsmoe.degree import DEGREES
from methods.fsmoe.place import Slices, place, unweighed_slices
from methods.fsmoe.schedule import Sizes
from methods.fsmoe.step import Decision, Policy

#: Lina's fixed chunk is 30 MB beside all-to-alls of tens of MB: on small links half of one all-to-all's buffer
LINA_CHUNK_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a layer is cut, on every rank alike.

    ``reduced_bytes``: of one rank's gradients (of dense parts whose backward is done), all-reduced between nodes in the
    MoE part, beside the dense part and after the layer, each in so many messages.
    """

    degree_forward: int = 1
    degree_backward: int = 1
    reduced_bytes: tuple[int, int, int] = (0, 0, 0)
    messages: tuple[int, int, int] = (1, 1, 1)

    @property
    def multiple(self) -> int:
        """The capacity is padded to a multiple of this, as the authors' code does."""
        return math.lcm(self.degree_forward, self.degree_backward)


@dataclasses.dataclass(frozen=True)
class LayerSizes:
    """One generalized layer on one rank: what it moves and computes, and seconds of its dense part where that is a
    stand-in."""

    forward: Sizes
    backward: Sizes
    dense_s: tuple[float, float]
    gradient_bytes: int


def layer_sizes(case: Case, capacity: int) -> LayerSizes:
    """Sizes of a case with ``capacity`` slots an expert and rank; its stand-ins priced by the cluster's gemm."""
    model, topology = case.model, case.topology
    num_local = topology.num_ranks // topology.shape[0]
    num_esp = num_local if sharded(case) else 1
    gemms = 0 if case.identity_experts else GEMMS[model.ffn_type]
    slots, width = model.num_experts * capacity * model.hidden, DTYPE_BYTES[case.dtype]
    scope = "inter" if sharded(case) else "flat"
    forward, backward = Sizes.both(slots, model.ffn, gemms, width, num_esp, scope=scope)
    forward, backward = (
        dataclasses.replace(each, stages=_stages(case, each), experts=_experts(case, capacity, num_esp, times))
        for each, times in ((forward, 1), (backward, 2))
    )
    gradient_bytes = int(case.options.get("gradient_bytes", 0))
    if not case.stand_in:
        return LayerSizes(forward, backward, (0.0, 0.0), gradient_bytes)
    assert case.cluster is not None
    alpha, beta = case.cluster.linear("gemm")
    forward, backward = (
        dataclasses.replace(sizes, wait_s=(sizes.gemms * alpha, sizes.macs * beta)) for sizes in (forward, backward)
    )
    tokens = max(case.routing.tokens) * num_local  # of a node
    attention = float(attention_macs(model.hidden, tokens, model.seq, causal=False)) / num_local
    if "gradient_bytes" not in case.options:
        elements = int(attention_gradient_elements(model.hidden, num_local))
        gradient_bytes = elements * DTYPE_BYTES[case.dtype]
    forward_s = ATTENTION_GEMMS * alpha + attention * beta
    dense_s = (forward_s, 2 * forward_s)
    return LayerSizes(forward, backward, dense_s, gradient_bytes)


def _experts(case: Case, capacity: int, num_esp: int, times: int) -> Experts | None:
    """On every rank alike: slots of all ranks through a share of its own experts."""
    if case.identity_experts:
        return None
    num_ranks, model = case.topology.num_ranks, case.model
    num_own = model.num_experts * num_esp // num_ranks
    shard = model.model_copy(update={"ffn": model.ffn // num_esp})
    rows = np.full((1, num_own), float(num_ranks * capacity))
    return Experts(rows, expert_products(shard) * times, DTYPE_BYTES[case.dtype])


def _stages(case: Case, sizes: Sizes) -> tuple[Even | Transfer, ...] | None:
    """Of an all-to-all over all ranks (``methods.fsmoe.mesh``), or over one node, where shards send nothing. None: it
    is one collective."""
    nodes, num_ranks = case.topology.shape[0], case.topology.num_ranks
    num_local, algorithm = num_ranks // nodes, case.options.get("all_to_all", "flat")
    slot_bytes = float(sizes.slot_bytes)
    if sharded(case):
        return None if nodes > 1 else ()
    if algorithm == "2dh" and num_local > 1:
        return Even("a2a", "intra", slot_bytes), *([Even("a2a", "inter", slot_bytes)] if nodes > 1 else [])
    if algorithm == "1dh" and num_local > 1:
        node, leads = case.topology.unit_of(0), np.arange(num_ranks) % num_local == 0
        same = node[:, None] == node
        there = (same & ~leads[:, None] & leads) * slot_bytes
        across = (~same & leads[:, None] & leads) * (slot_bytes * num_local / nodes)
        return Transfer("a2a", "intra", there), Transfer("a2a", "inter", across), Transfer("a2a", "intra", there.T)
    return None


def planned_capacity(case: Case, routing: Routing) -> int:
    """Slots an expert and rank that the case's routing will need, as ``FSMoELayer`` finds out by an all-reduce."""
    model, most = case.model, int(expert_counts(routing).max())
    allowed = max(gates.capacity(model, count) for count in case.routing.tokens)
    if model.gate in EXPERTS_CHOOSE:
        most = allowed
    elif model.capacity_factor is not None:
        most = min(most, allowed)
    return max(1, most)


def padded_sizes(case: Case, cut: Cut) -> LayerSizes:
    """Sizes of the case's own routing as ``cut`` pads it."""
    return layer_sizes(case, padded_capacity(case, case.routing, cut))


def padded_capacity(case: Case, routing: Routing, cut: Cut) -> int:
    """``planned_capacity`` as ``cut`` pads it."""
    return -(-planned_capacity(case, routing) // cut.multiple) * cut.multiple


def choose_cut(case: Case, policy: Policy, costs: Cluster | None = None, least_bytes: float = 0.0) -> Cut:
    """What ``policy`` decides for a case by ``costs`` (by default the latest calibration of the case's cluster).

    Degrees are weighed whose all-to-alls are of ``least_bytes`` or more: of smaller ones the costs say nothing.

    Without costs nothing can be weighed: one chunk, and gradients in the MoE part where the policy puts them anywhere.
    Given degrees (``options``) are taken; ``UserError`` if only one is given."""
    given = forced(case)
    sizes = layer_sizes(case, planned_capacity(case, case.routing))
    if costs is None:
        costs, least_bytes = calibrated(case)
    if costs is None:
        degrees = given or (1, 1)
        part = {"after": 2, "dense": 1}.get(policy.gradients, 0)
        reduced = tuple(sizes.gradient_bytes if i == part else 0 for i in range(3))
        return Cut(*degrees, reduced)  # type: ignore[arg-type]
    decided = Decision(
        policy,
        layer_costs(sizes.forward, costs),
        layer_costs(sizes.backward, costs),
        reduce_costs(costs),
        sizes.gradient_bytes,
        sizes.dense_s[1],
        chunk_bytes=LINA_CHUNK_SHARE * sizes.forward.slot_bytes,
        degrees=_degrees_in_range(sizes, least_bytes),
        forced=given,
    )
    element = DTYPE_BYTES[case.dtype]
    in_moe, beside = (int(part) // element * element for part in (decided.moe_bytes, decided.dense_bytes))
    return Cut(
        int(decided.forward),
        int(decided.backward),
        (in_moe, beside, sizes.gradient_bytes - in_moe - beside),
        (max(1, int(decided.moe_chunks)), max(1, int(decided.dense_chunks)), 1),
    )


def settle(
    case: Case, policy: Policy, gradient_bytes: Sequence[int], scope: str
) -> tuple[list[int], list[GradientSlices]]:
    """What a training step does with the gradients of its attentions, last layer first: degrees of the layers'
    backwards beside them (none: as they were cut before), and slices. ``case``: of the first layer."""
    found = choose_slices(case, policy, gradient_bytes, scope)
    if found is None:  # nothing can be weighed: as ``choose_cut``
        return [], unweighed_slices(policy, gradient_bytes)
    degrees = [] if "degree_backward" in case.options else found.degree_backward.tolist()
    return degrees, found.as_slices(DTYPE_BYTES[case.dtype])


def with_degrees(case: Case, cut: Cut) -> Case:
    """``case``, to be cut so and not otherwise."""
    degrees = {"degree_forward": cut.degree_forward, "degree_backward": cut.degree_backward}
    return dataclasses.replace(case, options={**case.options, **degrees})


def choose_slices(case: Case, policy: Policy, gradient_bytes: Sequence[int], scope: str) -> Slices | None:
    """Where ``policy`` sends the gradients of a training step, ``gradient_bytes`` of each layer in backward order, and
    the degrees that go with it; None without costs. ``scope``: of their all-reduce."""
    costs, least_bytes = calibrated(case, f"ar.{scope}")
    if costs is None or f"ar.{scope}" not in costs.collectives:
        return None
    sizes = layer_sizes(case, planned_capacity(case, case.routing))
    attention = float(attention_macs(case.model.hidden, max(case.routing.tokens), case.model.seq, causal=False))
    alpha, beta = costs.linear("gemm")
    dense_s = 2 * (ATTENTION_GEMMS * alpha + beta * attention)
    return place(
        policy,
        layer_costs(sizes.forward, costs),
        layer_costs(sizes.backward, costs),
        reduce_costs(costs, scope=scope),
        gradient_bytes,
        dense_s,
        chunk_bytes=LINA_CHUNK_SHARE * sizes.forward.slot_bytes,
        degrees=_degrees_in_range(sizes, least_bytes),
        element_bytes=DTYPE_BYTES[case.dtype],
    )


def calibrated(case: Case, *others: str) -> tuple[Cluster | None, float]:
    """The case's cluster with fitted costs (and those of ``others``), of its latest calibration, or as stated; and the
    smallest all-to-all that they hold for."""
    if case.cluster is None:
        return None, 0.0
    found = ledger.told(case.cluster)
    if found is not None:
        return known_costs(case, found, *others)
    return stated_costs(case.cluster, (*cost_keys(case), *others)), 0.0


def known_costs(case: Case, calibration: Calibration, *others: str) -> tuple[Cluster, float]:
    """What a calibration says of a case's cluster: the costs that it needs, and the smallest all-to-all in range."""
    keys = (*cost_keys(case), *others)
    fit = calibration.fit(keys[0])
    assert isinstance(fit, Fit)
    return calibration.cluster(keys), fit.range_bytes[0]


def sharded(case: Case) -> bool:
    """Whether experts are cut over the ranks of a node, or whole on one rank each."""
    return case.options.get("experts", "sharded") == "sharded"


def cost_keys(case: Case) -> tuple[str, ...]:
    """Costs that a case's planning and simulation need."""
    links = ("a2a.inter", "ag.intra", "rs.intra") if sharded(case) else ("a2a.flat",)
    return (*links, "ar.inter") if case.stand_in else (*links, "ar.inter", "gemm")


def _degrees_in_range(sizes: LayerSizes, least_bytes: float) -> list[int]:
    return [r for r in DEGREES if r == 1 or sizes.forward.slot_bytes / r >= least_bytes]


def costs_of(case: Case, keys: Sequence[str]) -> Cluster | None:
    """The case's cluster with fitted costs under ``keys``, of its latest calibration, or as stated; None where it has
    not all of them."""
    if case.cluster is None:
        return None
    found = ledger.told(case.cluster)
    if found is None:
        return stated_costs(case.cluster, keys)
    try:
        return found.cluster(keys)
    except UserError:  # not measured, or refused: nothing can be weighed
        return None


def forced(case: Case) -> tuple[int, int] | None:
    """Degrees that are given and not planned."""
    given = [case.options.get(f"degree_{direction}") for direction in ("forward", "backward")]
    if given == [None, None]:
        return None
    for direction, degree in zip(("forward", "backward"), given, strict=True):
        if degree not in DEGREES:
            remedy = f"must be one of {', '.join(map(str, DEGREES))}; give both directions or none"
            raise bad(f"options.degree_{direction}", degree, remedy)
    return int(given[0]), int(given[1])  # type: ignore[arg-type]
