"""Phases ``prefill`` and ``decode``: a whole GPT in inference, its experts shared out over the ranks.

Each rank has sequences of its own; attention is replicated, or (``model_parallel``) its heads are shared out over the
ranks of a node, whose sequences they then see. ``prefill``: a rank's tokens are whole sequences of
``model.seq``. ``decode``: each of a rank's tokens is the next one of a sequence of its own whose other
``model.seq - 1`` tokens are in the cache. One repetition is one pass through all layers, on other tokens every time.

Text is what is held out of the corpus. A natural workload is routed by the model itself (with ``params.weights`` one
that ``moebench record`` trained, so that its choices are real), a prescribed one by steering what enters each MoE
layer; keys and values before the decoded token are then drawn, as they do not matter to the routing.

A system that ``places`` says where each layer's experts go, from the routing of other tokens than those served: the
rest of a trace, another step of a generator, or what the model chooses on other text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.bench.inside import Known, LayerWitness, Witnesses, at_once, turn
from harness.bench.steered import OracleLayer, Steered, steered_gpt
from harness.bench.timing import Sample, Stopwatch
from harness.bench.witness import Verdict, first_of
from harness.case import case_of, in_order, placed_by, placements
from harness.comm.agree import of_all
from harness.comm.job import Job
from harness.dtypes import TORCH_DTYPE
from harness.errors import placed
from harness.layer import stored
from harness.layer.gpt import GPT, Attention, Cache, Ffn
from harness.layer.weights import Weights
from harness.layer.work import ATTENTION_GEMMS, model_attention_macs
from harness.placement import Placement
from harness.plan.graph import Timeline
from harness.plan.lanes import executor_of
from harness.plan.passage import passage
from harness.plan.serving import ServingStep, parts_s
from harness.routing import Routing, make_routing
from harness.routing.corpus import python_corpus
from harness.specs import Experiment
from harness.system import Case, MoELayer, System
from harness.topology import Topology

PROFILE_TOKENS = 2048  # of a rank, at least a sequence: what the model routes itself to plan by


def agreed(job: Job, work: Callable[[], Any]) -> Any:
    """What rank 0 makes of it, on every rank; its errors too."""
    answer: list[Any] = [None, None]
    if job.rank == 0:
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = placed(error)
    if job.num_ranks > 1:
        dist.broadcast_object_list(answer, 0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


# ------------------------------------------------------------------------------------------------------- the server


class Server:
    """A system that serves on this rank, as a contender of a race. ``placed``: of every layer; None: as it plans.
    ``shared``: of the race, where its contenders find what is the same for all. ``num_calls``: after so many all layers
    must have been seen."""

    def __init__(
        self,
        job: Job,
        system: type[System],
        experiment: Experiment,
        placed: tuple[Placement, ...] | None = None,
        shared: dict[Any, Any] | None = None,
        num_calls: int | None = None,
    ):
        self.shared = {} if shared is None else shared
        self.calls, self.verdict = 0, Verdict({"logits": 0.0})
        self.at_once = at_once(experiment.model.num_moe_layers, num_calls)
        self.witnesses = Witnesses(experiment.model.num_moe_layers, self._witness, self.at_once)
        self.least: dict[int, np.ndarray | None] = {}  # by repetition
        self.timed: dict[int, int] = {}  # passes, by repetition
        self.stands_in = experiment.compute == "stand-in"
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
                placed = agreed(job, lambda: placed_by(experiment, profile))
        self._build(placed)
        self.tokens = text(experiment, [job.rank]).to(job.device)
        self.step: ServingStep

    def _build(self, placed: tuple[Placement, ...]) -> None:
        self.placed = placed
        experiment, job = self.experiment, self.job

        def moe(layer: int, weights: Weights) -> MoELayer:
            case = case_of(experiment, str(job.device), layer=layer, placement=placed[layer])
            return self.system.build(case, job, weights)

        self.gpt = serving_gpt(experiment, moe, self.dtype, job.device, self.arrays)
        if self.sharing > 1:
            for attention in (m for m in self.gpt.modules() if isinstance(m, Attention)):
                attention.keep_heads(job.rank % self.sharing, self.sharing)
            self.gpt.requires_grad_(False)
        costs = case_of(experiment).stand_in_costs
        for ffn in (m for m in self.gpt.modules() if isinstance(m, Ffn)):
            ffn.stand_in = costs
        self.steered: list[Steered] = [m for m in self.gpt.modules() if isinstance(m, Steered)]
        self.layers: list[MoELayer] = [steered.layer for steered in self.steered]  # type: ignore[misc]
        self.prescribed = None if experiment.workload.generator == "natural" else self._routed(0)

    def _routed(self, step: int) -> list[torch.Tensor]:
        """Of this rank's tokens, by layer, int64 [T, k]."""
        workload, model, topology = self.experiment.workload, self.model, self.job.topology
        routings = [make_routing(workload, model, topology, step=step, layer=i) for i in range(len(self.layers))]
        own = [routing.of_rank(self.job.rank).astype(np.int64) for routing in routings if routing is not None]
        return [torch.as_tensor(ids, device=self.job.device) for ids in own]

    @torch.no_grad()
    def _profile(self) -> list[Routing]:
        """Collective: what the model routes of text that it is not served."""
        seq, rank = self.model.seq, self.job.rank
        windows = python_corpus().sample(np.random.default_rng([7, rank]), max(1, PROFILE_TOKENS // seq), seq)
        self._pass(torch.as_tensor(windows % self.model.vocab, device=self.job.device), None)
        own = [layer.routed[0].cpu().numpy().astype(np.int32) for layer in self.layers]  # type: ignore[index, union-attr]
        every = of_all(self.job, own)
        tokens = tuple(len(of_rank[0]) for of_rank in every)
        return [
            Routing(np.concatenate(of_layer), tokens, self.model.num_experts) for of_layer in zip(*every, strict=True)
        ]

    def run(self, rep: int, watch: Stopwatch) -> list[Sample]:
        """One timed pass; ``total``, as it is one piece."""
        self.timed[rep] = self.calls
        with torch.no_grad():
            ready = self._prepare()
            sample = watch.measure(rep, "total", lambda: self._pass(*ready, watched=self._watched))
            self.least[rep] = self._see(f"timed repetition {rep}")
        assert self.timeline is not None
        sample.step = self.timed[rep]
        sample.parts_s = parts_s(self.timeline, self.model.num_moe_layers)
        return [sample]

    @torch.no_grad()
    def warm_up(self) -> None:
        self._pass(*self._prepare(), watched=self._watched)
        self._see("warm-up")

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Of this rank's new tokens in the first pass, [T, vocab]."""
        self._pass(*self._prepare())
        return self.step.logits.flatten(0, 1)

    @property
    def _watched(self) -> list[int]:
        """The layers whose turn it is to be seen."""
        return turn(len(self.layers), self.calls, self.at_once)

    def _see(self, name: str) -> np.ndarray | None:
        """Collective, outside the clock: what the pass made -> the rows that its watched layer needed."""
        watched, name = self._watched, f"pass {self.calls} ({name})"
        for layer in watched:
            whole = layer == watched[0]
            self.verdict += self.witnesses[layer].check(name, 0, self._known(layer), self.step.seen, whole=whole)
        if not bool(self.step.logits.isfinite().all()):
            self.verdict += Verdict({"logits": np.inf}, f"logits of {name} are not finite")
        self.calls += 1
        return self.witnesses[watched[0]].least

    def _known(self, layer: int) -> Known:
        """Collective. Of layers whose turn comes first the weights that every system must have loaded, of this rank's
        part of the experts; of the others those that this one has."""
        if layer not in self.witnesses.ahead:
            return self.witnesses[layer].read(self.layers[layer], moves=False)
        key = "weights", layer
        if key not in self.shared:
            weights = self._weights(layer)
            every = in_order(self.experiment)
            own = {e: weights.expert(e) for e in map(int, every.local(self.job.rank))} if not self.stands_in else {}
            self.shared[key] = Known({}, own.__getitem__, every.owner)
        known: Known = self.shared[key]
        return known

    def _witness(self, layer: int) -> LayerWitness:
        case = case_of(self.experiment, str(self.job.device), layer=layer, placement=self.placed[layer])
        natural = self.experiment.workload.generator == "natural"
        return LayerWitness(self.job, self.system, case, self._weights(layer), natural=natural, layer=layer)

    def _weights(self, layer: int) -> Weights:
        model, dtype = self.model, self.experiment.dtype
        if self.arrays is not None:
            return stored.StoredWeights(model, dtype, layer=layer, arrays=self.arrays)
        return Weights(model, dtype, seed=self.experiment.workload.seed, layer=layer)

    def check(self) -> Verdict:
        """Collective, as what is not finite may be one rank's alone."""
        reason = first_of(self.job, self.verdict.reason)
        verdict, self.verdict = Verdict(self.verdict.errors, reason), Verdict({"logits": 0.0})
        return verdict

    def known_cases(self, rep: int) -> list[Case]:
        given = self.experiment
        if given.workload.generator == "natural" or (given.goes_on and self.system.remembers):
            return []
        step, device, placed = self.timed.get(rep, 0), str(self.job.device), enumerate(self.placed)
        return [case_of(given, device, layer=layer, step=step, placement=at) for layer, at in placed]

    def least_rows(self, rep: int) -> np.ndarray | None:
        return self.least.get(rep)

    def timelines(self) -> dict[str, Timeline]:
        return {} if self.timeline is None else {"pass": self.timeline}

    def keep(self) -> list[torch.Tensor]:
        cached = [part for cache in getattr(self, "caches", ()) for part in (cache.keys, cache.values)]
        return [*self.gpt.parameters(), *self.gpt.buffers(), *cached]

    def close(self) -> None:
        """Nothing outlives a server."""

    def _prepare(self) -> tuple[torch.Tensor, list[Cache] | None]:
        """Untimed: the tokens of a pass, and the caches in front of them.

        No pass is like the one before it: a prompt is turned by one more token, the decoded one is another of its
        sequence's, and a prescribed routing takes the tokens in another order, so that loads stay what they are."""
        if self.prescribed is not None:
            if self.experiment.goes_on and self.calls:  # a replay
                self.prescribed = self._routed(self.calls)
            for steered, ids in zip(self.steered, self.prescribed, strict=True):
                generator = torch.Generator().manual_seed(1_000_003 * self.calls + self.job.rank)
                order = torch.randperm(len(ids), generator=generator) if self.calls else torch.arange(len(ids))
                steered.ids = ids[order.to(ids.device)]
        if self.experiment.phase == "prefill":
            return self.tokens.roll(self.calls % self.model.seq, 1), None
        context = self.tokens[:, :-1]
        if not hasattr(self, "caches"):
            sequences = self.sharing * len(context)
            self.caches = [
                Cache(self.model, sequences, self.dtype, self.job.device, self.sharing) for _ in self.gpt.blocks
            ]
            if self.prescribed is None:
                self._pass(context, self.caches)
            else:
                generator = torch.Generator().manual_seed(self.job.rank)
                for cache in self.caches:
                    for part in (cache.keys, cache.values):
                        part.copy_(torch.randn(part.shape, generator=generator))
        for cache in self.caches:
            cache.length = context.shape[1]
        at = self.model.seq - 1 - self.calls % self.model.seq
        return self.tokens[:, at : at + 1], self.caches

    def _pass(self, tokens: torch.Tensor, caches: list[Cache] | None, watched: Collection[int] = ()) -> None:
        steers = [steered.steer for steered in self.steered]
        passages = [passage(layer) for layer in self.layers]
        self.step = ServingStep(self.gpt, passages, steers, caches, self.attention_s, self.group, watched)
        self.timeline = self.lanes.run(self.step.plan(tokens))


def serving_gpt(
    experiment: Experiment,
    moe: Callable[[int, Weights], MoELayer | OracleLayer],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    arrays: stored.Arrays | None = None,
) -> GPT:
    """``arrays``: of a trained model (``stored_arrays``)."""
    model, weights_of = experiment.model, None
    if arrays is not None:

        def weights_of(layer: int) -> Weights:
            return stored.StoredWeights(model, experiment.dtype, layer=layer, arrays=arrays)

    gpt = steered_gpt(experiment, moe, dtype, device, weights_of)
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
    macs = model_attention_macs(model, tokens, causal=causal)
    return float(ATTENTION_GEMMS * gemm.alpha_s + macs * gemm.beta_s_per_mac)


__all__ = ["Server", "agreed", "serving_gpt", "stored_arrays", "text"]
