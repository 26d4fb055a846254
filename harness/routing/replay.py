"""The workload ``trace``: which tokens of a trace the ranks of an experiment have, at which of its steps.

A trace stands still unless it is replayed: then step i of an experiment has the (i // hold)-th recorded step from the
stated one on. An experiment's first steps are its warm-up, so that whoever plans or places has seen the past alone.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from harness.errors import bad
from harness.routing.recorded import Recorded
from harness.routing.trace import Trace, find_trace, read_trace
from harness.specs import Count, Experiment, Model, Spec, Workload
from harness.topology import Topology


class TraceParams(Spec):
    """``path`` of the trace, the ``layer`` that layer 0 of the model takes, the recorded ``step`` (None: the last, or
    the first of a replay). ``replay``: go on from there, step by step, each for ``hold`` steps of the experiment."""

    path: str
    layer: Annotated[int, Field(ge=0)] = 0
    step: Annotated[int, Field(ge=0)] | None = None
    replay: bool = False
    hold: Count = 1


def from_trace(workload: Workload, model: Model, topology: Topology, layer: int, step: int = 0) -> np.ndarray:
    """ids int32 [T, k]: each rank's first tokens, rank after rank, with the best k experts of each.

    A trace that tells as many ranks' tokens as there are gives each rank its own; of any other the tokens are shared
    out in order. ``step``: of the experiment; the same at each of them unless the trace is replayed.

    Errors: a trace of another number of experts, with a smaller k, fewer tokens or steps, or without that layer or
    step.
    """
    _, trace, row = _found(workload, model, layer, step)
    return row.ids[_own(workload, topology, trace, row), : model.top_k].astype(np.int32)


def counts_from_trace(
    workload: Workload, model: Model, topology: Topology, layer: int, step: int = 0
) -> np.ndarray | None:
    """The same as counts, int64 [W, E], where the ranks take all tokens of theirs, so that none needs to be drawn."""
    _, trace, key = _located(workload, model, layer, step)
    ranks, wanted = trace.ranks(*key), workload.tokens(topology.num_ranks)
    if trace.header.top_k != model.top_k or ranks != wanted:
        return None
    return trace.counts(*key)


def profile_from_trace(workload: Workload, model: Model, topology: Topology) -> list[np.ndarray]:
    """Tokens to plan by, of each layer, int32 [T, k], which are not served: of a replay all of the recorded step ahead
    of the first; else, or where there is none, the rest of the tokens. ``UserError`` where no rest is left."""
    params, trace, (step, _) = _located(workload, model, 0, 0)
    earlier = trace.steps[: trace.steps.index(step)] if params.replay else []
    if earlier:
        rows = [trace[earlier[-1], params.layer + layer] for layer in range(model.num_moe_layers)]
        return [row.ids[:, : model.top_k].astype(np.int32) for row in rows]
    num_tokens = min(trace.num_tokens(*key) for key in trace)
    found = []
    for layer in range(model.num_moe_layers):
        _, _, row = _found(workload, model, layer, 0)
        served = _own(workload, topology, trace, row)
        rest = np.setdiff1d(np.arange(num_tokens), served)
        if not len(rest):
            remedy = f"the trace's {num_tokens} tokens are all served, none is left to plan by; serve fewer of them"
            remedy += ", or begin at a later step" if params.replay else ""
            raise bad(f"workload {workload.name}.tokens_per_rank", workload.tokens_per_rank, remedy)
        found.append(row.ids[rest, : model.top_k].astype(np.int32))
    return found


def check_replay(experiment: Experiment, num_steps: int, words: str) -> None:
    """``UserError`` if a replay is over before ``num_steps`` (``words`` say what they are of), or has too few tokens in
    one of them. Nothing of what stands still."""
    workload, model = experiment.workload, experiment.model
    if workload.generator != "trace" or not workload.params.get("replay") or not experiment.goes_on:
        return
    params, trace, (first, _) = _located(workload, model, 0, 0)
    following = trace.steps[trace.steps.index(first) :]
    if len(following) * params.hold < num_steps:
        remedy = f"the replay of {trace.path.name} lasts {len(following) * params.hold} steps from there, {num_steps} "
        remedy += f"are wanted ({words}); begin earlier, hold each for {-(-num_steps // len(following))}, or want fewer"
        raise bad(f"workload {workload.name} (trace).params.step", first, remedy)
    for step in range(0, num_steps, params.hold):
        for layer in range(model.num_moe_layers):
            _, _, key = _located(workload, model, layer, step)
            _check_tokens(workload, Topology(experiment.cluster.shape), trace, key)


# ------------------------------------------------------------------------------------------------------------- a row


def _located(workload: Workload, model: Model, layer: int, step: int) -> tuple[TraceParams, Trace, tuple[int, int]]:
    """Recorded step and layer."""
    where = f"workload {workload.name} (trace)"
    params = TraceParams.parse(workload.params, f"{where}.params")
    trace = read_trace(find_trace(params.path))
    header, steps, name = trace.header, trace.steps, trace.path.name
    if not steps:
        raise bad(f"{where}.params.path", params.path, "the trace is empty; record it again")
    if header.num_experts != model.num_experts:
        remedy = f"the trace {name} has {header.num_experts} experts; use a model or a trace with as many"
        raise bad("model.num_experts", model.num_experts, remedy)
    if header.top_k < model.top_k:
        raise bad("model.top_k", model.top_k, f"the trace {name} has only k = {header.top_k} experts per token")
    if params.hold > 1 and not params.replay:
        raise bad(f"{where}.params.hold", params.hold, "is for a replay; give replay: true")
    wanted_layer = params.layer + layer
    if wanted_layer not in trace.layers:
        raise bad(f"{where}.params.layer", wanted_layer, f"the trace {name} has layers {_listed(trace.layers)}")
    if params.step is not None and params.step not in steps:
        raise bad(f"{where}.params.step", params.step, f"the trace {name} has steps {_listed(steps)}")
    if params.replay:
        at = (0 if params.step is None else steps.index(params.step)) + step // params.hold
        if at >= len(steps):
            lasts = (len(steps) - at) * params.hold + step
            remedy = f"the replay of {name} is over at step {step} of the experiment, after {lasts}; begin earlier"
            raise bad(f"{where}.params.step", params.step, f"{remedy}, or hold each step for longer")
        recorded_step = steps[at]
    else:
        recorded_step = steps[-1] if params.step is None else params.step
    if (recorded_step, wanted_layer) not in trace:
        raise bad(f"{where}.params.layer", wanted_layer, f"the trace {name} lacks it at step {recorded_step}")
    return params, trace, (recorded_step, wanted_layer)


def _found(workload: Workload, model: Model, layer: int, step: int) -> tuple[TraceParams, Trace, Recorded]:
    params, trace, key = _located(workload, model, layer, step)
    return params, trace, trace[key]


def _own(workload: Workload, topology: Topology, trace: Trace, row: Recorded) -> np.ndarray:
    """Which tokens of ``row`` the ranks have, rank after rank."""
    wanted = _check_tokens(workload, topology, trace, (row.step, row.layer))
    if row.ranks is None or len(row.ranks) != topology.num_ranks:
        return np.arange(sum(wanted))
    first = np.cumsum(row.ranks) - row.ranks
    return np.concatenate([start + np.arange(num) for start, num in zip(first, wanted, strict=True)])


def _check_tokens(workload: Workload, topology: Topology, trace: Trace, key: tuple[int, int]) -> tuple[int, ...]:
    """Tokens that each rank takes; ``UserError`` where the trace has fewer."""
    wanted, name, ranks = workload.tokens(topology.num_ranks), trace.path.name, trace.ranks(*key)
    where = f"workload {workload.name}.tokens_per_rank"
    more = "or import more" if trace.header.source else "or record more (moebench record --tokens)"
    if ranks is not None and len(ranks) == topology.num_ranks:
        for rank, (num, has) in enumerate(zip(wanted, ranks, strict=True)):
            if num > has:
                remedy = f"{num} tokens on rank {rank}, but the trace {name} has {has} of it at step {key[0]}"
                raise bad(where, workload.tokens_per_rank, f"{remedy}; give a rank {min(ranks)} at most, {more}")
    elif sum(wanted) > (has := trace.num_tokens(*key)):
        remedy = f"{sum(wanted)} tokens on {topology.num_ranks} ranks, but the trace {name} has {has}"
        most = has // topology.num_ranks
        raise bad(where, workload.tokens_per_rank, f"{remedy}; give a rank {most} at most, {more}")
    return wanted


def _listed(numbers: list[int]) -> str:
    """All, or the first and the last of many."""
    if len(numbers) <= 20:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:5]))} ... {numbers[-1]}, {len(numbers)} of them"
