"""What stands before a server is raced: a small GPT served in float64, whose logits must be the dense oracle's."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.bench import training_check
from harness.bench.serve import Server, agreed, serving_gpt, stored_arrays, text
from harness.bench.steered import OracleLayer, Steered
from harness.bench.wording import allowed
from harness.case import case_of, placements, system_of
from harness.comm.job import Job
from harness.groups import Groups
from harness.layer.weights import Weights
from harness.placement import Placement
from harness.routing import Routing, make_routing
from harness.specs import Experiment
from harness.system import System
from harness.topology import Topology


def gate_case(job: Job, system: type[System], experiment: Experiment, found: dict[str, Any]) -> dict[str, Any]:
    """Collective: a small GPT served in float64, with a random placement of unequal numbers of experts where the system
    follows one; the logits must be those of the dense oracle in one process. ``found`` is ``conformance.gate_case``'s
    row; returns it with ``logits`` added. The tolerance is a layer's, once for each."""
    small = reduced(experiment)
    refused = system.refuse(case_of(small, str(job.device)))
    if refused is not None:  # of the reduced case: the layer's own check must do
        return found
    placed = unequal(small) if system.places else placements(small)
    server = Server(job, system, small, placed)
    own = server.logits().double().cpu()
    expected = agreed(job, lambda: oracle_logits(small, job.topology))
    counts = [
        len(text(small, [rank])) * (small.model.seq if small.phase == "prefill" else 1) for rank in range(job.num_ranks)
    ]
    wanted = expected.split(counts)[job.rank]
    error = float((own - wanted).abs().max() / expected.abs().max()) if len(own) else 0.0
    worst = torch.tensor([error], dtype=torch.float64).nan_to_num(nan=torch.inf).to(job.device)
    if job.num_ranks > 1:
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    row = {**found, "errors": {**found["errors"], "logits": float(worst)}}
    tolerance = allowed(system, "float64") * small.model.num_moe_layers
    if float(worst) > tolerance:
        row["status"] = "nonconforming"
        row["reason"] = f"logits in float64 off by {float(worst):.1e} of the oracle's, allowed {tolerance:.0e}"
    return row


def reduced(experiment: Experiment) -> Experiment:
    """The same in float64, of rows that travel as they are, and small enough for the oracle."""
    small = training_check.reduced(experiment)
    natural = experiment.phase == "decode" or experiment.workload.generator == "natural"
    update: dict[str, Any] = {"tokens_per_rank": 4 if experiment.phase == "decode" else 16, "params": {}}
    update["generator"] = "natural" if natural else "uniform"
    options = {key: value for key, value in experiment.options.items() if key != "placement"}
    workload = small.workload.model_copy(update=update)
    if experiment.model_parallel:
        num_heads = max(small.model.num_heads, math.prod(experiment.cluster.shape[1:]))
        small = small.model_copy(update={"model": small.model.model_copy(update={"num_heads": num_heads})})
    exact = {"dtype": "float64", "exchange_dtype": None, "compute": "real", "options": options}
    return small.model_copy(update={"workload": workload, **exact})


def unequal(experiment: Experiment) -> tuple[Placement, ...]:
    """Random placements, alike in all expert-parallel groups: an expert on every rank, the others anywhere."""
    rng, num_experts = np.random.default_rng(3), experiment.model.num_experts
    topology, found = Topology(experiment.cluster.shape), []
    groups = experiment.groups or Groups(topology, topology.shape)
    num_ranks = groups.size
    for _ in range(experiment.model.num_moe_layers):
        owner = np.concatenate([np.arange(num_ranks), rng.integers(0, num_ranks, num_experts - num_ranks)])
        owner = rng.permutation(owner)
        slots = [rng.permutation(np.flatnonzero(owner == rank)) for rank in range(num_ranks)]
        found.append(groups.placed([Placement.of_slots(slots)] * len(groups)))
    return tuple(found)


@torch.no_grad()
def oracle_logits(experiment: Experiment, topology: Topology) -> torch.Tensor:
    """Of the new tokens of all ranks, [T, vocab]: one process, dense experts, float64, no cache."""
    chosen, ranks = system_of(experiment), list(range(topology.num_ranks))
    sequences = text(experiment, ranks)
    tokens = tuple(len(text(experiment, [rank])) * experiment.model.seq for rank in ranks)

    def moe(layer: int, weights: Weights) -> OracleLayer:
        case = case_of(experiment, layer=layer)
        every = Routing(np.zeros((sum(tokens), experiment.model.top_k), np.int32), tokens, experiment.model.num_experts)
        return OracleLayer(weights, chosen, dataclasses.replace(case, routing=every))

    gpt = serving_gpt(experiment, moe, torch.float64, arrays=stored_arrays(experiment))
    if experiment.workload.generator != "natural":
        for layer, steered in enumerate(m for m in gpt.modules() if isinstance(m, Steered)):
            routing = make_routing(experiment.workload, experiment.model, topology, layer=layer)
            assert routing is not None
            steered.ids = torch.as_tensor(routing.ids.astype(np.int64))
    logits = gpt(sequences)
    return (logits if experiment.phase == "prefill" else logits[:, -1:]).flatten(0, 1)


__all__ = ["gate_case", "oracle_logits", "reduced", "unequal"]
