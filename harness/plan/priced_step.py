"""A whole step, priced: the tasks of ``harness.plan.step`` with what they cost. The last axis is that of the ranks.

What is the same under every system (embedding, attention, head, replicated gradients, optimizer) is said here; the MoE
layers bring their own tasks (``System.layout``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.layer.work import ATTENTION_GEMMS, attention_parameters, head_macs, model_attention_macs
from harness.memory import OPTIMIZER_STATES, expert_bytes, optimizer_accesses, rest_parameters, state_bytes
from harness.plan.cost import Compute, Cost, Even, InTurn, scope_of
from harness.plan.gradients import GradientBytes
from harness.plan.graph import Work
from harness.plan.passage import Direction, Passage
from harness.plan.priced import ffn_work
from harness.plan.step import ServingTasks, StepTasks, TrainingTasks
from harness.specs import DTYPE_BYTES, Experiment
from harness.system import Case, GradientSlices
from harness.topology import Topology

Array = np.ndarray


class PricedStep(StepTasks):
    """``passages``: priced, first layer first."""

    def __init__(self, experiment: Experiment, passages: Sequence[Passage]):
        self.experiment, self.model, self.passages = experiment, experiment.model, passages
        self.topology, self.layers_of = Topology(experiment.cluster.shape), self.model.layers_of
        self.width = DTYPE_BYTES[experiment.dtype]
        self.num_local = self.topology.num_ranks // self.topology.shape[0]
        self.shares_attention = experiment.model_parallel and self.num_local > 1
        self.tokens = np.asarray(experiment.workload.tokens(self.topology.num_ranks), dtype=np.float64)

    def work(self, task: str) -> Work:
        row_bytes = self.model.hidden * self.width * self.tokens
        match task:
            case "embedding" | "embedding_back":
                return Work(Compute(np.zeros(len(self.tokens)), 1, 2 * row_bytes))
            case "head":
                training = self.experiment.phase == "train_step"  # there with its backward, which is twice as much
                macs = (3 if training else 1) * head_macs(self.model) * self.tokens
                return Work(Compute(macs, 3 if training else 1, row_bytes))
        return Work(self.outside(task))

    def outside(self, task: str) -> Cost | None:
        """Of a task that serving has not."""
        raise AssertionError(task)

    def dense_work(self, block: int, direction: Direction, task: str) -> Work:
        if task in ("mp-gather", "mp-scatter"):
            num_bytes = self.num_local * self.model.hidden * self.width * self._of_node(self.tokens)
            return Work(Even("ag" if task == "mp-gather" else "rs", "intra", num_bytes))
        times = {"forward": 1, "backward": 2}[direction]
        if task == "ffn":
            size, rows = self.model.dense_ffn or 0, self.tokens[:, None]
            return Work(ffn_work(self.model, size, rows, self.experiment.dtype, direction))
        if task != "attention":
            return Work()
        return Work(Compute(times * self.attention(block), times * ATTENTION_GEMMS))

    def attention(self, layer: int) -> Array:
        """Multiply-adds of a forward, [W]."""
        phase, stand_in = self.experiment.phase, self.experiment.compute == "stand-in"
        causal = phase == "prefill" or (phase == "train_step" and not stand_in)
        tokens, parts = self.tokens, 1
        if self.shares_attention:  # those of all ranks of the node, through some of the heads
            parts = self.num_local
            tokens = parts * self._of_node(tokens)
        return np.asarray(model_attention_macs(self.model, tokens, causal=causal, layer=layer)) / parts

    def _of_node(self, amounts: Array) -> Array:
        """Mean over the ranks of each rank's node, [W]."""
        return amounts.reshape(-1, self.num_local).mean(1).repeat(self.num_local)


class PricedServing(PricedStep, ServingTasks):
    pass


class PricedTraining(PricedStep, TrainingTasks):
    """``slices``: of the attentions' gradients, last layer first; ``num_own`` [W]: experts that each rank keeps, over
    all layers; ``moves``: what happens behind the optimizer, None: nothing does; ``has_moves``: there is a task for it
    all the same."""

    def __init__(
        self,
        experiment: Experiment,
        passages: Sequence[Passage],
        slices: Sequence[GradientSlices],
        num_own: Array,
        moves: Cost | None = None,
        *,
        has_moves: bool = False,
    ):
        super().__init__(experiment, passages)
        self.slices, self.moves, self._moved = slices, has_moves, moves
        self.stream = gradient_bytes(experiment)
        self.num_own = np.asarray(num_own)
        self.sums_replicas = experiment.groups is not None

    def outside(self, task: str) -> Cost | None:
        match task:
            case "optimizer":
                known = {own: state_bytes(self.experiment, self.topology, own) for own in set(self.num_own.tolist())}
                state = np.array([known[own]["optimizer"] for own in self.num_own.tolist()])
                dtype = self.experiment.dtype
                parameters = state / OPTIMIZER_STATES[dtype]
                update = Compute(np.zeros(len(state)), 1, optimizer_accesses(dtype) * parameters)
                # Ranks of float16 agree on whether all gradients are numbers.
                return InTurn((Even("ar", "flat", 4), update)) if dtype == "float16" else update
            case "after_step":
                return self._moved
        return super().outside(task)

    def tail(self, of_stream: Work | None) -> Work:
        model, wide = self.model, max(4, self.width)
        rest = rest_parameters(model) * self.width
        routers = model.num_moe_layers * model.hidden * model.num_experts * wide
        sums = [Even("ar", "flat", num_bytes) for num_bytes in (rest, routers)]
        if (groups := self.experiment.groups) is not None:
            experts, scope = expert_bytes(model, self.experiment.dtype), scope_of(*groups.replicas, self.topology.shape)
            sums.append(Even("ar", scope, self.num_own * experts, model.num_moe_layers))
        first = [] if of_stream is None or of_stream.cost is None else [of_stream.cost]
        return Work(InTurn((*first, *sums)))


def gradient_bytes(experiment: Experiment) -> GradientBytes:
    """Of the attentions, last layer first."""
    topology, model, width = Topology(experiment.cluster.shape), experiment.model, DTYPE_BYTES[experiment.dtype]
    num_local = topology.num_ranks // topology.shape[0]
    parts = num_local if experiment.model_parallel and num_local > 1 else 1
    scope = "inter" if parts > 1 else "flat"
    each = attention_parameters(model) // parts * width
    return GradientBytes([len(blocks) * each for blocks in reversed(model.layers_of)], width, scope)


def own_experts(cases: Sequence[Case]) -> Array:
    """Experts and copies that each rank keeps, over all layers, int [W]."""
    return np.sum([case.placement.hosts.sum(0) for case in cases], axis=0)


__all__ = ["PricedServing", "PricedStep", "PricedTraining", "gradient_bytes", "own_experts"]
