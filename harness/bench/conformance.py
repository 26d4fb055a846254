"""Truth before speed: every system against the dense float64 oracle, on the cases that break MoE code.

Runs on all ranks of a session. Errors are relative to the largest entry of the oracle's tensor (max norm), and the
worst rank counts. A system's ``tolerance`` is what its own arithmetic allows; it is stated beside every error.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness import registry
from harness.bench.trials import BASE, CHUNKED_TRIALS, SHARED_TRIALS, TRAINING, TRIALS, VARIANT_TRIALS
from harness.bench.wording import Worst, allowed, reason, worst, worst_of
from harness.case import no_layout, system_of
from harness.comm.agree import attempt, failed, first_said, of_all, status_of
from harness.comm.job import Job
from harness.dtypes import TORCH_DTYPE, UNROUNDED, roughest
from harness.layer.gates import steer
from harness.layer.oracle import Oracle
from harness.layer.weights import Weights
from harness.layout import Layout
from harness.placement import Placement
from harness.plan.slots import OVERLAP
from harness.routing import planned_routing
from harness.routing.types import Routing
from harness.specs import EXPERTS_CHOOSE, Cluster, Dtype, ExchangeDtype, Experiment, Model, Workload, with_levels
from harness.system import Case, System

WHOLE = Layout()


def check(job: Job, payload: dict[str, Any]) -> list[dict[str, Any]]:
    """Collective. ``payload``: ``systems`` (names), optionally ``trials``, ``dtypes``, ``exchange_dtype``, ``layout``
    -> one row per system x trial x dtype: system, trial, dtype, ranks, status (ok, nonconforming, refused,
    failed, oom), errors, tolerance, reason. Each is told as ``progress`` when it is there."""
    rows: list[dict[str, Any]] = []
    layout = Layout.parse(payload.get("layout") or {}, "layout").on(job.topology)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if job.rank == 0:
            job.progress({"did": "check", "row": row})

    sent, exact = payload.get("exchange_dtype"), exact_dtype(payload.get("exchange_dtype"))
    for name in payload["systems"]:
        for trial in payload.get("trials") or TRIALS:
            for dtype in payload.get("dtypes") or TRIALS[trial].dtypes:
                job.phase(f"check {name} {trial} {dtype}")
                found = check_one(job, name, trial, dtype, layout=layout, exchange_dtype=sent)
                keep({"system": name, "trial": trial, "dtype": dtype, **found})
        system = registry.system(name)
        several = {"several chunks": (system.chunked, CHUNKED_TRIALS)} if system.chunked else {}
        if OVERLAP in system.options:
            several["shared beside the exchange"] = {OVERLAP: True}, SHARED_TRIALS
        variants = {variant: (options, (*VARIANT_TRIALS, TRAINING)) for variant, options in system.variants.items()}
        for variant, (options, trials) in (several | variants).items():
            for trial in trials:
                if trial in (payload.get("trials") or [trial]) and exact in (payload.get("dtypes") or [exact]):
                    job.phase(f"check {name} {trial}, {variant}")
                    found = (
                        check_training(job, name, options, layout=layout, exchange_dtype=sent)
                        if trial == TRAINING
                        else check_one(job, name, trial, exact, options, layout, sent)
                    )
                    keep({"system": name, "trial": f"{trial}, {variant}", "dtype": exact, **found})
    return rows


def exact_dtype(exchange_dtype: ExchangeDtype | None) -> Dtype:
    """In which variants are checked: rows of float64 do not travel in another format."""
    return "float64" if exchange_dtype is None else "float32"


def check_training(
    job: Job,
    name: str,
    options: dict[str, Any],
    num_steps: int = 8,
    layout: Layout = WHOLE,
    exchange_dtype: ExchangeDtype | None = None,
) -> dict[str, Any]:
    """A few AdamW steps, whose losses must be the oracle's."""
    from harness.bench import training_check

    model = BASE.model_copy(update={"name": "training", "num_layers": 2, "num_heads": 4, "seq": 8, "vocab": 64})
    levels = [{"name": f"level{i}", "size": size} for i, size in enumerate(job.topology.shape)]
    experiment = Experiment(
        model=model,
        cluster=with_levels("check", levels, kind="local"),
        workload=Workload(name="training", tokens_per_rank=16, generator="natural"),
        system=name,
        phase="train_step",
        dtype=exact_dtype(exchange_dtype),
        exchange_dtype=exchange_dtype,
        layout=layout,
        options=options,
    )
    if refused := no_layout(experiment):
        return _row("refused", refused)
    system = system_of(experiment)
    found, error = attempt(job, lambda: training_check.gate_case(job, system, experiment, _row("ok", ""), num_steps))
    if said := failed(job, error):
        return _row(status_of(said), said)
    assert found is not None
    return found


