"""Where the experts of a served model go, and by which routing that is planned."""

from __future__ import annotations

import dataclasses
import functools

from harness.bench.train import training_case
from harness.errors import bad
from harness.placement import Placement
from harness.registry import system as system_called
from harness.routing import Routing, make_routing
from harness.routing.trace import TraceParams, find_trace, from_trace, read_trace
from harness.specs import Experiment
from harness.system import Case, System
from harness.topology import Topology

PROFILE_STEP = 1_000_000  # of a generator: far from all that is served


def profile_of(experiment: Experiment, topology: Topology) -> list[Routing] | None:
    """Routing of every layer to plan by; None where only the model itself can tell. ``UserError`` where all tokens of a
    trace are served."""
    workload, model = experiment.workload, experiment.model
    if workload.generator == "natural":
        return None
    layers = range(model.num_layers)
    if workload.generator != "trace":
        made = [make_routing(workload, model, topology, step=PROFILE_STEP, layer=layer) for layer in layers]
        return [routing for routing in made if routing is not None]
    params = TraceParams.parse(workload.params, f"workload {workload.name}.params")
    recorded = read_trace(find_trace(params.path))
    num_tokens = min(len(row.ids) for row in recorded.rows.values())
    served = sum(workload.tokens(topology.num_ranks))
    if num_tokens <= served:
        remedy = f"the trace's {num_tokens} tokens are all served, none is left to plan by; serve fewer of them"
        raise bad(f"workload {workload.name}.tokens_per_rank", workload.tokens_per_rank, remedy)
    whole = workload.model_copy(update={"tokens_per_rank": (num_tokens, *[0] * (topology.num_ranks - 1))})
    rest = [from_trace(whole, model, topology, layer)[served:] for layer in layers]
    return [Routing(ids, (len(ids), *[0] * (topology.num_ranks - 1)), model.num_experts) for ids in rest]


@functools.lru_cache(maxsize=32)
def placements(experiment: Experiment) -> tuple[Placement, ...]:
    """Of every layer, as the system plans them; index order where it does not, or where only a running model could
    tell it what to plan by."""
    topology = Topology(experiment.cluster.shape)
    chosen = system_called(experiment.system)
    profile = profile_of(experiment, topology) if chosen.places else None
    return planned(experiment, chosen, topology, profile)


def planned(
    experiment: Experiment, chosen: type[System], topology: Topology, profile: list[Routing] | None
) -> tuple[Placement, ...]:
    model = experiment.model
    found = None if profile is None else chosen.place(case_of(experiment, topology, "cpu", 0), profile)
    if found is None:
        found = [Placement.contiguous(model.num_experts, topology.num_ranks)] * model.num_layers
    assert len(found) == model.num_layers
    assert all(each.hosts.shape == (model.num_experts, topology.num_ranks) for each in found)
    return tuple(found)


def case_of(
    experiment: Experiment, topology: Topology, device: str, layer: int, placement: Placement | None = None
) -> Case:
    case = training_case(experiment, topology, device, layer)
    stand_in = experiment.compute == "stand-in"
    return dataclasses.replace(case, stand_in=stand_in, placement=placement or case.placement)


def cases(experiment: Experiment) -> list[Case]:
    """Of every layer."""
    topology = Topology(experiment.cluster.shape)
    return [case_of(experiment, topology, "cpu", layer, at) for layer, at in enumerate(placements(experiment))]
