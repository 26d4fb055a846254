"""FSMoE's schedule for any exchange (arXiv 2501.10714, sections 3 to 5): chunks of both directions, their hops on both
links at once beside the experts, gradients of attentions in flight.

The planner is the paper's, from a case and the cluster's costs: on ``slots`` of what it sends, gathers and computes;
elsewhere a single all-to-all is the exchange's outermost hop, all-gather and reduce-scatter are the hops inside the
node, of the busiest rank's bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from harness import ledger
from harness.comm.fits import Fit
from harness.comm.journey import Cut
from harness.errors import UserError, bad
from harness.layer.work import ATTENTION_GEMMS, attention_macs, expert_macs
from harness.plan.schedule import Chunks
from harness.plan.slots import ExchangeSlot, Options, ScheduleSlot
from harness.routing.certificate import expert_counts
from harness.specs import DTYPE_BYTES, GEMMS, Cluster
from harness.system import Case, GradientSlices
from methods.fsmoe.costs import NOTHING, LayerCosts, Linear, layer_costs, reduce_costs, stated_costs
from methods.fsmoe.degree import DEGREES
from methods.fsmoe.place import place, unweighed_slices
from methods.fsmoe.sizes import layer_sizes, planned_capacity
from methods.fsmoe.slots import CapacitySlots
from methods.fsmoe.step import POLICIES, Decision, Policy

#: Lina's fixed chunk is 30 MB beside all-to-alls of tens of MB: on small links half of one all-to-all's buffer
LINA_CHUNK_SHARE = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Weighed:
    """A layer on an exchange by the costs of ``cluster``: those of its forward, and the degrees of which they say
    something, as their all-to-alls are not too small."""

    cluster: Cluster
    forward: LayerCosts
    degrees: Sequence[int] = DEGREES

    @property
    def chunk_bytes(self) -> float:
        return max(1.0, LINA_CHUNK_SHARE * float(self.forward.a2a.n))


@dataclasses.dataclass(frozen=True)
class Adaptive(Chunks, ScheduleSlot):
    """``policy``: FSMoE's, or a rival's."""

    name: str = "fsmoe"  # type: ignore[misc]
    policy: Policy = POLICIES["fsmoe"]
    options: ClassVar[Options] = {
        "degree_forward": "chunks of the batch in forward, 1, 2, 4 or 8 (default: planned from the cluster's costs)",
        "degree_backward": "likewise in backward",
    }
    chunked: ClassVar[Mapping[str, Any]] = {"degree_forward": 4, "degree_backward": 2}
    source: ClassVar[str] = "arXiv 2501.10714, sections 3 to 6"

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{self.policy.title}, on any exchange"

    def cut(self, case: Case, exchange: ExchangeSlot) -> Cut:
        return self.decide(case, exchange)[0]

    def decide(self, case: Case, exchange: ExchangeSlot, weighed: Weighed | None = None) -> tuple[Cut, GradientSlices]:
        """How a layer is cut, on every rank alike, and where the gradients go that it has to reduce if it runs alone.
        Degrees that are given are taken. Where nothing can be weighed, there is one chunk, and gradients are in the MoE
        part where the policy puts them anywhere."""
        given, gradient_bytes, dense_s = forced(case), 0, 0.0
        if isinstance(exchange, CapacitySlots):
            sizes = layer_sizes(case, 1)
            gradient_bytes, dense_s = sizes.gradient_bytes, sizes.dense_s[1]
        if given is not None and not gradient_bytes:
            return Cut(*given, whole=False), GradientSlices()
        weighed = weighed or weigh(case, exchange)
        if weighed is None:
            part = {"after": 2, "dense": 1}.get(self.policy.gradients, 0)
            parts = tuple(gradient_bytes if i == part else 0 for i in range(3))
            return Cut(*(given or (1, 1)), whole=False), GradientSlices(parts)  # type: ignore[arg-type]
        decided = Decision(
            self.policy,
            weighed.forward,
            weighed.forward.backward(),
            reduce_costs(weighed.cluster),
            gradient_bytes,
            dense_s,
            chunk_bytes=weighed.chunk_bytes,
            degrees=weighed.degrees,
            forced=given,
        )
        element = DTYPE_BYTES[case.dtype]
        in_moe, beside = (int(part) // element * element for part in (decided.moe_bytes, decided.dense_bytes))
        messages = max(1, int(decided.moe_chunks)), max(1, int(decided.dense_chunks)), 1
        slices = GradientSlices((in_moe, beside, gradient_bytes - in_moe - beside), messages)
        return Cut(int(decided.forward), int(decided.backward), whole=False), slices

    def settle(
        self, case: Case, exchange: ExchangeSlot, gradient_bytes: Sequence[int], scope: str
    ) -> tuple[list[int], list[GradientSlices]]:
        weighed = weigh(case, exchange, f"ar.{scope}")
        if weighed is None:
            return [], unweighed_slices(self.policy, gradient_bytes)
        attention = float(attention_macs(case.model.hidden, max(case.routing.tokens), case.model.seq, causal=False))
        alpha, beta = weighed.cluster.linear("gemm")
        found = place(
            self.policy,
            weighed.forward,
            weighed.forward.backward(),
            reduce_costs(weighed.cluster, scope=scope),
            gradient_bytes,
            2 * (ATTENTION_GEMMS * alpha + beta * attention),
            chunk_bytes=weighed.chunk_bytes,
            degrees=weighed.degrees,
            element_bytes=DTYPE_BYTES[case.dtype],
        )
        degrees = found.degree_backward.tolist() if forced(case) is None else []
        return degrees, found.as_slices(DTYPE_BYTES[case.dtype])

    def fixed(self, case: Case, cut: Cut) -> Case:
        degrees = {"degree_forward": cut.forward, "degree_backward": cut.backward}
        return dataclasses.replace(case, options={**case.options, **degrees})


def forced(case: Case) -> tuple[int, int] | None:
    """Degrees that are given and not planned; ``UserError`` if only one is."""
    given = [case.options.get(f"degree_{direction}") for direction in ("forward", "backward")]
    if given == [None, None]:
        return None
    for direction, degree in zip(("forward", "backward"), given, strict=True):
        if degree not in DEGREES:
            remedy = f"must be one of {', '.join(map(str, DEGREES))}; give both directions or none"
            raise bad(f"options.degree_{direction}", degree, remedy)
    return int(given[0]), int(given[1])  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- by whose costs


def weigh(case: Case, exchange: ExchangeSlot, *others: str) -> Weighed | None:
    """By costs that include ``others``; None where some are unknown."""
    if isinstance(exchange, CapacitySlots):
        return weigh_slots(case, exchange, *calibrated(case, (*cost_keys(case, exchange), *others)))
    fares = exchange.fares(case, case.routing, case.placement.hosts, Cut())
    hops = [fares.cost("dispatch", hop, 1) for hop in range(fares.num_hops)]
    cluster = None
    with contextlib.suppress(UserError):  # not measured, or refused
        keys = [_key(hop) for hop in hops if hop is not None]
        cluster, _ = calibrated(case, (*keys, "ar.inter", "gemm", *others))
    if cluster is None:
        return None

    def linear(hop: Any) -> Linear:
        alpha, beta = cluster.linear(_key(hop))
        busiest = max(float(hop.matrix.sum(axis).max()) for axis in (0, 1))
        return Linear(*map(np.asarray, (alpha, beta, busiest)))

    inside = [linear(hop) for hop in hops[1:] if hop is not None]
    rows = (case.placement.hosts.T * expert_counts(case.routing).sum(0)).sum(1).max()
    alpha, beta = cluster.linear("gemm")
    macs = float(rows * expert_macs(case.model))
    experts = Linear(*map(np.asarray, (GEMMS[case.model.ffn_type] * alpha, beta, macs)))
    within = inside[0] if inside else NOTHING
    return Weighed(cluster, LayerCosts(linear(hops[0]), within, within, NOTHING if case.identity_experts else experts))


def weigh_slots(
    case: Case, exchange: CapacitySlots, cluster: Cluster | None, least_bytes: float = 0.0
) -> Weighed | None:
    """``least_bytes``: smallest all-to-all of which the costs say something."""
    if cluster is None:
        return None
    sizes = exchange.sizes(case, planned_capacity(case, case.routing)).forward
    degrees = [r for r in DEGREES if r == 1 or sizes.slot_bytes / r >= least_bytes]
    return Weighed(cluster, layer_costs(sizes, cluster), degrees)


def cost_keys(case: Case, exchange: CapacitySlots) -> tuple[str, ...]:
    """Costs by which a case in slots is planned."""
    return (*exchange.links(case), "ar.inter", *(() if case.stand_in else ("gemm",)))


def calibrated(case: Case, keys: Sequence[str]) -> tuple[Cluster | None, float]:
    """The case's cluster with fitted costs under ``keys``, of its latest calibration, or as stated; and the smallest
    all-to-all (the first of ``keys``) that they hold for. ``UserError`` for a calibration that lacks some."""
    if case.cluster is None:
        return None, 0.0
    found = ledger.told(case.cluster)
    if found is None:
        return stated_costs(case.cluster, keys), 0.0
    fit = found.fit(keys[0])
    return found.cluster(keys), fit.range_bytes[0] if isinstance(fit, Fit) else 0.0


def _key(hop: Any) -> str:
    """Of a hop's costs; on the outermost level and inside it by their roles."""
    scope = {"inter1": "inter", "intra1": "intra"}.get(hop.scope, hop.scope)
    return f"{hop.operation}.{scope}"


#: brought to recipes, by name
SCHEDULES: Mapping[str, Adaptive] = {
    name: Adaptive(policy.overlap, name, policy)
    for name, policy in ((f"fsmoe-{rival}".removesuffix("-fsmoe"), policy) for rival, policy in POLICIES.items())
}
