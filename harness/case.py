"""The Cases of an experiment: its MoE layers, each with the routing of a step and the places of its experts.

Whoever runs, plans or prices an experiment takes them from here. They are arithmetic alone: no rank is asked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from harness.memory import room_bytes
from harness.placement import Placement
from harness.plan.grouped import in_groups
from harness.registry import system as system_called
from harness.routing import Routing, make_routing, planned_routing
from harness.routing.draw import PROFILE_STEP
from harness.routing.outline import Outlined, few_tokens
from harness.specs import SERVING, Experiment
from harness.system import Case, System
from harness.topology import Topology


def cases_of(
    experiment: Experiment,
    step: int = 0,
    layers: Iterable[int] | None = None,
    routings: Sequence[Routing] | None = None,
) -> list[Case]:
    """One Case for each MoE layer that the phase runs (one for ``exchange`` and ``layer``, else one a layer of the
    model); ``layers``: of these only. ``routings``: of all layers, where they are made already.

    ``step``: of a training, or of a replay that is served, whose routing changes with it; others repeat that of step 0.
    Experts lie in index order, in a served model where its system plans them."""
    placed: Sequence[Placement | None] = [None] * num_layers(experiment)
    if experiment.phase in SERVING:
        placed = placements(experiment)
    chosen = range(len(placed)) if layers is None else layers
    return [
        case_of(
            experiment,
            layer=layer,
            step=step,
            placement=placed[layer],
            routing=None if routings is None else routings[layer],
        )
        for layer in chosen
    ]


def outlines_of(experiment: Experiment, step: int = 0, *, whole: bool = False, fewer: bool = False) -> list[Outlined]:
    """The routing of each layer that the phase runs, without tokens until these are asked for. Those of a large step
    are then a sample, unless they are to be ``whole``; ``fewer``: a quarter of it, for what is not priced."""
    model, topology, layers = experiment.model, Topology(experiment.cluster.shape), num_layers(experiment)
    few = None if whole else few_tokens(experiment.workload, model, topology, layers)
    few = max(1, few // 4) if fewer and few is not None else few
    step = step if experiment.goes_on else 0
    return [Outlined(experiment.workload, model, topology, step=step, layer=layer, few=few) for layer in range(layers)]


def num_layers(experiment: Experiment) -> int:
    """MoE layers that the phase runs."""
    return 1 if experiment.phase in ("exchange", "layer") else experiment.model.num_moe_layers


def system_of(experiment: Experiment) -> type[System]:
    """Its system, in each of the expert-parallel groups."""
    found = system_called(experiment.system)
    return found if experiment.groups is None else in_groups(found)


def no_layout(experiment: Experiment) -> str | None:
    """Why nobody runs or prices its layout, as data; None where it is built."""
    if (refused := experiment.layout.refused) or experiment.groups is None:
        return refused
    if experiment.model.gate_noise:
        return "a gate draws its noise by the number of a rank among those that share experts; leave out gate_noise"
    if experiment.phase != "train_step":
        return None
    system = system_called(experiment.system)
    if system.acts_between_steps() and (system.remembers or not system.moves_alike):
        what = "moves experts or copies by what its own expert-parallel group has seen, so that replicas would part"
        return f"{experiment.system} {what}; train it with expert_parallel over all ranks"
    return None


def case_of(
    experiment: Experiment,
    device: str = "cpu",
    *,
    layer: int = 0,
    step: int = 0,
    placement: Placement | None = None,
    routing: Routing | None = None,
) -> Case:
    """The Case of one layer. ``placement``: None stands for experts in index order. A natural routing is planned as a
    uniform one."""
    model, topology = experiment.model, Topology(experiment.cluster.shape)
    step = step if experiment.goes_on else 0
    case = Case(
        model=model,
        dtype=experiment.dtype,
        topology=topology,
        placement=in_order(experiment),
        routing=routing or planned_routing(experiment.workload, model, topology, step=step, layer=layer),
        device=device,
        identity_experts=experiment.phase == "exchange",
        options=dict(experiment.options),
        cluster=experiment.cluster,
        stand_in=experiment.compute == "stand-in",
        groups=experiment.groups,
        exchange_dtype=experiment.exchange_dtype,
    )
    whole_model = experiment.phase not in ("exchange", "layer")
    room = room_bytes(experiment, case) if whole_model else None  # before any expert has moved
    return dataclasses.replace(case, placement=placement or case.placement, room_bytes=room)


# -------------------------------------------------------------------------------- where a served model's experts go


@functools.lru_cache(maxsize=32)
def placements(experiment: Experiment) -> tuple[Placement, ...]:
    """The placement of every layer, as the system plans it; index order where it plans none, or where only a running
    model could tell it what to plan by."""
    profile = profile_of(experiment) if system_of(experiment).places else None
    return placed_by(experiment, profile)


def placed_by(experiment: Experiment, profile: Sequence[Routing] | None) -> tuple[Placement, ...]:
    """The placement of every layer, as the system plans it by ``profile``: the routing of each layer."""
    model, topology = experiment.model, Topology(experiment.cluster.shape)
    found = None
    if profile is not None:
        found = system_of(experiment).place(case_of(experiment), profile)
    if found is None:
        found = [in_order(experiment)] * model.num_moe_layers
    assert len(found) == model.num_moe_layers
    assert all(each.hosts.shape == (model.num_experts, topology.num_ranks) for each in found)
    return tuple(found)


def profile_of(experiment: Experiment) -> list[Routing] | None:
    """The routing of every layer to plan by, of tokens that are not served; None where only the model itself can tell.
    ``UserError`` where all tokens of a trace are served."""
    workload, model, topology = experiment.workload, experiment.model, Topology(experiment.cluster.shape)
    if workload.generator == "natural":
        return None
    layers = range(model.num_moe_layers)
    if workload.generator != "trace":
        made = [make_routing(workload, model, topology, step=PROFILE_STEP, layer=layer) for layer in layers]
        return [routing for routing in made if routing is not None]
    from harness.routing.replay import profile_from_trace  # pyarrow only for traces

    rest = profile_from_trace(workload, model, topology)
    return [Routing(ids, (len(ids), *[0] * (topology.num_ranks - 1)), model.num_experts) for ids in rest]


def in_order(experiment: Experiment) -> Placement:
    """Experts in index order, in every expert-parallel group."""
    if experiment.groups is not None:
        return experiment.groups.contiguous(experiment.model.num_experts)
    return Placement.contiguous(experiment.model.num_experts, experiment.cluster.num_ranks)
