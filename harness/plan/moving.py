"""Experts that change places: weights and optimizer state go to their new ranks, point to point and all at once.

A rank may have another number of experts afterwards; its parameters then have another number of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from harness.comm.job import Job
from harness.comm.moved import MOVES
from harness.placement import Placement


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """One layer's experts from ``before`` to ``after``. ``parameters``: [E_local, ...] each, by slot."""

    parameters: Sequence[nn.Parameter]
    before: Placement
    after: Placement

    def changes(self, rank: int) -> list[tuple[int, int, int]]:
        """(slot, rank and slot from which its new expert comes) of every slot of ``rank`` that changes or is new. It
        comes from the rank itself if that has a copy, else from the first that has one."""
        found = []
        owner, old = self.before.owner, self.before.local(rank)
        for slot, new in enumerate(self.after.local(rank)):
            if slot >= len(old) or old[slot] != new:
                source = rank if new in old else int(owner[new])
                found.append((slot, source, int((self.before.local(source) == new).argmax())))
        return found

    def matrix(self, num_bytes: float) -> np.ndarray:
        """What ``changes`` of all ranks send between them, of ``num_bytes`` an expert: float64 [num_ranks, num_ranks]
        from -> to, 0 on the diagonal."""
        expert, rank = np.nonzero(self.after.hosts & ~self.before.hosts)
        found = np.zeros((self.after.hosts.shape[1],) * 2)
        np.add.at(found, (self.before.owner[expert], rank), float(num_bytes))
        return found


def move(job: Job, moves: Sequence[Move], optimizer: torch.optim.Optimizer | None) -> int:
    """Collective: carry out ``moves`` of all layers in one batch; returns the bytes that this rank sent.

    With ``optimizer`` its state of the experts (every tensor as large as the parameter) goes along; without, it stays
    with the slot, as in systems that move parameters only."""
    if job.moving is not None:
        job.moving(moves)
    tensors = [_tensors(each.parameters, optimizer) for each in moves]
    changes = [[each.changes(rank) for rank in range(job.num_ranks)] for each in moves]
    sending: dict[int, list[torch.Tensor]] = {}
    receiving: dict[int, list[tuple[int, int]]] = {}  # by source: layer and slot
    local: list[tuple[int, int, list[torch.Tensor]]] = []
    for layer, of_rank in enumerate(changes):
        for rank, arriving in enumerate(of_rank):
            for slot, source, old_slot in arriving:
                if source == job.rank:
                    rows = [tensor[old_slot].clone() for tensor in tensors[layer]]
                    if rank == job.rank:
                        local.append((layer, slot, rows))
                    else:
                        sending.setdefault(rank, []).extend(_bytes(row) for row in rows)
                elif rank == job.rank:
                    receiving.setdefault(source, []).append((layer, slot))
    outgoing = {rank: torch.cat(parts) for rank, parts in sending.items()}
    incoming = {
        rank: torch.empty(sum(_row_bytes(tensors[layer]) for layer, _ in slots), dtype=torch.uint8, device=job.device)
        for rank, slots in receiving.items()
    }
    work = [dist.P2POp(dist.isend, buffer, job.members[rank], job.world) for rank, buffer in sorted(outgoing.items())]
    work += [dist.P2POp(dist.irecv, buffer, job.members[rank], job.world) for rank, buffer in sorted(incoming.items())]
    for each in dist.batch_isend_irecv(work) if work else ():
        each.wait()
    for layer_move in moves:
        resize(layer_move.parameters, optimizer, len(layer_move.after.local(job.rank)))
    tensors = [_tensors(each.parameters, optimizer) for each in moves]
    for layer, slot, rows in local:
        for tensor, row in zip(tensors[layer], rows, strict=True):
            tensor[slot] = row
    for rank, slots in receiving.items():
        start = 0
        for layer, slot in slots:
            for tensor in tensors[layer]:
                end = start + tensor[slot].numel() * tensor.element_size()
                row = incoming[rank][start:end].clone()  # aligned to its format
                tensor[slot] = row.view(tensor.dtype).view_as(tensor[slot])
                start = end
    sent = sum(len(buffer) for buffer in outgoing.values())
    job.moved.add(MOVES, sent)
    return sent


def _tensors(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None) -> list[torch.Tensor]:
    """Everything that is kept by slot."""
    found = []
    for parameter in parameters:
        found.append(parameter.detach())
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        found += [state[key] for key in sorted(state) if getattr(state[key], "shape", None) == parameter.shape]
    return found


@torch.no_grad()
def resize(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer | None, num_slots: int) -> None:
    """Another number of rows, of which the first stay as they are. Parameters remain the optimizer's."""

    def resized(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.new_zeros(num_slots, *tensor.shape[1:])
        kept = min(num_slots, len(tensor))
        made[:kept] = tensor[:kept]
        return made

    for parameter in parameters:
        if len(parameter) == num_slots:
            continue
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for key, value in state.items():
            if getattr(value, "shape", None) == parameter.shape:
                state[key] = resized(value)
        parameter.grad = None
        parameter.data = resized(parameter.data)


def _bytes(row: torch.Tensor) -> torch.Tensor:
    return row.contiguous().view(-1).view(torch.uint8)


def _row_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.shape[1:].numel() * tensor.element_size() for tensor in tensors)
