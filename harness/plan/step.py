"""A step of a whole GPT as one plan, laid out once for what runs (``harness.plan.training``, ``serving``) and for what
is priced (``harness.plan.priced``).

    training   embedding, every layer's attention and MoE part, head and loss, backward through them all, the sum of
               replicated gradients where the system puts it, optimizer, what moves between steps
    serving    embedding, every layer's attention and MoE part, head

A layer without experts (``Model.num_dense_layers``, ``moe_every``) is part of what lies before the next one that has
some: its attention, and its FFN as one task. Attention is replicated (data parallelism over all ranks), or its heads
are shared out over the ranks of a node (model parallelism inside nodes, data parallelism across): then tokens are
gathered in the node before it, and partial sums scattered after it.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

from harness.plan.gradients import GradientBytes
from harness.plan.graph import COMPUTE, INTER, INTRA, Plan, Price, Work
from harness.plan.passage import Dense, Direction, Passage, backward_layer, forward_layer
from harness.system import GradientSlices

#: of an attention whose heads are shared out, in forward; backward goes through them from ``residual`` to ``norm``
SHARED = {"norm": COMPUTE, "mp-gather": INTRA, "attention": COMPUTE, "mp-scatter": INTRA, "residual": COMPUTE}


class StepTasks(abc.ABC):
    """``passages``: of the MoE layers; ``layers_of``: each of them and the dense ones before it, as ``Model`` has them;
    ``shares_attention``: heads are shared out inside nodes."""

    passages: Sequence[Passage]
    layers_of: Sequence[range]
    shares_attention: bool

    @abc.abstractmethod
    def work(self, task: str) -> Work:
        """Of a task outside the layers."""

    @abc.abstractmethod
    def dense_work(self, block: int, direction: Direction, task: str) -> Work:
        """Of a task of layer ``block`` among all layers: ``attention`` or one of ``SHARED``; ``ffn`` of a dense one."""

    def dense(self, layer: int, direction: Direction) -> list[Dense]:
        """What lies between the experts of MoE layer ``layer`` and those before it."""
        lanes = SHARED if self.shares_attention else {"attention": COMPUTE}
        names, blocks = list(lanes), self.layers_of[layer]
        if direction == "backward" and self.shares_attention:  # gathers gradients first, scatters their sums
            names = ["residual", "mp-gather", "attention", "mp-scatter", "norm"]
        found = []
        for block in blocks if direction == "forward" else blocks[::-1]:
            tasks, prefix = names, ""
            if block != blocks[-1]:
                tasks, prefix = [*names, "ffn"] if direction == "forward" else ["ffn", *names], f"dense{block}."
            found += [
                Dense(f"{prefix}{name}", lanes.get(name, COMPUTE), self.dense_work(block, direction, name))
                for name in tasks
            ]
        return found

    def forward(self, plan: Plan) -> list[str]:
        """Up to the head."""
        last = [plan.put("embedding", COMPUTE, (), self.work("embedding"))]
        for i, way in enumerate(self.passages):
            dense = self.dense(i, "forward")
            last = forward_layer(plan, way.forward, dense, ahead=way.ahead, prefix=f"layer{i}.", after=last)
        return [plan.put("head", COMPUTE, last, self.work("head"))]


class ServingTasks(StepTasks):
    def lay_out(self) -> Plan:
        plan = Plan()
        self.forward(plan)
        return plan


class TrainingTasks(StepTasks):
    """``stream``: of the attentions' gradients; ``slices``: of it in each layer's backward, last layer first;
    ``moves``: whether something is done behind the optimizer; ``sums_replicas``: whether experts have replicas in other
    expert-parallel groups, whose gradients are summed in the tail."""

    stream: GradientBytes
    slices: Sequence[GradientSlices]
    moves: bool
    sums_replicas: bool = False

    @abc.abstractmethod
    def tail(self, of_stream: Work | None) -> Work:
        """Of what is summed over ranks behind backward: what no slice took, and all other replicated gradients."""

    def lay_out(self, price: Price = lambda cost: cost) -> Plan:
        """``price``: what costs become as soon as they are laid out."""
        plan, num_layers = Plan(price=price), len(self.passages)
        self.passages[-1].turns = True
        awaited: list[str] = []
        last = self.forward(plan)
        for i in reversed(range(num_layers)):
            last = self._backward_layer(plan, i, last, awaited)
        last = [plan.put("embedding.backward", COMPUTE, last, self.work("embedding_back"), "embedding")]
        tail = self.tail(self.stream.take("gradients-tail", self.stream.left_bytes, after_part=num_layers))
        # what is summed over replicas must be whole in its group
        whole = [*last, *awaited] if self.sums_replicas else last
        last = [plan.put("gradients-tail", INTER, whole, tail, "gradients")]
        last = [plan.put("optimizer", COMPUTE, [*last, *awaited], self.work("optimizer"))]
        if self.moves:
            plan.put("after-step", INTER, last, self.work("after_step"))
        return plan

    def _backward_layer(self, plan: Plan, i: int, after: list[str], awaited: list[str]) -> list[str]:
        """``awaited``: gets the tasks that the optimizer waits for beside the sums of gradients."""
        way, back = self.passages[i], len(self.passages) - 1 - i
        prefix, (in_moe, beside_dense, behind) = f"layer{i}.", self.slices[back].num_bytes
        counts, take = self.slices[back].messages, self.stream.take

        def beside() -> None:
            awaited.extend(way.behind(plan, f"{prefix}backward."))
            if i:
                self.passages[i - 1].ahead_back(plan, f"layer{i - 1}.backward.")

        return backward_layer(
            plan,
            way.backward,
            self.dense(i, "backward"),
            in_moe=take(f"{prefix}backward.gradients", in_moe, counts[0], after_part=back),
            beside_dense=take(f"{prefix}backward.gradients-dense", beside_dense, counts[1], after_part=back),
            after_layer=take(f"{prefix}backward.gradients-after", behind, counts[2], after_part=back + 1),
            beside=beside,
            prefix=prefix,
            after=after,
        )


__all__ = ["SHARED", "ServingTasks", "StepTasks", "TrainingTasks"]
