"""FSMoE's schedule for any exchange (arXiv 2501.10714, sections 3 to 5): chunks of both directions, their hops on both
links at once beside the experts, gradients of attentions in flight.

The planner is the paper's: a single all-to-all is the exchange's outermost hop, all-gather and reduce-scatter are the
hops inside the node, of the busiest rank's bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from harness.comm.journey import Cut
from harness.layer.work import ATTENTION_GEMMS, attention_macs, expert_macs
from harness.plan.schedule import Chunks
from harness.plan.slots import ExchangeSlot, Options, ScheduleSlot
from harness.routing.certificate import expert_counts
from harness.specs import DTYPE_BYTES, GEMMS, Cluster
from harness.system import Case, GradientSlices
from methods.fsmoe.costs import NOTHING, LayerCosts, Linear, reduce_costs
from methods.fsmoe.cut import LINA_CHUNK_SHARE, costs_of, forced
from methods.fsmoe.place import place, unweighed_slices
from methods.fsmoe.step import POLICIES, Decision, Policy


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
        if (degrees := forced(case)) is not None:
            return Cut(*degrees, whole=False)
        costs = self._costs(case, exchange)
        if costs is None:  # nothing can be weighed
            return Cut(whole=False)
        cluster, forward = costs
        decided = Decision(self.policy, forward, forward.backward(), reduce_costs(cluster), 0.0, 0.0)
        return Cut(int(decided.forward), int(decided.backward), whole=False)

    def settle(
        self, cases: Sequence[Case], exchange: ExchangeSlot, gradient_bytes: Sequence[int], scope: str
    ) -> tuple[list[Cut], list[GradientSlices]]:
        case, cuts = cases[0], [self.cut(each, exchange) for each in cases]
        costs = self._costs(case, exchange, f"ar.{scope}")
        if costs is None:
            return cuts, unweighed_slices(self.policy, gradient_bytes)
        cluster, forward = costs
        attention = float(attention_macs(case.model.hidden, max(case.routing.tokens), case.model.seq, causal=False))
        alpha, beta = cluster.linear("gemm")
        found = place(
            self.policy,
            forward,
            forward.backward(),
            reduce_costs(cluster, scope=scope),
            gradient_bytes,
            2 * (ATTENTION_GEMMS * alpha + beta * attention),
            chunk_bytes=LINA_CHUNK_SHARE * float(forward.a2a.n),
            element_bytes=DTYPE_BYTES[case.dtype],
        )
        if forced(case) is None:
            degrees = found.degree_backward.tolist()[::-1]  # planned from the last layer on
            cuts = [cut._replace(backward=int(degree)) for cut, degree in zip(cuts, degrees, strict=True)]
        return cuts, found.as_slices(DTYPE_BYTES[case.dtype])

    def fixed(self, case: Case, cut: Cut) -> Case:
        degrees = {"degree_forward": cut.forward, "degree_backward": cut.backward}
        return dataclasses.replace(case, options={**case.options, **degrees})

    def _costs(self, case: Case, exchange: ExchangeSlot, *others: str) -> tuple[Cluster, LayerCosts] | None:
        """The cluster with the costs that planning needs, and what one forward takes; None where some are unknown."""
        fares = exchange.fares(case, case.routing, case.placement.hosts, Cut())
        hops = [fares.cost("dispatch", hop, 1) for hop in range(fares.num_hops)]
        keys = [_key(hop) for hop in hops if hop is not None]
        known = costs_of(case, (*keys, "ar.inter", "gemm", *others))
        if known is None:
            return None

        def linear(hop: Any) -> Linear:
            alpha, beta = known.linear(_key(hop))
            busiest = max(float(hop.matrix.sum(axis).max()) for axis in (0, 1))
            return Linear(*map(np.asarray, (alpha, beta, busiest)))

        inside = [linear(hop) for hop in hops[1:] if hop is not None]
        rows = (case.placement.hosts.T * expert_counts(case.routing).sum(0)).sum(1).max()
        alpha, beta = known.linear("gemm")
        macs = float(rows * expert_macs(case.model))
        experts = Linear(*map(np.asarray, (GEMMS[case.model.ffn_type] * alpha, beta, macs)))
        within = inside[0] if inside else NOTHING
        return known, LayerCosts(linear(hops[0]), within, within, NOTHING if case.identity_experts else experts)


def _key(hop: Any) -> str:
    """Of a hop's costs; on the outermost level and inside it by their roles."""
    scope = {"inter1": "inter", "intra1": "intra"}.get(hop.scope, hop.scope)
    return f"{hop.operation}.{scope}"


#: brought to recipes, by name
SCHEDULES: Mapping[str, Adaptive] = {
    ("fsmoe" if name == "fsmoe" else f"fsmoe-{name}"): Adaptive(
        policy.overlap, "fsmoe" if name == "fsmoe" else f"fsmoe-{name}", policy
    )
    for name, policy in POLICIES.items()
}

__all__ = ["SCHEDULES", "Adaptive"]
