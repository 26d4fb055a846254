"""Phase ``train_step``: a small GPT whose MoE layers come from the system; forward, backward, gradient sum, AdamW.

Everything but the experts is replicated, or the attention's heads are shared out inside nodes. The loss is the sum
over a rank's tokens divided by the tokens of the job, so replicated gradients are all-reduced with SUM, and expert
gradients, which came through the exchange, are complete in their expert-parallel group and summed over its replicas. A
step is one plan; the sums of the attentions' gradients stand in it where the system puts them.

A prescribed workload steers what enters each MoE layer so that the layer's own gate takes it, step by step; the
routers then stay as they were drawn (they are part of the steering). A natural workload trains them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from harness.bench import memory
from harness.bench.adam import ScaledAdamW, adamw
from harness.bench.checkpoint import Checkpoints
from harness.bench.inside import Known, LayerWitness, Witnesses, at_once, check_drawn, check_updated, turn
from harness.bench.steered import OracleLayer, Steered, steered_gpt
from harness.bench.timing import Sample, Stopwatch
from harness.bench.updated import Updates
from harness.bench.witness import Verdict
from harness.bench.wording import allowed
from harness.case import case_of
from harness.comm.handover import Held
from harness.comm.job import Job
from harness.comm.rows import accumulator
from harness.dtypes import TORCH_DTYPE
from harness.layer.gpt import Attention, Ffn
from harness.layer.weights import Weights
from harness.plan.gradients import Stream
from harness.plan.graph import Plan, Timeline
from harness.plan.lanes import executor_of
from harness.plan.passage import passage
from harness.plan.training import TrainingStep
from harness.routing import Routing, make_routing
from harness.routing.corpus import python_corpus
from harness.specs import Experiment, Model
from harness.system import Case, Gradients, MoELayer, System
from harness.topology import Topology


class Training:
    """A GPT, its optimizer and its data: ``step`` on one rank of a job, or on all ranks' tokens at once."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        moe: Callable[[int, Weights], MoELayer | OracleLayer],
        *,
        ranks: list[int],  # whose tokens pass through this copy
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        heads: tuple[int, int] = (0, 1),  # this copy's part of each attention's heads, of so many
    ):
        self.experiment, self.topology, self.ranks, self.device = experiment, topology, ranks, device
        self.prescribed = experiment.workload.generator != "natural"
        self.tokens = experiment.workload.tokens(topology.num_ranks)
        self.gpt = steered_gpt(experiment, moe, dtype, device)
        if heads[1] > 1:
            for attention in self.attentions:
                attention.keep_heads(*heads)
        self.steered: list[Steered] = [m for m in self.gpt.modules() if isinstance(m, Steered)]
        routers = {id(p) for p in self.routers()} if self.prescribed else set()
        trained = [p for p in self.gpt.parameters() if id(p) not in routers]
        self.optimizer = adamw(trained, experiment.loss_scale)

    @property
    def attentions(self) -> list[Attention]:
        return [m for m in self.gpt.modules() if isinstance(m, Attention)]

    def routers(self) -> Iterator[nn.Parameter]:
        """Parameters of the MoE layers' gates, which all ranks share."""
        for steered in self.steered:
            if isinstance(steered.layer, MoELayer):
                yield from steered.layer.router_parameters()
            elif isinstance(steered.layer, OracleLayer):
                yield from (getattr(steered.layer.oracle, name) for name in steered.layer.oracle.gate_names)

    def prepare(self, step: int) -> torch.Tensor:
        """Untimed: clear gradients, set the step's routing -> tokens int64 [B, L + 1] of this copy's ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.routers():
            parameter.grad = None
        for steered in self.steered:
            if isinstance(steered.layer, MoELayer):
                steered.layer.step = step
            elif isinstance(steered.layer, OracleLayer):
                steered.layer.oracle.step = step
        if self.prescribed:
            for layer, steered in enumerate(self.steered):
                routing = make_routing(
                    self.experiment.workload, self.experiment.model, self.topology, step=step, layer=layer
                )
                assert routing is not None
                steered.ids = _ids(routing, self.ranks).to(self.device)
        return _batch(self.experiment.model, self.tokens, self.ranks, step).to(self.device)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """This copy's share of the job's mean cross-entropy in nats."""
        return self.loss_of(self.gpt(tokens[:, :-1]), tokens)

    def loss_of(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The same of logits [B, L, vocab]."""
        logits = logits.to(accumulator(logits.dtype))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / sum(self.tokens)


