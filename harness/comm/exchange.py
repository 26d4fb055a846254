"""The exchange: how tokens travel to experts and back, and the flat all-to-all-v that is everyone's control.

An exchange plans once per routing (metadata travels), then dispatches and combines. Dispatch and combine are
transposes of each other, so the backward of one moves exactly the bytes of the other's forward.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.comm.job import Job
from harness.comm.rows import Spread, dot_rows, scale_rows
from harness.placement import Placement
from harness.routing.certificate import expert_counts
from harness.routing.types import Routing


class Exchange(abc.ABC):
    """Tokens to experts and back, on one rank of ``job``."""

    def __init__(self, job: Job, placement: Placement):
        self.job = job
        self.placement = placement

    def place(self, placement: Placement) -> None:
        """Experts are where ``placement`` says from now on."""
        self.placement = placement

    @abc.abstractmethod
    def plan(self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None) -> Any:
        """Collective: ids int64 [T, k], weights [T, k], kept bool [T, k] or None -> what dispatch and combine need.

        Differentiable in the weights, which combine applies. After dispatch the plan has ``counts`` int64 [E_local]
        on the CPU: rows of every local expert."""

    @abc.abstractmethod
    def dispatch(self, x: torch.Tensor, plan: Any) -> torch.Tensor:
        """x [T, M] -> rows [R, M] sorted by local expert, differentiable."""

    @abc.abstractmethod
    def combine(self, rows: torch.Tensor, plan: Any) -> torch.Tensor:
        """expert outputs [R, M] -> their weighted sums per token [T, M], differentiable."""


def all_to_all(
    send: torch.Tensor,
    send_rows: list[int],
    receive_rows: list[int],
    group: dist.ProcessGroup | None,
    async_op: bool = False,
) -> tuple[torch.Tensor, Any]:
    """All-to-all-v over dimension 0 through the installed wire; a rank alone in its group keeps its rows."""
    if group is None:
        return send, None
    received = send.new_empty(sum(receive_rows), *send.shape[1:])
    work = dist.all_to_all_single(received, send.contiguous(), receive_rows, send_rows, group=group, async_op=async_op)
    return received, work


# --- flat: one copy of a token per chosen expert, one all-to-all-v over all ranks ---------------------------------


@dataclasses.dataclass(eq=False)
class FlatPlan:
    weights: torch.Tensor  # [T, k]
    counts: torch.Tensor  # int64 [E_local]
    sent: Spread  # row sent -> token
    choice: torch.Tensor  # int64 [R_sent]: flat index into [T, k] of each row sent
    send_rows: list[int]
    receive_rows: list[int]
    by_expert: torch.Tensor  # int64 [R]: row received at each place of the expert-sorted order
    by_source: torch.Tensor  # its inverse


def taken(ids: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Flat indices into [T, k] of the assignments that the gate did not drop, int64 [R_sent]."""
    choice = torch.arange(ids.numel(), device=ids.device)
    return choice if kept is None else choice[kept.flatten()]


