"""Expert-sharding parallelism (ESP): every expert of a node is cut along its FFN dimension over the node's ranks.

Tokens lie in capacity slots [E, C, M] (``harness.layer.order``). A ``Walk`` takes them, chunk by chunk of the capacity,
across nodes (ranks with equal local index), into every rank of the node, through this rank's shard of each expert, and
back: partial outputs are summed by the reduce-scatter. Forward and backward may be cut differently, because what
forward keeps (inputs and pre-activations) lies in whole buffers that backward slices again.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from harness.comm.exchange import all_to_all
from harness.comm.job import Job
from harness.comm.rows import accumulator
from harness.layer.weights import Weights
from methods.fsmoe.schedule import Priced, Sizes, Work


class Shards(nn.Module):
    """This rank's shard of its node's experts, L ranks a node: ``w1`` (and ``w3``) [E_node, M, H / L], ``w2``
    [E_node, H / L, M]."""

    def __init__(self, weights: Weights, job: Job):
        super().__init__()
        self.ffn_type = weights.model.ffn_type
        nodes, here = job.topology.shape[0], int(job.topology.unit_of(0)[job.rank])
        self.group = job.inner(0)
        self.num_local = job.num_ranks // nodes
        place = job.rank % self.num_local
        num_experts = weights.model.num_experts // nodes
        self.experts = range(here * num_experts, (here + 1) * num_experts)
        drawn = [weights.expert(e) for e in self.experts]
        self.names = ("w1", "w2", "w3") if self.ffn_type == "swiglu" else ("w1", "w2")
        for name in self.names:
            whole = torch.stack([w[name] for w in drawn])
            shard = whole.chunk(self.num_local, dim=1 if name == "w2" else 2)[place].contiguous()
            self.register_parameter(name, nn.Parameter(shard.to(job.device)))

    def gradients(self) -> dict[int, dict[str, torch.Tensor]]:
        """Collective over the node: whole gradients of its experts, put together from the shards."""
        found: dict[int, dict[str, torch.Tensor]] = {e: {} for e in self.experts}
        for name in self.names:
            parameter = getattr(self, name)
            own = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).contiguous()
            parts = [own]
            if self.group is not None:
                parts = [torch.empty_like(own) for _ in range(self.num_local)]
                dist.all_gather(parts, own, group=self.group)
            whole = torch.cat(parts, dim=1 if name == "w2" else 2)
            for e, gradient in zip(self.experts, whole, strict=True):
                found[e][name] = gradient
        return found


class Travel(Priced, abc.ABC):
    """A walk that really moves bytes: ``source`` [E, C, M] -> ``result`` [E, C, M], ``degree`` chunks of C.

    Subclasses say what the experts do with a chunk. With ``wait_s`` they only take as long as a profiled device would,
    so that two cores can stand for eight GPUs, and rows go home as they came.
    """

    def __init__(
        self,
        job: Job,
        source: torch.Tensor,
        degree: int,
        gemms: int,
        hidden_shard: int,
        wait_s: tuple[float, float] | None = None,
    ):
        self.rail, self.inner = job.rail(0), job.inner(0)
        self.nodes = job.topology.shape[0]
        self.num_local = job.num_ranks // self.nodes
        num_experts, capacity, hidden = source.shape
        if capacity % degree:
            raise ValueError(f"degree {degree} does not divide the capacity {capacity}; pad it")
        slot_bytes = source.numel() * source.element_size()
        macs = gemms * self.num_local * source.numel() * hidden_shard
        super().__init__(Sizes(slot_bytes, self.num_local, macs, gemms, wait_s), degree)
        self.source, self.result = source, torch.empty_like(source)
        self.width = capacity // degree
        self.shape = (self.nodes, num_experts // self.nodes, self.width, hidden)  # of a chunk that one rank sends
        self._held: dict[int, torch.Tensor] = {}  # what a chunk's last task left for its next

    @abc.abstractmethod
    def compute(self, chunk: slice, rows: torch.Tensor) -> torch.Tensor:
        """rows [E_node, N, c, M] of the slots ``chunk`` -> as many: this shard's partial sums for the job's N ranks."""

    def dispatch(self, chunk: int) -> Work:
        def run() -> None:
            self._held[chunk] = self._across(self.source[:, self._slots(chunk)].contiguous().view(self.shape))

        return Work(super().dispatch(chunk).cost, run)

    def gather(self, chunk: int) -> Work:
        def run() -> None:
            own = self._held[chunk]
            if self.inner is not None:
                gathered = own.new_empty(self.num_local, *own.shape)
                dist.all_gather_into_tensor(gathered.flatten(0, -2), own.flatten(0, -2), self.inner)
                self._held[chunk] = gathered

        return Work(super().gather(chunk).cost, run)

    def experts(self, chunk: int) -> Work:
        def run() -> None:
            if self.sizes.wait_s is not None:
                time.sleep(self.sizes.chunk_wait_s(self.degree))
                return
            arrived = self._held[chunk].view(self.num_local, *self.shape)  # [L, nodes, E_node, c, M]
            rows = arrived.permute(2, 0, 1, 3, 4).flatten(1, 2)
            made = self.compute(self._slots(chunk), rows)
            back = made.view(self.shape[1], self.num_local, self.nodes, *self.shape[2:])
            self._held[chunk] = back.permute(1, 2, 0, 3, 4).contiguous()

        return Work(super().experts(chunk).cost, run)

    def scatter(self, chunk: int) -> Work:
        def run() -> None:
            partial = self._held[chunk]
            if self.inner is not None:
                own = partial.new_empty(self.shape)
                dist.reduce_scatter_tensor(own.flatten(0, -2), partial.flatten(0, -2), group=self.inner)
                self._held[chunk] = own

        return Work(super().scatter(chunk).cost, run)

    def combine(self, chunk: int) -> Work:
        def run() -> None:
            home = self._across(self._held.pop(chunk).view(self.shape))
            self.result[:, self._slots(chunk)] = home.view(-1, *self.shape[2:])

        return Work(super().combine(chunk).cost, run)

    def _slots(self, chunk: int) -> slice:
        return slice(chunk * self.width, (chunk + 1) * self.width)

    def _across(self, parts: torch.Tensor) -> torch.Tensor:
        """[nodes, ...] to and from the ranks of the other nodes with this one's local index."""
        return all_to_all(parts, [1] * self.nodes, [1] * self.nodes, self.rail)[0]