class Trainer:
    """A system's training on this rank, as a contender of a race: every step one plan (``harness.plan.training``).

    ``step``: steps done. It goes on from the last of ``checkpoints``, if there is one. ``num_calls``: after so many
    steps all layers must have been seen; None: one layer a step."""

    def __init__(
        self,
        job: Job,
        system: type[System],
        experiment: Experiment,
        checkpoints: Checkpoints | None = None,
        num_calls: int | None = None,
    ):
        self.job, self.experiment, self.step, self.last_loss, self.checkpoints = job, experiment, 0, np.nan, checkpoints
        self.system = system
        self.timeline: Timeline | None = None  # of the last step
        self.losses: dict[int, float] = {}  # by step
        self.at_once = at_once(experiment.model.num_moe_layers, num_calls)
        self.witnesses = Witnesses(experiment.model.num_moe_layers, self._witness, self.at_once)
        self.timed: dict[int, int] = {}  # steps, by repetition
        self.least: dict[int, np.ndarray | None] = {}  # by repetition
        self.seen = Held()  # of the last step, of the layers that were watched
        self.gradients: dict[int, Gradients] = {}  # of those layers, where experts move after the step
        self._watched_last: Collection[int] = ()
        self.skipped: set[int] = set()  # steps whose gradients overflowed, which updated nothing
        self.verdict = Verdict({"loss": 0.0})
        self.model_parallel = experiment.model_parallel and job.inner(0) is not None
        case = case_of(experiment, str(job.device))

        def moe(layer: int, weights: Weights) -> MoELayer:
            return system.build(case_of(experiment, str(job.device), layer=layer), job, weights)

        num_local = job.num_ranks // job.topology.shape[0]
        self.training = Training(
            experiment,
            job.topology,
            moe,
            ranks=[job.rank],
            dtype=TORCH_DTYPE[experiment.dtype],
            device=job.device,
            heads=(job.rank % num_local, num_local) if self.model_parallel else (0, 1),
        )
        for each in self.training.gpt.modules():
            if isinstance(each, (Attention, Ffn)):
                each.stand_in = case.stand_in_costs
        self.lanes = executor_of(job)
        every = self.training.attentions
        attentions = [
            [parameter for block in blocks for parameter in every[block].parameters()]
            for blocks in reversed(experiment.model.layers_of)
        ]
        over_all = job.world if job.num_ranks > 1 else None
        group, scope = (job.rail(0), "inter") if self.model_parallel else (over_all, "flat")
        self.stream = Stream(attentions, group, scope)
        layers: list[MoELayer] = [steered.layer for steered in self.training.steered]  # type: ignore[misc]
        shared = [*self.training.gpt.replicated_parameters(), *(p for each in layers for p in each.shared_parameters())]
        inside = {id(p) for part in attentions for p in part}
        replicated = {id(p): p for p in shared}
        self.summed = [p for key, p in replicated.items() if key not in inside]
        self.experts = [[p for p in each.parameters() if id(p) not in replicated] for each in layers]
        self.replicas = job.part(experiment.groups).replicas
        self.slices = system.place_gradients(layers[::-1], case, self.stream.part_bytes, scope)
        self.layers = layers
        self.after_step = system.after_step(layers, case, job)
        moves = self.after_step is not None
        self.updates = Updates(job, experiment, layers, self.training.optimizer, moves=moves)
        if checkpoints is not None:
            self.step = checkpoints.restore(self.training.gpt, self.training.optimizer, layers, self.after_step)

    def run(self, rep: int, watch: Stopwatch) -> list[Sample]:
        """One timed step; its loss is that of the whole job."""
        tokens, share, known = self.training.prepare(self.step), torch.zeros(()), self._known()

        def work() -> None:
            nonlocal share
            share = self._update(tokens, watched=self._watched)

        self.timed[rep] = step = self.step
        sample = watch.measure(rep, "total", work)
        sample.step = step
        sample.loss = self._see(share, known, f"timed repetition {rep}")
        if self.timed[rep] in self.skipped:
            remedy = "its gradients overflowed, so that nothing was updated; give a smaller loss_scale"
            self.verdict += Verdict({}, f"timed repetition {rep} is no whole step: {remedy}")
        self.least[rep] = self.witnesses[next(iter(self._watched_last))].least
        self._keep()
        return [sample]

    def warm_up(self) -> None:
        """A step, behind as many as a dynamic scale of the loss needs to settle."""
        while True:
            tokens, known = self.training.prepare(self.step), self._known()
            self._see(self._update(tokens, watched=self._watched), known, "warm-up")
            self._keep()
            if self.step - 1 not in self.skipped:
                break

    @property
    def _watched(self) -> list[int]:
        """The layers whose turn it is to be seen."""
        return turn(len(self.layers), self.step, self.at_once)

    def _known(self) -> dict[int, Known]:
        """Collective, outside the clock: weights of the watched layers ahead of the step."""
        if not self.step and self.experiment.compute == "real":
            tolerance = allowed(self.system, self.experiment.dtype)
            self.verdict += check_drawn(self.job, self.layers, self._weights, tolerance)
        watched, moves = self._watched, self.after_step is not None
        if self.experiment.compute == "real":
            self.updates.ahead(watched)
        return {layer: self.witnesses[layer].read(self.layers[layer], moves=moves) for layer in watched}

    def _weights(self, layer: int) -> Weights:
        return Weights(self.experiment.model, self.experiment.dtype, seed=self.experiment.workload.seed, layer=layer)

    def _witness(self, layer: int) -> LayerWitness:
        case, natural = case_of(self.experiment, str(self.job.device), layer=layer), not self.training.prescribed
        return LayerWitness(self.job, self.system, case, self._weights(layer), natural=natural, layer=layer)

    def _see(self, share: torch.Tensor, known: dict[int, Known], name: str) -> float:
        """Collective, outside the clock: what the step made -> its loss."""
        step, watched = self.step - 1, self._watched_last
        self.losses[step] = self.last_loss = self._job_loss(share)
        of_call = f"step {step} ({name})"
        gradients = self.gradients or {layer: self.layers[layer].gradients() for layer in watched}
        self.gradients = {}
        real, updated = self.experiment.compute == "real", step not in self.skipped
        if not updated:  # of an overflow backward makes what it likes
            for layer, what in [key for key in self.seen if key[1] in ("dy", "dx")]:
                self.seen.pop((layer, what))
        for layer in watched if real and updated else ():
            where = f"{of_call}, layer {layer}"
            self.verdict += check_updated(
                self.job, self.layers[layer], known[layer], gradients[layer], where, self.scale
            )
        if real and updated:
            self.verdict += self.updates.check(gradients, f"at {of_call}", self.scale)
        for i, layer in enumerate(watched):
            now, witness = known[layer], self.witnesses[layer]
            if step == 0:  # nothing has changed them yet: they must be those that were drawn
                now = dataclasses.replace(now, matrices=witness.weights.expert, gate={})
            self.verdict += witness.check(of_call, step, now, self.seen, gradients[layer], whole=i == 0)
        if not np.isfinite(self.last_loss):
            self.verdict += Verdict({"loss": np.inf}, f"the loss of {of_call} is {self.last_loss}")
        return self.last_loss

    def check(self) -> Verdict:
        verdict, self.verdict = self.verdict, Verdict({"loss": 0.0})
        return verdict

    def known_cases(self, rep: int) -> list[Case]:
        if not self.training.prescribed:
            return []
        device, step = str(self.job.device), self.timed[rep]
        return [case_of(self.experiment, device, layer=layer, step=step) for layer in range(len(self.layers))]

    def least_rows(self, rep: int) -> np.ndarray | None:
        return self.least.get(rep)

    def timelines(self) -> dict[str, Timeline]:
        return {} if self.timeline is None else {"step": self.timeline}

    def keep(self) -> list[torch.Tensor]:
        self.training.gpt.zero_grad(set_to_none=True)
        state = [
            value for of in self.training.optimizer.state.values() for value in of.values() if torch.is_tensor(value)
        ]
        return [*self.training.gpt.parameters(), *self.training.gpt.buffers(), *state, self.stream.buffer]

    def memory(self) -> tuple[dict[str, float], dict[str, float]]:
        """Collective: bytes of this rank by part, measured over one more step and planned for it."""
        return memory.measured(self), memory.planned(self)

    def close(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.remove()

    def _keep(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(self.step, self.training.gpt, self.training.optimizer, self.layers, self.after_step)

    def _update(
        self, tokens: torch.Tensor, run: Callable[[Plan], Timeline] | None = None, watched: Collection[int] = ()
    ) -> torch.Tensor:
        training = self.training
        self.scale = training.optimizer.scale if isinstance(training.optimizer, ScaledAdamW) else 1.0
        step = TrainingStep(
            training.gpt,
            self.job,
            [passage(layer) for layer in self.layers],
            [steered.steer for steered in training.steered],
            self.stream,
            self.slices,
            self.summed,
            experts=self.experts,
            replicas=self.replicas,
            model_parallel=self.model_parallel,
            watched=watched,
        )
        number, after_step = self.step, self.after_step

        def move() -> None:
            assert after_step is not None
            # As views, while experts are where these were made.
            self.gradients = {layer: self.layers[layer].gradients() for layer in watched}
            after_step(training.optimizer, number)

        plan = step.plan(
            tokens[:, :-1],
            lambda logits: training.loss_of(logits, tokens),
            training.optimizer.step,
            None if after_step is None else move,
            self.scale,
        )
        with contextlib.nullcontext() if self.checkpoints is None else self.checkpoints.noting(self.step):
            self.timeline = (run or self.lanes.run)(plan)
        for layer in self.layers:
            layer.timeline = self.timeline
        self.seen, self._watched_last = step.seen, watched
        if isinstance(training.optimizer, ScaledAdamW) and training.optimizer.skipped:
            self.skipped.add(self.step)
        self.step += 1
        return step.loss

    def _job_loss(self, share: torch.Tensor) -> float:
        total = share.double().reshape(1).clone()
        if self.job.num_ranks > 1:
            dist.all_reduce(total)
        return float(total)


def _ids(routing: Routing, ranks: list[int]) -> torch.Tensor:
    return torch.as_tensor(np.concatenate([routing.of_rank(rank) for rank in ranks]).astype(np.int64))


def _batch(model: Model, tokens: tuple[int, ...], ranks: list[int], step: int) -> torch.Tensor:
    """Bytes of the sources that ship with Python, another passage for every rank and step; int64 [B, L + 1]."""
    windows = [
        python_corpus().sample(np.random.default_rng([step, rank]), tokens[rank] // model.seq, model.seq + 1)
        for rank in ranks
    ]
    return torch.as_tensor(np.concatenate(windows) % model.vocab)
