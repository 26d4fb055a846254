"""Steps of one layer under HierMoE and its rivals: each a system with options, and placements that follow the routing
(arXiv 2508.09591, section VI). What they take is the machine's to say (``harness.plan.machine``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from harness import registry
from harness.layer.work import model_attention_macs
from harness.placement import Placement
from harness.plan.cost import Compute, InTurn
from harness.plan.course import Course
from harness.plan.graph import COMPUTE, Plan, Work
from harness.plan.machine import Machine
from harness.plan.passage import Dense, backward_layer, forward_layer
from harness.plan.priced import PricedNative, PricedOpaque
from harness.plan.simulate import simulate
from harness.routing import make_routing
from harness.routing.types import Routing
from harness.specs import DTYPE_BYTES, Cluster, Dtype, Model, Workload
from harness.system import Case
from harness.topology import Topology
from methods.hiermoe.planner import PlannerModel
from methods.hiermoe.swap import Swapping

DTYPE: Dtype = "bfloat16"  # the paper does not state its precision
ELEMENT_BYTES = DTYPE_BYTES[DTYPE]
#: as the paper's formulas have it: all messages of a stage as long as its longest, one stage after another
FORMULAS = {"padded": True, "chunks": 1}


@dataclasses.dataclass(frozen=True)
class Rival:
    """``swaps``: by the study's own rule, in place of what the system does between steps."""

    system: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    swaps: bool = False

    def case(self, cluster: Cluster, model: Model, routing: Routing, placement: Placement) -> Case:
        options = dict(self.options)
        model = model.model_copy(update={"num_shared_experts": 0})  # as ``studies.left_out`` says
        return Case(model, DTYPE, Topology(cluster.shape), placement, routing, options=options, cluster=cluster)

    def passage(self, case: Case) -> PricedNative | PricedOpaque:
        """The priced layer."""
        found = registry.system(self.system).layout(case)
        assert isinstance(found, PricedNative | PricedOpaque)
        return found


#: megatron: every copy in one all-to-all of exact sizes; tutel-2dh: every copy, two stages, padded experts
RIVALS: dict[str, Rival] = {
    "megatron": Rival("flat"),
    "tutel-2dh": Rival("tutel-2dh"),
    "hd2": Rival("hiermoe-hd2", FORMULAS),
    "hd2-smart": Rival("hiermoe-hd2-smart", FORMULAS),
    "hd": Rival("hiermoe-hd", FORMULAS),
    "hiermoe": Rival("hiermoe", FORMULAS, swaps=True),
}
#: the nine of Fig. 13: by dimension without and with deduplication, and d*
NINE = {
    **{f"h{d}": Rival("hiermoe-hd", {**FORMULAS, "dimension": d, "deduplicate": False}) for d in range(1, 5)},
    **{f"hd{d}": Rival("hiermoe-hd", {**FORMULAS, "dimension": d}) for d in range(1, 5)},
    "hd": RIVALS["hd"],
}


@dataclasses.dataclass(frozen=True, eq=False)
class Played:
    """One step of one rival."""

    step: int
    rival: str
    passage: PricedNative | PricedOpaque

    def row(self, machine: Machine) -> dict[str, object]:
        """one_way_s: of a dispatch; dimension: stages that it takes."""
        if isinstance(self.passage, PricedNative):
            hops = (self.passage.fares.cost("dispatch", hop, 1) for hop in range(self.passage.num_hops))
            stages = tuple(hop for hop in hops if hop is not None)
        else:
            sent = self.passage.sent("dispatch")
            assert sent is not None
            stages = sent.parts if isinstance(sent, InTurn) else (sent,)
        one_way_s = float(np.max(machine.seconds(InTurn(stages))))
        return {"step": self.step, "variant": self.rival, "one_way_s": one_way_s, "dimension": len(stages)}

    def layer_s(self, machine: Machine) -> float:
        """Of forward and backward of the layer, attention included."""
        case = self.passage.case
        model, tokens = case.model, np.asarray(case.routing.tokens, dtype=np.float64)
        macs = model_attention_macs(model, tokens, causal=True)
        once, twice = ([Dense("attention", COMPUTE, Work(Compute(times * np.asarray(macs))))] for times in (1, 2))
        plan = Plan(price=machine.priced)
        last = forward_layer(plan, self.passage.forward, once)
        backward_layer(plan, self.passage.backward, twice, after=last)
        return float(simulate(plan, machine, case.topology).total_s.max())


def computing(cluster: Cluster, efficiency: float) -> Machine:
    """Links by the costs of ``cluster``, computation at ``efficiency`` of its device's peak."""
    device = Machine.data_sheet(cluster, efficiency).device
    return dataclasses.replace(Machine.published(cluster), device=device)


def replay(
    cluster: Cluster,
    model: Model,
    routings: Iterable[Routing],
    rivals: Mapping[str, Rival] | None = None,
    swapping: Swapping | None = None,
) -> Iterator[Played]:
    """Steps of training of one layer, each with the placement that earlier steps led to."""
    wanted = RIVALS if rivals is None else rivals
    start = Placement.contiguous(model.num_experts, cluster.num_ranks)
    swapping = swapping or Swapping(PlannerModel(cluster), model.hidden * ELEMENT_BYTES)
    swapped = start
    courses: dict[str, Course] = {}
    for step, routing in enumerate(routings):
        for name, rival in wanted.items():
            case = rival.case(cluster, model, routing, swapped if rival.swaps else start)
            if not rival.swaps:
                course = courses.setdefault(name, registry.system(rival.system).course([case]))
                (case,) = course.cases([case])
                course.saw(step, [routing])
            yield Played(step, name, rival.passage(case))
        if any(rival.swaps for rival in wanted.values()):
            swapped = swapping.update(step, routing, swapped)


def routings(workload: Workload, model: Model, cluster: Cluster, steps: int) -> Iterator[Routing]:
    """Of successive steps."""
    for step in range(steps):
        routing = make_routing(workload, model, Topology(cluster.shape), step=step)
        assert routing is not None
        yield routing


__all__ = ["NINE", "RIVALS", "Played", "Rival", "Swapping", "computing", "replay", "routings"]