def check_one(
    job: Job,
    name: str,
    trial: str,
    dtype: Dtype,
    options: dict[str, Any] | None = None,
    layout: Layout = WHOLE,
    exchange_dtype: ExchangeDtype | None = None,
) -> dict[str, Any]:
    """One system on one trial and dtype."""
    spec = TRIALS[trial]
    model = BASE.model_copy(update=spec.model)
    tokens = tuple(np.resize(spec.tokens, job.num_ranks).tolist())
    params = dict(spec.params)
    workload = Workload(name=trial, tokens_per_rank=tokens, generator=spec.generator, params=params, seed=7)
    routing = planned_routing(workload, model, job.topology)
    return compare(
        job,
        registry.system(name),
        model,
        dtype,
        routing,
        prescribed=spec.generator != "natural",
        identity_experts=spec.identity_experts,
        options=options,
        layout=layout,
        exchange_dtype=exchange_dtype,
    )


def gate_case(job: Job, system: type[System], experiment: Experiment) -> dict[str, Any]:
    """The check that stands before a cell's timing: the experiment's own E, k, gate, FFN type, drop rule, dtype,
    options and ranks, at reduced M, H and tokens."""
    model = experiment.model
    small = model.shrunk(1)
    tokens = tuple(min(count, 16) for count in experiment.workload.tokens(job.num_ranks))
    generator = "uniform" if small.takes_routing else "natural"
    workload = Workload(name="gate", tokens_per_rank=tokens, generator=generator, seed=experiment.workload.seed)
    routing = planned_routing(workload, small, job.topology)
    return compare(
        job,
        system,
        small,
        experiment.dtype,
        routing,
        prescribed=small.takes_routing,
        options=dict(experiment.options),
        layout=experiment.layout,
        exchange_dtype=experiment.exchange_dtype,
    )


def compare(
    job: Job,
    system: type[System],
    model: Model,
    dtype: Dtype,
    routing: Routing,
    *,
    prescribed: bool = True,
    identity_experts: bool = False,
    options: dict[str, Any] | None = None,
    cluster: Cluster | None = None,
    layout: Layout = WHOLE,
    exchange_dtype: ExchangeDtype | None = None,
) -> dict[str, Any]:
    """Collective: forward and backward of ``system`` against the oracle -> status, errors, tolerance, reason. An
    expert-parallel group of ``layout`` is compared as if it were alone.

    ``prescribed``: tokens are steered to take ``routing``; else the gate chooses. Rows that travel in another format
    are compared with the oracle of rows rounded so, and what comes out, by a tolerance of that format, with that of
    rows as they were (gradients of a gate may cancel)."""
    groups, system = layout.groups(job.topology), system.alone()
    whole, job = job, job.part(groups)
    if groups is not None:
        routing = routing.gathered(np.array(job.members)[:, None])
    if model.num_experts % job.num_ranks:
        return _row("refused", f"num_experts = {model.num_experts} is not divisible by {job.num_ranks} ranks")
    case = Case(
        model,
        dtype,
        job.topology,
        Placement.contiguous(model.num_experts, job.num_ranks),
        routing,
        str(job.device),
        identity_experts,
        options or {},
        cluster,
        exchange_dtype=exchange_dtype,
    )
    refusal = layout.refused or system.missing() or system.refuse(case)
    if refusal := refusal if groups is None else first_said(whole, refusal):  # groups are asked of tokens of their own
        return _row("refused", refusal)
    weights = Weights(model, dtype, seed=11)
    xs, dys = draw_tokens(weights, routing, prescribed)
    found, error = attempt(whole, lambda: _run(job, system, case, weights, xs[job.rank], dys[job.rank]))
    if said := failed(whole, error):
        return _row(status_of(said), said)
    assert found is not None
    constant_gate = identity_experts and not found["gate_in_exchange"]

    def errors_of(case: Case) -> dict[str, Worst]:
        expected = _oracle(system, case, weights, xs, dys, constant_gate)
        of_groups = of_all(whole, _errors(job, found, expected, routing, prescribed))
        return {name: worst(each[name] for each in of_groups) for name in of_groups[0]}

    errors, tolerance = errors_of(case), allowed(system, roughest(dtype, exchange_dtype))
    wrong = reason(errors, tolerance)
    values = {name: each.error for name, each in errors.items()}
    if exchange_dtype is not None:
        output = errors_of(dataclasses.replace(case, exchange_dtype=None))["output"]
        told = reason({"output": output}, UNROUNDED[exchange_dtype])
        wrong = wrong or (told and f"against rows as they were {told}")
    return _row("nonconforming" if wrong else "ok", wrong, values, tolerance)