def flat_plan(
    weights: torch.Tensor,
    choice: torch.Tensor,
    send_rows: list[int],
    received: torch.Tensor,
    slot: torch.Tensor | None = None,
) -> FlatPlan:
    """``choice``: assignments in the order in which they are sent, ``send_rows`` to each rank; ``received`` int64
    [num_ranks, E_local] on the CPU: rows from each rank for each local expert, in the order in which each rank sends
    them; ``slot`` int64 [E_local]: the place of each among the local experts; None: that order."""
    if slot is None:
        slot = torch.arange(received.shape[1])
    expert = slot.repeat(len(received)).repeat_interleave(received.flatten())
    by_expert = expert.argsort(stable=True).to(choice.device)
    by_source = torch.empty_like(by_expert)
    by_source[by_expert] = torch.arange(len(by_expert), device=choice.device)
    # A token's rows are added in the order of its choices: so sums do not depend on where experts are.
    top_k = weights.shape[1]
    sent = Spread(choice // top_k, len(weights), rank_in_item=choice % top_k)
    receive_rows = [int(rows) for rows in received.sum(1)]
    counts = torch.empty_like(slot)
    counts[slot] = received.sum(0)
    return FlatPlan(weights, counts, sent, choice, send_rows, receive_rows, by_expert, by_source)


class FlatExchange(Exchange):
    """All-to-all-v expert parallelism. Rows leave sorted by expert, so only counts travel as metadata; gate weights
    stay with the token and are applied when the rows come home."""

    def plan(self, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor | None) -> FlatPlan:
        placement, num_ranks = self.placement, self.job.num_ranks
        order = np.concatenate([placement.local(rank) for rank in range(num_ranks)])
        order_of_expert = torch.as_tensor(order, device=ids.device)
        rank_order = torch.empty_like(order_of_expert)  # expert -> its place when experts are sorted by owner
        rank_order[order_of_expert] = torch.arange(len(rank_order), device=ids.device)

        chosen = taken(ids, kept)
        key = rank_order[ids.flatten()[chosen]]
        rows_of_slot = torch.bincount(key, minlength=len(rank_order)).cpu()
        local = [len(placement.local(rank)) for rank in range(num_ranks)]
        received, _ = all_to_all(
            rows_of_slot.to(ids.device),
            local,
            [local[self.job.rank]] * num_ranks,
            self.job.world if num_ranks > 1 else None,
        )
        received = received.cpu().view(num_ranks, local[self.job.rank])  # [source, local expert]
        send_rows = [int(part.sum()) for part in rows_of_slot.split(local)]
        return flat_plan(weights, chosen[key.argsort(stable=True)], send_rows, received)

    def dispatch(self, x: torch.Tensor, plan: FlatPlan) -> torch.Tensor:
        return _FlatDispatch.apply(x, self, plan)

    def combine(self, rows: torch.Tensor, plan: FlatPlan) -> torch.Tensor:
        return _FlatCombine.apply(rows, plan.weights, self, plan)

    def _out(self, rows: torch.Tensor, plan: FlatPlan) -> torch.Tensor:
        """Rows in sending order -> rows by local expert at their experts."""
        group = self.job.world if self.job.num_ranks > 1 else None
        received, _ = all_to_all(rows, plan.send_rows, plan.receive_rows, group)
        return received.index_select(0, plan.by_expert)

    def _home(self, rows: torch.Tensor, plan: FlatPlan) -> torch.Tensor:
        """The way back."""
        group = self.job.world if self.job.num_ranks > 1 else None
        return all_to_all(rows.index_select(0, plan.by_source), plan.receive_rows, plan.send_rows, group)[0]


class _FlatDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, exchange, plan):  # type: ignore[no-untyped-def, override]
        ctx.exchange, ctx.plan = exchange, plan
        return exchange._out(plan.sent.spread(x), plan)

    @staticmethod
    def backward(ctx, drows):  # type: ignore[no-untyped-def, override]
        return ctx.plan.sent.gather(ctx.exchange._home(drows, ctx.plan)), None, None


class _FlatCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, exchange, plan):  # type: ignore[no-untyped-def, override]
        home = exchange._home(rows, plan)
        chosen = weights.flatten()[plan.choice]
        ctx.save_for_backward(home, weights)
        ctx.exchange, ctx.plan = exchange, plan
        return plan.sent.gather(home, chosen)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def, override]
        home, weights = ctx.saved_tensors
        plan = ctx.plan
        dweights = torch.zeros_like(weights).flatten()
        dweights[plan.choice] = dot_rows(dy, plan.sent.item, home).to(weights.dtype)
        scaled = scale_rows(dy, plan.sent.item, weights.flatten()[plan.choice])
        return ctx.exchange._out(scaled, plan), dweights.view_as(weights), None, None


def flat_bytes(
    routing: Routing, placement: Placement, row_bytes: int, kept: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Planned bytes of the flat exchange, [num_ranks, num_ranks] from -> to, by part (see ``System.planned_bytes``)."""
    num_ranks = placement.hosts.shape[1]
    matrix = np.zeros((num_ranks, num_ranks))
    if kept is None:
        np.add.at(matrix.T, placement.owner, expert_counts(routing).T * float(row_bytes))
    else:
        target = placement.owner[routing.ids][kept]  # [T, k]
        source = np.broadcast_to(routing.source[:, None], routing.ids.shape)[kept]
        np.add.at(matrix, (source, target), float(row_bytes))
    np.fill_diagonal(matrix, 0)
    counts = np.broadcast_to(placement.hosts.sum(0) * 8.0, (num_ranks, num_ranks)).copy()  # int64 per expert
    np.fill_diagonal(counts, 0)
    return there_and_back(counts, matrix)


def there_and_back(metadata: np.ndarray, dispatch: np.ndarray) -> dict[str, np.ndarray]:
    """Parts of ``System.planned_bytes`` of an exchange whose rows come home the way they went, and again backward."""
    return {
        "metadata": metadata,
        "dispatch": dispatch,
        "combine": dispatch.T.copy(),
        "combine_grad": dispatch,
        "dispatch_grad": dispatch.T.copy(),
    }