class Forward(Travel):
    """``weights``: of ``Shards``, none for identity experts. Keeps ``x`` [E_node, N, C, M] and the pre-activations
    [E_node, N, C, H / L] for backward."""

    def __init__(
        self,
        job: Job,
        source: torch.Tensor,
        degree: int,
        weights: Sequence[torch.Tensor],
        wait_s: tuple[float, float] | None = None,
    ):
        super().__init__(job, source, degree, len(weights), weights[0].shape[2] if weights else 0, wait_s)
        self.weights = weights
        num_experts, capacity, hidden = source.shape
        shape = (num_experts // self.nodes, job.num_ranks, capacity)
        if weights and wait_s is None:
            self.x = source.new_empty(*shape, hidden)
            self.pre = [source.new_empty(*shape, weights[0].shape[2]) for _ in weights[1:]]

    def compute(self, chunk: slice, rows: torch.Tensor) -> torch.Tensor:
        if not self.weights:
            return rows / self.num_local  # identity experts: the shards' sum is the row again
        self.x[:, :, chunk] = rows
        flat = rows.flatten(1, 2)  # [E_node, N c, M]
        w1, w2, *w3 = self.weights
        pre = [flat @ w for w in (w1, *w3)]
        for kept, values in zip(self.pre, pre, strict=True):
            kept[:, :, chunk] = values.view(*rows.shape[:3], -1)
        return (activate(pre) @ w2).view(rows.shape)


class Backward(Travel):
    """From the gradient of the forward walk's result to that of its source; ``dweights`` are summed over chunks."""

    def __init__(
        self, job: Job, dresult: torch.Tensor, degree: int, forward: Forward, wait_s: tuple[float, float] | None = None
    ):
        weights = forward.weights
        super().__init__(job, dresult, degree, 2 * len(weights), weights[0].shape[2] if weights else 0, wait_s)
        self.forward = forward
        self.dweights = [torch.zeros_like(w, dtype=accumulator(w.dtype)) for w in weights]

    def compute(self, chunk: slice, rows: torch.Tensor) -> torch.Tensor:
        if not self.forward.weights:
            return rows / self.num_local
        w1, w2, *w3 = self.forward.weights
        dw1, dw2, *dw3 = self.dweights
        dy = rows.flatten(1, 2)  # [E_node, N c, M]
        x = self.forward.x[:, :, chunk].flatten(1, 2)
        pre = [kept[:, :, chunk].flatten(1, 2).requires_grad_() for kept in self.forward.pre]
        with torch.enable_grad():
            hidden = activate(pre)
        dpre = torch.autograd.grad(hidden, pre, dy @ w2.mT)
        dw2 += hidden.detach().mT @ dy
        dx = torch.zeros_like(dy)
        for w, dw, d in zip((w1, *w3), (dw1, *dw3), dpre, strict=True):
            dw += x.mT @ d
            dx += d @ w.mT
        return dx.view(rows.shape)


def activate(pre: Sequence[torch.Tensor]) -> torch.Tensor:
    """gpt: gelu of the one; swiglu: silu of the first times the second."""
    return F.gelu(pre[0]) if len(pre) == 1 else F.silu(pre[0]) * pre[1]
