"""Expert-sharding parallelism (ESP): every expert is cut along its FFN dimension over the ranks of a node.

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

from harness.comm.handover import Handover, Held
from harness.comm.rows import accumulator
from harness.layer.weights import Weights
from harness.plan.graph import Work
from methods.fsmoe.hooks import Hooks
from methods.fsmoe.mesh import Mesh
from methods.fsmoe.schedule import Sizes


class Shards(nn.Module):
    """This rank's shard of its EP group's experts: ``w1`` (and ``w3``) [E_ep, M, H / N_ESP], ``w2``
    [E_ep, H / N_ESP, M]."""

    def __init__(self, weights: Weights, mesh: Mesh, device: torch.device):
        super().__init__()
        self.mesh = mesh
        num_experts = weights.model.num_experts // mesh.num_ep
        self.experts = range(mesh.ep_index * num_experts, (mesh.ep_index + 1) * num_experts)
        drawn = [weights.expert(e) for e in self.experts]
        self.names = ("w1", "w2", "w3") if weights.model.ffn_type == "swiglu" else ("w1", "w2")
        for name in self.names:
            whole = torch.stack([w[name] for w in drawn])
            shard = whole.chunk(mesh.num_esp, dim=1 if name == "w2" else 2)[mesh.esp_index].contiguous()
            self.register_parameter(name, nn.Parameter(shard.to(device)))

    def how(self) -> str:
        return "one batched GEMM over padded slots"

    def gradients(self) -> dict[int, dict[str, torch.Tensor]]:
        """Collective over the ESP group: whole gradients of its experts, put together from the shards."""
        found: dict[int, dict[str, torch.Tensor]] = {e: {} for e in self.experts}
        for name in self.names:
            parameter = getattr(self, name)
            own = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).contiguous()
            parts = [own]
            if self.mesh.esp_group is not None:
                parts = [torch.empty_like(own) for _ in range(self.mesh.num_esp)]
                dist.all_gather(parts, own, group=self.mesh.esp_group)
            whole = torch.cat(parts, dim=1 if name == "w2" else 2)
            for e, gradient in zip(self.experts, whole, strict=True):
                found[e][name] = gradient
        return found


class Travel(Handover, abc.ABC):
    """A walk that really moves bytes: ``source`` [E, C, M] -> ``result`` [E, C, M]. Subclasses say what the experts do
    with a chunk. ``weights``: of ``Shards``, none for identity experts. ``sizes``: as planned, of a C that the routing
    may exceed; where they have a ``wait_s`` experts wait so long instead, and rows go home as they came.

    Its tasks are laid out before there is a source; ``start`` brings it."""

    def __init__(self, mesh: Mesh, hooks: Hooks, sizes: Sizes, degree: int, weights: Sequence[torch.Tensor]):
        self.sizes, self.degree = sizes, degree
        self.mesh, self.hooks, self.weights = mesh, hooks, weights
        self._held = Held()  # what a chunk's last task left for its next

    def start(self, source: torch.Tensor) -> None:
        num_experts, capacity, hidden = source.shape
        if capacity % self.degree:
            raise ValueError(f"degree {self.degree} does not divide the capacity {capacity}; pad it")
        self.source, self.result = source, torch.empty_like(source)
        self.width = capacity // self.degree
        # of a chunk that one rank sends
        self.shape = (self.mesh.num_ep, num_experts // self.mesh.num_ep, self.width, hidden)

    @abc.abstractmethod
    def compute(self, chunk: slice, rows: torch.Tensor) -> torch.Tensor:
        """rows [E_ep, N, c, M] of the slots ``chunk`` -> as many: this shard's partial sums for the job's N ranks."""

    def dispatch(self, chunk: int) -> Work:
        @torch.no_grad()
        def run() -> None:
            parts = self.source[:, self._slots(chunk)].contiguous().view(self.shape)
            parts = self.mesh.across(self.hooks.before_dispatch(parts))
            self._held[chunk] = self.hooks.after_dispatch(parts)

        return Work(run=run)

    def gather(self, chunk: int) -> Work:
        @torch.no_grad()
        def run() -> None:
            own = self._held[chunk]
            if self.mesh.esp_group is not None:
                gathered = own.new_empty(self.mesh.num_esp, *own.shape)
                dist.all_gather_into_tensor(gathered.flatten(0, -2), own.flatten(0, -2), self.mesh.esp_group)
                self._held[chunk] = gathered

        return Work(run=run)

    def experts(self, chunk: int) -> Work:
        @torch.no_grad()
        def run() -> None:
            if self.sizes.wait_s is not None:
                time.sleep(self.sizes.chunk_wait_s(self.degree))
                return
            arrived = self._held[chunk].view(self.mesh.num_esp, *self.shape)  # [N_ESP, N_EP, E_ep, c, M]
            rows = arrived.permute(2, 0, 1, 3, 4).flatten(1, 2)
            made = self.compute(self._slots(chunk), rows)
            back = made.view(self.shape[1], self.mesh.num_esp, self.mesh.num_ep, *self.shape[2:])
            self._held[chunk] = back.permute(1, 2, 0, 3, 4).contiguous()

        return Work(run=run)

    def scatter(self, chunk: int) -> Work:
        @torch.no_grad()
        def run() -> None:
            partial = self._held[chunk]
            if self.mesh.esp_group is not None:
                own = partial.new_empty(self.shape)
                dist.reduce_scatter_tensor(own.flatten(0, -2), partial.flatten(0, -2), group=self.mesh.esp_group)
                self._held[chunk] = own

        return Work(run=run)

    def combine(self, chunk: int) -> Work:
        @torch.no_grad()
        def run() -> None:
            parts = self.hooks.before_combine(self._held.pop(chunk).view(self.shape))
            home = self.hooks.after_combine(self.mesh.across(parts))
            self.result[:, self._slots(chunk)] = home.view(-1, *self.shape[2:])

        return Work(run=run)

    def _slots(self, chunk: int) -> slice:
        return slice(chunk * self.width, (chunk + 1) * self.width)


class Forward(Travel):
    """Keeps ``x`` [E_ep, N, C, M] and pre-activations [E_ep, N, C, H / N_ESP] of all N ranks' slots for backward."""

    def start(self, source: torch.Tensor) -> None:
        super().start(source)
        num_experts, capacity, hidden = source.shape
        shape = (num_experts // self.mesh.num_ep, self.mesh.num_ep * self.mesh.num_esp, capacity)
        if self.weights and self.sizes.wait_s is None:
            self.x = source.new_empty(*shape, hidden)
            self.pre = [source.new_empty(*shape, self.weights[0].shape[2]) for _ in self.weights[1:]]

    def compute(self, chunk: slice, rows: torch.Tensor) -> torch.Tensor:
        if not self.weights:
            return rows / self.mesh.num_esp  # identity experts: the shards' sum is the row again
        self.x[:, :, chunk] = rows
        flat = rows.flatten(1, 2)  # [E_ep, N c, M]
        w1, w2, *w3 = self.weights
        pre = [flat @ w for w in (w1, *w3)]
        for kept, values in zip(self.pre, pre, strict=True):
            kept[:, :, chunk] = values.view(*rows.shape[:3], -1)
        return (activate(pre) @ w2).view(rows.shape)


class Backward(Travel):
    """From the gradient of the forward walk's result to that of its source; ``dweights`` are summed over chunks."""

    def __init__(self, forward: Forward, sizes: Sizes, degree: int):
        super().__init__(forward.mesh, forward.hooks, sizes, degree, forward.weights)
        self.forward = forward

    def start(self, source: torch.Tensor) -> None:
        super().start(source)
        self.dweights = [torch.zeros_like(w, dtype=accumulator(w.dtype)) for w in self.weights]

    def compute(self, chunk: slice, rows: torch.Tensor) -> torch.Tensor:
        if not self.weights:
            return rows / self.mesh.num_esp
        w1, w2, *w3 = self.weights
        dw1, dw2, *dw3 = self.dweights
        dy = rows.flatten(1, 2)  # [E_ep, N c, M]
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