def draw_tokens(
    weights: Weights, routing: Routing, prescribed: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs that the gate routes as ``routing`` says (if ``prescribed``), and gradients of the outputs, for every rank
    [T_r, M].

    Drawn from a seed, so that every rank can draw all of them; values already rounded to the weights' dtype."""
    model, dtype = weights.model, TORCH_DTYPE[weights.dtype]
    xs, dys = [], []
    for rank, count in enumerate(routing.tokens):
        generator = torch.Generator().manual_seed(1000 + rank)
        z, dy = torch.randn(2, count, model.hidden, generator=generator, dtype=torch.float64)
        if prescribed:
            ids = torch.as_tensor(routing.of_rank(rank).astype(np.int64))
            z = steer(z, weights.directions.double(), ids)
        xs.append(z.to(dtype))
        dys.append(dy.to(dtype))
    return xs, dys


def _row(status: str, reason: str, errors: dict[str, float] | None = None, tolerance: float | None = None) -> dict:
    return {"status": status, "reason": reason, "errors": errors or {}, "tolerance": tolerance}


def _run(
    job: Job, system: type[System], case: Case, weights: Weights, x: torch.Tensor, dy: torch.Tensor
) -> dict[str, Any]:
    layer = system.build(case, job, weights)
    x = x.to(job.device, copy=True).requires_grad_()
    y = layer.exchange(x, layer.prepare(x)) if case.identity_experts else layer(x)
    y.backward(dy.to(job.device))
    grad = torch.zeros_like(x) if x.grad is None else x.grad
    gradients = layer.gradients()
    return {
        "y": y.detach().double().cpu(),
        "dx": grad.double().cpu(),
        "gate_in_exchange": layer.gate_in_exchange,
        "gate": {name: gradient.double().cpu() for name, gradient in gradients.gate.items()},
        "experts": {e: {n: g.double().cpu() for n, g in w.items()} for e, w in gradients.experts.items()},
    }


def _oracle(
    system: type[System],
    case: Case,
    weights: Weights,
    xs: list[torch.Tensor],
    dys: list[torch.Tensor],
    constant_gate: bool,
) -> dict[str, Any]:
    """The same step of the whole job, dense, in float64, on this rank alone."""
    oracle = _cached_oracle(weights, case.identity_experts, case.routing.tokens, case.exchange_dtype)
    oracle.zero_grad()
    x = torch.cat(xs).double().requires_grad_()
    kept = None
    if case.model.gate not in EXPERTS_CHOOSE:
        probabilities = oracle.logits(x).softmax(-1).detach()
        kept = system.kept(case, list(probabilities.split(case.routing.tokens)))
    y = oracle(x, None if kept is None else torch.cat(kept), constant_gate)
    y.backward(torch.cat(dys).double())
    assert x.grad is not None
    named = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, "weights": named, "gate_names": [*oracle.gate_names, *oracle.shared]}


@functools.lru_cache(maxsize=4)
def _cached_oracle(
    weights: Weights, identity_experts: bool, tokens: tuple[int, ...], exchange_dtype: ExchangeDtype | None
) -> Oracle:
    return Oracle(weights, identity_experts, tokens, exchange_dtype)


def _errors(
    job: Job, found: dict[str, Any], expected: dict[str, Any], routing: Routing, prescribed: bool
) -> dict[str, Worst]:
    """Largest relative errors over all ranks, and where they are: output, input_grad, weight_grad."""
    number, start, stop = job.members[job.rank], routing.offsets[job.rank], routing.offsets[job.rank + 1]

    def token(index: Sequence[int]) -> str:
        if not index:
            return f"rank {number}"
        chosen = ", ".join(map(str, routing.of_rank(job.rank)[index[0]].tolist())) if prescribed else ""
        experts = f" (experts {chosen})" if chosen else ""
        return f"rank {number}, token {index[0]} of {stop - start}{experts}, column {index[1]}"

    mine = {
        name: _worst(found[key], expected[key], slice(start, stop), token)
        for name, key in (("output", "y"), ("input_grad", "dx"))
    }
    named, owned = expected["weights"], set(found["experts"])
    if "w1" in named:
        weights = []
        for name in expected["gate_names"]:
            gradient = found["gate"].get(name, torch.zeros_like(named[name])).to(job.device)
            dist.all_reduce(gradient, group=job.world)
            words = functools.partial(_index, f"gate's {name}, summed over ranks,")
            weights.append(_worst(gradient.cpu(), named[name], slice(None), words))
        for e, gradients in found["experts"].items():
            for name, gradient in gradients.items():
                words = functools.partial(_index, f"rank {number}, {name} of expert {e}")
                weights.append(_worst(gradient, named[name], e, words))
        mine["weight_grad"] = worst(weights)
    of_ranks = of_all(job, (mine, owned))
    errors = {name: worst(each[name] for each, _ in of_ranks) for name in mine}
    absent = set(range(len(named["w1"]))) - set().union(*(each for _, each in of_ranks)) if "w1" in named else set()
    if absent:
        errors["weight_grad"] = Worst(math.inf, f"no rank has gradients of experts {', '.join(map(str, absent))}")
    return errors


def _worst(found: torch.Tensor, expected: torch.Tensor, part: Any, words: Callable[[Sequence[int]], str]) -> Worst:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return worst_of(found, expected[part], scale, words)


def _index(name: str, index: Sequence[int]) -> str:
    return f"{name} {list(index)}" if index else name
