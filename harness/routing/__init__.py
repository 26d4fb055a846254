"""Where tokens go: generators, recorded traces, certificates."""

from __future__ import annotations

import zlib

import numpy as np

from harness.errors import bad
from harness.routing.certificate import Certificate, certify
from harness.routing.generators import GENERATORS, generate
from harness.routing.groups import within_groups
from harness.routing.types import Routing
from harness.specs import Model, Workload
from harness.topology import Topology

#: every value of ``Workload.generator``
KNOWN_GENERATORS = (*GENERATORS, "trace", "natural")


def make_routing(
    workload: Workload, model: Model, topology: Topology, *, step: int = 0, layer: int = 0
) -> Routing | None:
    """The routing of one layer at one step, the same on whatever machine it is made.

    None for the generator ``natural``: the router's own choice, which only a model that runs can make (phase
    ``train_step``). For ``trace``: layer ``params.layer + layer`` at recorded step ``params.step`` (by default the
    last), whatever ``step`` is, and the first tokens of the trace in order, rank after rank. A model whose gate limits
    a token's expert groups gets the nearest routing within them.

    Errors (``UserError``): a gate that takes no prescribed routing (``Model.takes_routing``), unknown generator,
    unknown or impossible params, a trace that does not fit.
    """
    if workload.generator == "natural":
        if other := set(workload.params) - {"weights"}:
            remedy = "natural routing has no params but weights, the file of a trained model to serve"
            raise bad(f"workload {workload.name} (natural).params", sorted(other)[0], remedy)
        return None
    if not model.takes_routing:
        field, remedy = "gate", "takes no prescribed routing; use a natural workload"
        if model.gate == "xmoe":
            field, remedy = "gate_dim", f"must be at least num_experts = {model.num_experts} to prescribe a routing"
        elif model.gate_noise:
            field = "gate_noise"
        raise bad(f"model {model.name}.{field}", getattr(model, field), remedy)
    if workload.generator == "trace":
        from harness.routing.trace import from_trace  # pyarrow only where a trace is read

        ids = from_trace(workload, model, topology, layer)
    elif workload.generator in GENERATORS:
        ids = generate(workload, model, topology, step, layer)
    else:
        known = ", ".join(KNOWN_GENERATORS)
        raise bad(f"workload {workload.name}.generator", workload.generator, f"unknown; known generators are {known}")
    rng = np.random.default_rng([zlib.crc32(b"groups"), workload.seed, step, layer])
    ids = within_groups(ids, model, rng)
    return Routing(ids, workload.tokens(topology.num_ranks), model.num_experts)


def planned_routing(workload: Workload, model: Model, topology: Topology, *, step: int = 0, layer: int = 0) -> Routing:
    """What a case is planned with: ``make_routing``'s, or a uniform one in the place of a natural one."""
    routing = make_routing(workload, model, topology, step=step, layer=layer)
    if routing is not None:
        return routing
    uniform = workload.model_copy(update={"generator": "uniform", "params": {}})
    ids = within_groups(generate(uniform, model, topology, step, layer), model, np.random.default_rng(workload.seed))
    return Routing(ids, workload.tokens(topology.num_ranks), model.num_experts)


__all__ = ["KNOWN_GENERATORS", "Certificate", "Routing", "certify", "make_routing", "planned_routing"]
