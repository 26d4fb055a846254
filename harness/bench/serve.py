"""Phases ``prefill`` and ``decode``: a whole GPT in inference, its experts shared out over the ranks.

Each rank has sequences of its own; attention is replicated, or (``model_parallel``) its heads are shared out over the
ranks of a node, whose sequences they then see. ``prefill``: a rank's tokens are whole sequences of
``model.seq``. ``decode``: each of a rank's tokens is the next one of a sequence of its own whose other
``model.seq - 1`` tokens are in the cache. One repetition is one pass through all layers, and the same in every one.

Text is what is held out of the corpus. A natural workload is routed by the model itself (with ``params.weights`` one
that ``moebench record`` trained, so that its choices are real), a prescribed one by steering what enters each MoE
layer; keys and values before the decoded token are then drawn, as they do not matter to the routing.

A system that ``places`` says where each layer's experts go, from the routing of other tokens than those served: the
rest of a trace, another step of a generator, or what the model chooses on other text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.bench import train
from harness.bench.timing import Sample, Stopwatch
from harness.comm.job import Job
from harness.dtypes import TORCH_DTYPE
from harness.errors import UserError, bad
from harness.layer import stored
from harness.layer.gpt import GPT, Attention, Cache
from harness.layer.weights import Weights
from harness.layer.work import ATTENTION_GEMMS, attention_macs, kv_fraction
from harness.placement import Placement
from harness.plan.graph import Timeline
from harness.plan.lanes import executor_of
from harness.plan.passage import passage
from harness.plan.serving import ServingStep, parts_s
from harness.registry import system as system_called
from harness.routing import Routing, make_routing
from harness.routing.corpus import python_corpus
from harness.routing.trace import TraceParams, find_trace, from_trace, read_trace
from harness.specs import Experiment
from harness.system import Case, MoELayer, System
from harness.topology import Topology

PROFILE_STEP = 1_000_000  # of a generator: far from all that is served
PROFILE_TOKENS = 2048  # of a rank, at least a sequence: what the model routes itself to plan by


# ------------------------------------------------------------------------------------------------ where experts go


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
    return _planned(experiment, chosen, topology, profile)


def _planned(
    experiment: Experiment, chosen: type[System], topology: Topology, profile: list[Routing] | None
) -> tuple[Placement, ...]:
    model = experiment.model
    found = None if profile is None else chosen.place(_case(experiment, topology, "cpu", 0), profile)
    if found is None:
        found = [Placement.contiguous(model.num_experts, topology.num_ranks)] * model.num_layers
    assert len(found) == model.num_layers
    assert all(each.hosts.shape == (model.num_experts, topology.num_ranks) for each in found)
    return tuple(found)


def _case(
    experiment: Experiment, topology: Topology, device: str, layer: int, placement: Placement | None = None
) -> Case:
    case = train.training_case(experiment, topology, device, layer)
    stand_in = experiment.compute == "stand-in"
    return dataclasses.replace(case, stand_in=stand_in, placement=placement or case.placement)


def cases(experiment: Experiment) -> list[Case]:
    """Of every layer."""
    topology = Topology(experiment.cluster.shape)
    return [_case(experiment, topology, "cpu", layer, at) for layer, at in enumerate(placements(experiment))]


def agreed(job: Job, work: Callable[[], Any]) -> Any:
    """What rank 0 makes of it, on every rank; its errors too."""
    answer: list[Any] = [None, None]
    if job.rank == 0:
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    if job.num_ranks > 1:
        dist.broadcast_object_list(answer, 0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


# ------------------------------------------------------------------------------------------------------- the server


class Server:
    """A system that serves on this rank, as a contender of a race. ``placed``: of every layer; None: as it plans."""

    def __init__(
        self, job: Job, system: type[System], experiment: Experiment, placed: tuple[Placement, ...] | None = None
    ):
        self.job, self.system, self.experiment = job, system, experiment
        self.dtype, self.model = TORCH_DTYPE[experiment.dtype], experiment.model
        self.timeline: Timeline | None = None
        self.lanes = executor_of(job)
        self.arrays = stored_arrays(experiment)
        self.attention_s = attention_s(experiment, job.rank)
        self.group = job.inner(0) if experiment.model_parallel else None
        self.sharing = 1 if self.group is None else dist.get_world_size(self.group)  # ranks of an attention
        if placed is None:
            placed = agreed(job, lambda: placements(experiment))
            if system.places and experiment.workload.generator == "natural":
                self._build(placed)
                profile = self._profile()
                placed = agreed(job, lambda: _planned(experiment, system, job.topology, profile))
        self._build(placed)
        self.tokens = text(experiment, [job.rank]).to(job.device)
        self.step: ServingStep

    def _build(self, placed: tuple[Placement, ...]) -> None:
        self.placed = placed
        experiment, job = self.experiment, self.job

        def moe(layer: int, weights: Weights) -> MoELayer:
            return self.system.build(
                _case(experiment, job.topology, str(job.device), layer, placed[layer]), job, weights
            )

        self.gpt = serving_gpt(experiment, moe, self.dtype, job.device, self.arrays)
        if self.sharing > 1:
            for attention in (m for m in self.gpt.modules() if isinstance(m, Attention)):
                attention.keep_heads(job.rank % self.sharing, self.sharing)
            self.gpt.requires_grad_(False)
        self.steered: list[train.Steered] = [m for m in self.gpt.modules() if isinstance(m, train.Steered)]
        self.layers: list[MoELayer] = [steered.layer for steered in self.steered]  # type: ignore[misc]
        if experiment.workload.generator != "natural":
            for layer, steered in enumerate(self.steered):
                routing = make_routing(experiment.workload, self.model, job.topology, layer=layer)
                assert routing is not None
                steered.ids = torch.as_tensor(routing.of_rank(job.rank).astype(np.int64), device=job.device)

    @torch.no_grad()
    def _profile(self) -> list[Routing]:
        """Collective: what the model routes of text that it is not served."""
        seq, rank = self.model.seq, self.job.rank
        windows = python_corpus().sample(np.random.default_rng([7, rank]), max(1, PROFILE_TOKENS // seq), seq)
        self._pass(torch.as_tensor(windows % self.model.vocab, device=self.job.device), None)
        own = [layer.routed[0].cpu().numpy().astype(np.int32) for layer in self.layers]  # type: ignore[index, union-attr]
        every: list[Any] = [own]
        if self.job.num_ranks > 1:
            every = [None] * self.job.num_ranks
            dist.all_gather_object(every, own)
        tokens = tuple(len(of_rank[0]) for of_rank in every)
        return [
            Routing(np.concatenate(of_layer), tokens, self.model.num_experts) for of_layer in zip(*every, strict=True)
        ]

    def run(self, rep: int, watch: Stopwatch) -> list[Sample]:
        """One timed pass; ``total``, as it is one piece."""
        with torch.no_grad():
            ready = self._prepare()
            sample = watch.measure(rep, "total", lambda: self._run(ready))
        assert self.timeline is not None
        sample.parts_s = parts_s(self.timeline, self.model.num_layers)
        return [sample]

    def warm_up(self) -> None:
        with torch.no_grad():
            self._run(self._prepare())

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Of this rank's new tokens, [T, vocab]."""
        self._run(self._prepare())
        return self.step.logits.flatten(0, 1)

    def errors(self) -> dict[str, float]:
        """Logits were compared with the oracle's at reduced shape; here they must be finite."""
        return {"logits": 0.0 if bool(self.step.logits.isfinite().all()) else np.inf}

    def timelines(self) -> dict[str, Timeline]:
        return {} if self.timeline is None else {"pass": self.timeline}

    def keep(self) -> list[torch.Tensor]:
        cached = [part for cache in getattr(self, "caches", ()) for part in (cache.keys, cache.values)]
        return [*self.gpt.parameters(), *self.gpt.buffers(), *cached]

    def close(self) -> None:
        """Nothing outlives a server."""

    def _prepare(self) -> tuple[torch.Tensor, list[Cache] | None]:
        """Untimed: the tokens of a pass, and the caches in front of them."""
        if self.experiment.phase == "prefill":
            return self.tokens, None
        context = self.tokens[:, :-1]
        if not hasattr(self, "caches"):
            sequences = self.sharing * len(context)
            self.caches = [Cache(self.model, sequences, self.dtype, self.job.device, self.sharing) for _ in self.layers]
            if self.experiment.workload.generator == "natural":
                self._pass(context, self.caches)
            else:
                generator = torch.Generator().manual_seed(self.job.rank)
                for cache in self.caches:
                    for part in (cache.keys, cache.values):
                        part.copy_(torch.randn(part.shape, generator=generator))
        for cache in self.caches:
            cache.length = context.shape[1]
        return self.tokens[:, -1:], self.caches

    def _run(self, ready: tuple[torch.Tensor, list[Cache] | None]) -> None:
        self._pass(*ready)

    def _pass(self, tokens: torch.Tensor, caches: list[Cache] | None) -> None:
        steers = [steered.steer for steered in self.steered]
        passages = [passage(layer) for layer in self.layers]
        self.step = ServingStep(self.gpt, passages, steers, caches, self.attention_s, self.group)
        self.timeline = self.lanes.run(self.step.plan(tokens))


