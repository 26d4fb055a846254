"""The layout of an experiment: how its ranks are divided.

``expert_parallel`` ranks (EP) hold every expert once. Where they are fewer than all, there are several such groups,
each with tokens of its own, and every expert has a replica in each: its gradients are summed over these, as those of
dense parameters are over all ranks. ``tensor_parallel``: ranks that share the heads of an attention, all of a node.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from harness.errors import bad
from harness.groups import Groups
from harness.spec import Count, Spec
from harness.topology import Topology

#: fields that are checked, kept and told, and do nothing yet: why, in words
UNBUILT = {
    "pipeline_parallel": "pipeline stages are neither run nor priced",
    "zero": "the optimizer's state is not sharded over replicas",
    "micro_batches": "a step is one batch, of which no gradients are accumulated",
    "recompute": "activations are kept for the backward",
}


class Layout(Spec):
    """``expert_parallel``: None stands for all ranks (of a pipeline stage); ``data_parallel``: replicas of each expert,
    None: what remains. ``expert_placement_order``: whether groups fill node after node, or have a part of each."""

    expert_parallel: Count | None = None
    tensor_parallel: Annotated[int, Field(ge=1, exclude=True)] = 1  # kept as ``Experiment.model_parallel``
    pipeline_parallel: Count = 1
    data_parallel: Count | None = None
    expert_placement_order: Literal["inside_node_first", "across_nodes"] = "inside_node_first"
    zero: Literal[0, 1] = 0
    micro_batches: Count = 1
    recompute: Literal["none", "moe", "full"] = "none"

    LATER: ClassVar[tuple[str, ...]] = (
        "expert_parallel", "pipeline_parallel", "data_parallel", "expert_placement_order", "zero", "micro_batches",
        "recompute",
    )  # fmt: skip

    def on(self, topology: Topology) -> Layout:
        """The same as it is written in its one way for these ranks: what follows from the rest is left out.
        ``UserError`` where they cannot be divided so."""
        num_ranks, num_local = topology.num_ranks, topology.num_ranks // topology.shape[0]
        if self.tensor_parallel not in (1, num_local):
            remedy = f"heads are shared out over all ranks of a node or over none; give 1 or {num_local}"
            raise bad("layout.tensor_parallel", self.tensor_parallel, remedy)
        stages, replicas = self.pipeline_parallel, self.data_parallel
        size = self.expert_parallel or max(1, num_ranks // (stages * (replicas or 1)))
        replicas = replicas or max(1, num_ranks // (size * stages))
        if size * stages * replicas != num_ranks:
            field = "data_parallel" if self.data_parallel else "expert_parallel"
            product = f"{size} (expert) x {stages} (pipeline) x {replicas} (data) are not the {num_ranks} ranks"
            raise bad(f"layout.{field}", getattr(self, field), f"{product}; give degrees whose product they are")
        try:
            Groups.of(topology, size, self.expert_placement_order == "across_nodes")
        except ValueError as error:
            raise bad("layout.expert_parallel", size, str(error)) from None
        update: dict[str, object] = {"data_parallel": None, "expert_parallel": size}
        if size * stages == num_ranks:
            update |= {"expert_parallel": None, "expert_placement_order": "inside_node_first"}
        return self.model_copy(update=update)

    def groups(self, topology: Topology) -> Groups | None:
        """Expert-parallel groups; None where all ranks are one."""
        if self.expert_parallel is None:
            return None
        return Groups.of(topology, self.expert_parallel, self.expert_placement_order == "across_nodes")

    @property
    def changed(self) -> dict[str, int | str]:
        """Fields that are not as they are by default."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in found.items() if value != type(self).model_fields[name].default}

    @property
    def refused(self) -> str | None:
        """Why nobody runs or prices it yet, in words; None where it is built."""
        for name, value in self.changed.items():
            if name in UNBUILT:
                return f"layout.{name} = {value} is not built: {UNBUILT[name]}; leave it out"
        return None


__all__ = ["Layout"]
