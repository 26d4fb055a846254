"""Steps of one layer under HierMoE and its rivals: each a system with options, and placements that follow the routing
(arXiv 2508.09591, section VI). What they take is the machine's to say (``harness.plan.machine``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from baselines.smartmoe import EVERY, WINDOW, greedy
from harness import registry
from harness.placement import Placement
from harness.plan.cost import InTurn, Staged
from harness.plan.machine import Machine
from harness.plan.priced import PricedNative, PricedOpaque
from harness.routing import make_routing
from harness.routing.types import Routing
from harness.specs import DTYPE_BYTES, Cluster, Dtype, Model, Workload
from harness.system import Case
from harness.topology import Topology
from methods.hiermoe.counts import Array
from methods.hiermoe.model import TimeModel
from methods.hiermoe.swap import Swapping

DTYPE: Dtype = "bfloat16"  # the paper does not state its precision
ELEMENT_BYTES = DTYPE_BYTES[DTYPE]
#: as the paper's formulas have it: all messages of a stage as long as its longest, one stage after another
FORMULAS = {"padded": True, "chunks": 1}


@dataclasses.dataclass(frozen=True)
class Rival:
    """``placement``: of experts, as training goes on."""

    system: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    placement: Literal["contiguous", "swap", "smart"] = "contiguous"


def hierarchical(dimension: int | None = None, **changes: Any) -> Rival:
    """``dimension``: None for d*, by the cluster's costs. ``changes``: of other options."""
    options = {**FORMULAS, **changes} | ({} if dimension is None else {"dimension": dimension})
    return Rival("hiermoe-hd", options)


#: megatron: every copy in one all-to-all of exact sizes; tutel-2dh: every copy, two stages, padded experts
RIVALS: dict[str, Rival] = {
    "megatron": Rival("flat"),
    "tutel-2dh": Rival("tutel-2dh"),
    "hd2": hierarchical(2),
    "hd2-smart": dataclasses.replace(hierarchical(2), placement="smart"),
    "hd": hierarchical(),
    "hiermoe": dataclasses.replace(hierarchical(), placement="swap"),
}
#: the nine of Fig. 13: by dimension without and with deduplication, and d*
NINE = {
    **{f"h{d}": hierarchical(d, deduplicate=False) for d in range(1, 5)},
    **{f"hd{d}": hierarchical(d) for d in range(1, 5)},
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
        sent = self.passage.sent("dispatch")
        assert sent is not None
        stages = sent.stages if isinstance(sent, Staged) else sent.parts if isinstance(sent, InTurn) else (sent,)
        one_way_s = float(np.max(machine.seconds(sent)))
        return {"step": self.step, "variant": self.rival, "one_way_s": one_way_s, "dimension": len(stages)}


class Mover(Protocol):
    def update(self, step: int, routing: Routing, placement: Placement) -> Placement:
        """The placement for the next step."""


@dataclasses.dataclass
class Smart:
    """SmartMoE's placement (``baselines.smartmoe``)."""

    every: int = EVERY
    load: Array | None = None

    def update(self, step: int, routing: Routing, placement: Placement) -> Placement:
        load = np.bincount(routing.ids.ravel(), minlength=routing.num_experts)
        if step % self.every >= self.every - WINDOW:
            self.load = load if self.load is None else self.load + load
        if (step + 1) % self.every or self.load is None:
            return placement
        found, self.load = greedy(self.load, placement), None
        return found


def replay(
    cluster: Cluster,
    model: Model,
    routings: Iterable[Routing],
    rivals: Mapping[str, Rival] | None = None,
    swapping: Swapping | None = None,
) -> Iterator[Played]:
    """Steps of training of one layer, each with the placement that earlier steps led to."""
    wanted = RIVALS if rivals is None else rivals
    movers: dict[str, Mover] = {
        "swap": swapping or Swapping(TimeModel(cluster), model.hidden * ELEMENT_BYTES),
        "smart": Smart(),
    }
    start = Placement.contiguous(model.num_experts, cluster.num_ranks)
    placements = dict.fromkeys((rival.placement for rival in wanted.values()), start)
    for step, routing in enumerate(routings):
        for name, rival in wanted.items():
            yield Played(step, name, passage_of(rival, cluster, model, routing, placements[rival.placement]))
        for kind in placements.keys() & movers.keys():
            placements[kind] = movers[kind].update(step, routing, placements[kind])


def passage_of(
    rival: Rival, cluster: Cluster, model: Model, routing: Routing, placement: Placement
) -> PricedNative | PricedOpaque:
    """The priced layer of ``rival``."""
    case = Case(model, DTYPE, Topology(cluster.shape), placement, routing, options=dict(rival.options), cluster=cluster)
    found = registry.system(rival.system).layout(case)
    assert isinstance(found, PricedNative | PricedOpaque)
    return found


def routings(workload: Workload, model: Model, cluster: Cluster, steps: int) -> Iterator[Routing]:
    """Of successive steps."""
    for step in range(steps):
        routing = make_routing(workload, model, Topology(cluster.shape), step=step)
        assert routing is not None
        yield routing


__all__ = ["NINE", "RIVALS", "Played", "Rival", "Swapping", "hierarchical", "passage_of", "replay", "routings"]