def serving_gpt(
    experiment: Experiment,
    moe: Callable[[int, Weights], MoELayer | train.OracleLayer],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    arrays: stored.Arrays | None = None,
) -> GPT:
    """``arrays``: of a trained model (``stored_arrays``)."""
    model, weights_of = experiment.model, None
    if arrays is not None:

        def weights_of(layer: int) -> Weights:
            return stored.StoredWeights(model, experiment.dtype, layer=layer, arrays=arrays)

    gpt = train.steered_gpt(experiment, moe, dtype, device, weights_of)
    if arrays is not None:
        stored.fill(gpt, arrays, experiment.dtype)
    return gpt.requires_grad_(False)


def stored_arrays(experiment: Experiment) -> stored.Arrays | None:
    """Weights that the workload names."""
    name = experiment.workload.params.get("weights")
    if experiment.workload.generator != "natural" or name is None:
        return None
    return stored.load(Path(str(name)).expanduser(), experiment.model)


def text(experiment: Experiment, ranks: list[int]) -> torch.Tensor:
    """Held-out sequences of ``ranks``, one after another, int64 [B, seq]."""
    model, tokens = experiment.model, experiment.workload.tokens(Topology(experiment.cluster.shape).num_ranks)
    sequences = [count // model.seq if experiment.phase == "prefill" else count for count in tokens]
    windows = python_corpus().held_windows(sum(sequences), model.seq)
    starts = np.concatenate([[0], np.cumsum(sequences)])
    own = np.concatenate([windows[starts[rank] : starts[rank + 1]] for rank in ranks])
    return torch.as_tensor(own % model.vocab)


def attention_s(experiment: Experiment, rank: int) -> float | None:
    """With stand-in compute, how long an attention of this rank's tokens takes by the cluster's gemm costs."""
    gemm, model = experiment.cluster.gemm, experiment.model
    if experiment.compute != "stand-in" or gemm is None:
        return None
    tokens = experiment.workload.tokens(Topology(experiment.cluster.shape).num_ranks)[rank]
    causal = experiment.phase == "prefill"
    macs = attention_macs(model.hidden, tokens, model.seq, causal=causal, kv_fraction=kv_fraction(model))
    return float(ATTENTION_GEMMS * gemm.alpha_s + macs * gemm.beta_s_per_mac)


# ------------------------------------------------------------------------------------------------ before any timing


def gate_case(job: Job, system: type[System], experiment: Experiment, found: dict[str, Any]) -> dict[str, Any]:
    """Collective: a small GPT served in float64, with a random placement of unequal numbers of experts where the system
    follows one; the logits must be those of the dense oracle in one process. ``found`` is ``conformance.gate_case``'s
    row; returns it with ``logits`` added. The tolerance is a layer's, once for each."""
    small = reduced(experiment)
    refused = system.refuse(_case(small, job.topology, str(job.device), 0))
    if refused is not None:  # of the reduced case: the layer's own check must do
        return found
    placed = unequal(small, job.num_ranks) if system.places else placements(small)
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
    tolerance = system.tolerance("float64") * small.model.num_layers
    if float(worst) > tolerance:
        row["status"] = "nonconforming"
        row["reason"] = f"logits in float64 off by {float(worst):.1e} of the oracle's, allowed {tolerance:.0e}"
    return row


def reduced(experiment: Experiment) -> Experiment:
    """The same in float64 and small enough for the oracle."""
    small = train.reduced(experiment)
    natural = experiment.phase == "decode" or experiment.workload.generator == "natural"
    update: dict[str, Any] = {"tokens_per_rank": 4 if experiment.phase == "decode" else 16, "params": {}}
    update["generator"] = "natural" if natural else "uniform"
    options = {key: value for key, value in experiment.options.items() if key != "placement"}
    workload = small.workload.model_copy(update=update)
    if experiment.model_parallel:
        num_heads = max(small.model.num_heads, math.prod(experiment.cluster.shape[1:]))
        small = small.model_copy(update={"model": small.model.model_copy(update={"num_heads": num_heads})})
    return small.model_copy(update={"workload": workload, "dtype": "float64", "compute": "real", "options": options})


def unequal(experiment: Experiment, num_ranks: int) -> tuple[Placement, ...]:
    """Random placements: an expert on every rank, the others anywhere."""
    rng, num_experts = np.random.default_rng(3), experiment.model.num_experts
    found = []
    for _ in range(experiment.model.num_layers):
        owner = np.concatenate([np.arange(num_ranks), rng.integers(0, num_ranks, num_experts - num_ranks)])
        owner = rng.permutation(owner)
        found.append(Placement.of_slots([rng.permutation(np.flatnonzero(owner == rank)) for rank in range(num_ranks)]))
    return tuple(found)


@torch.no_grad()
def oracle_logits(experiment: Experiment, topology: Topology) -> torch.Tensor:
    """Of the new tokens of all ranks, [T, vocab]: one process, dense experts, float64, no cache."""
    chosen, ranks = system_called(experiment.system), list(range(topology.num_ranks))
    sequences = text(experiment, ranks)
    tokens = tuple(len(text(experiment, [rank])) * experiment.model.seq for rank in ranks)

    def moe(layer: int, weights: Weights) -> train.OracleLayer:
        case = _case(experiment, topology, "cpu", layer)
        every = Routing(np.zeros((sum(tokens), experiment.model.top_k), np.int32), tokens, experiment.model.num_experts)
        return train.OracleLayer(weights, chosen, dataclasses.replace(case, routing=every))

    gpt = serving_gpt(experiment, moe, torch.float64, arrays=stored_arrays(experiment))
    if experiment.workload.generator != "natural":
        for layer, steered in enumerate(m for m in gpt.modules() if isinstance(m, train.Steered)):
            routing = make_routing(experiment.workload, experiment.model, topology, layer=layer)
            assert routing is not None
            steered.ids = torch.as_tensor(routing.ids.astype(np.int64))
    logits = gpt(sequences)
    return (logits if experiment.phase == "prefill" else logits[:, -1:]).flatten(0, 1)


__all__ = ["Server", "UserError", "cases", "gate_case", "placements"]
