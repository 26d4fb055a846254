"""HierMoE's variants and rivals as ways of one all-to-all, simulated for any routing (arXiv 2508.09591, section VI)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from baselines.smartmoe import EVERY, WINDOW, greedy
from harness.placement import Placement
from harness.routing import make_routing
from harness.routing.types import Routing
from harness.specs import Cluster, Model, Workload
from harness.topology import Topology
from methods.hiermoe.counts import Array, Counts, count, stages
from methods.hiermoe.model import TimeModel, choose
from methods.hiermoe.swap import GAMMA, MaxFunction, Objective, Swap, best_swap, collect, groups

ELEMENT_BYTES = 2  # bfloat16; the paper does not state its precision


@dataclasses.dataclass(frozen=True)
class Variant:
    """``dimension``: None for d*. ``placement``: of experts, as training goes on. ``sizes``: of messages: ``stage``,
    all of a stage as long as its longest (the paper's formulas); ``exact``; or ``expert``, every expert's tokens padded
    to the fullest expert of any rank, as Tutel and DeepSpeed do without drops."""

    title: str
    dimension: int | None = None
    deduplicate: bool = True
    placement: str = "contiguous"  # or swap, smart
    sizes: str = "stage"


VARIANTS: dict[str, Variant] = {
    "megatron": Variant("Megatron: every copy, one all-to-all, exact sizes", 1, deduplicate=False, sizes="exact"),
    "tutel-2dh": Variant("Tutel-2DH: every copy, two stages, padded experts", 2, deduplicate=False, sizes="expert"),
    "hd2": Variant("HD2-MoE", 2),
    "hd2-smart": Variant("HD2-MoE with SmartMoE's placement", 2, placement="smart"),
    "hd": Variant("HD-MoE: d* of each routing"),
    "hiermoe": Variant("HierMoE: d* and expert swap", placement="swap"),
}
#: the nine of Fig. 13: by dimension without and with deduplication, and d*
NINE = {
    **{f"h{d}": Variant(f"H{d}: every copy, {d} dimensions", d, deduplicate=False) for d in range(1, 5)},
    **{f"hd{d}": Variant(f"HD{d}", d) for d in range(1, 5)},
    "hd": VARIANTS["hd"],
}


def times_s(variant: Variant, model: TimeModel, counts: Counts, row_bytes: float, fullest: int = 0) -> Array:
    """Seconds of a dispatch (or a combine) of every dimension, float64 [D]. ``fullest``: tokens of one rank for its
    fullest expert, times all experts; for sizes ``expert``."""
    if variant.sizes != "expert":
        return model.times(counts, row_bytes, deduplicated=variant.deduplicate, exact=variant.sizes == "exact")
    found = []
    for dimension in range(1, model.num_levels + 1):
        costs = [model.cost(stage) for stage in stages(dimension, model.num_levels)]
        found.append(sum(cost.alpha_s + cost.beta_s_per_byte * fullest * row_bytes for cost in costs))
    return np.array(found)


@dataclasses.dataclass
class Swapping:
    """An update every ``every`` steps, from the routing of the step before, of ``pairs`` swaps."""

    model: TimeModel
    row_bytes: float
    every: int = 1
    pairs: int = 1
    function: MaxFunction = "smooth"
    gamma: float = GAMMA

    def best(self, routing: Routing, placement: Placement) -> Swap:
        topology = Topology(self.model.cluster.shape)
        times = self.model.times(count(routing, placement.owner, topology), self.row_bytes)
        objective = Objective.of(self.model, choose(times), self.row_bytes, self.function, self.gamma)
        group = groups(placement.owner, topology, objective.levels)
        return best_swap(collect(routing.ids, group, topology.num_ranks), group, objective, topology.num_ranks)

    def update(self, step: int, routing: Routing, placement: Placement) -> Placement:
        """The placement for the next step."""
        if (step + 1) % self.every:
            return placement
        for _ in range(self.pairs):
            swap = self.best(routing, placement)
            if swap.r < 0:
                break
            placement = placement.swapped([(swap.r, swap.c)])
        return placement


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
    variants: dict[str, Variant] | None = None,
    swapping: Swapping | None = None,
) -> Iterator[dict[str, object]]:
    """Steps of training of one layer: rows of step, variant, one_way_s and d, each with the placement that earlier
    steps led to."""
    time_model, topology = TimeModel(cluster), Topology(cluster.shape)
    row_bytes = model.hidden * ELEMENT_BYTES
    start = Placement.contiguous(model.num_experts, cluster.num_ranks)
    movers = {
        "contiguous": None,
        "swap": swapping or Swapping(time_model, row_bytes),
        "smart": Smart(),
    }
    wanted = variants or VARIANTS
    used = {variant.placement for variant in wanted.values()}
    placements = dict.fromkeys(used, start)
    for step, routing in enumerate(routings):
        counts = {kind: count(routing, placement.owner, topology) for kind, placement in placements.items()}
        per_rank = np.stack(
            [np.bincount(routing.of_rank(r).ravel(), minlength=model.num_experts) for r in range(len(routing.tokens))]
        )
        fullest = int(per_rank.max(initial=0)) * model.num_experts
        known: dict[tuple[str, bool, str], Array] = {}
        for name, variant in wanted.items():
            key = (variant.placement, variant.deduplicate, variant.sizes)
            if key not in known:
                known[key] = times_s(variant, time_model, counts[variant.placement], row_bytes, fullest)
            dimension = variant.dimension or choose(known[key])
            yield {
                "step": step,
                "variant": name,
                "one_way_s": float(known[key][dimension - 1]),
                "dimension": dimension,
            }
        for kind in used - {"contiguous"}:
            mover = movers[kind]
            assert mover is not None
            placements[kind] = mover.update(step, routing, placements[kind])


def routings(workload: Workload, model: Model, cluster: Cluster, steps: int) -> Iterator[Routing]:
    """Of successive steps."""
    for step in range(steps):
        routing = make_routing(workload, model, Topology(cluster.shape), step=step)
        assert routing is not None
        yield routing
