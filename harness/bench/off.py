"""How far numbers are off, and whose they are: rows seen through a lens, and gradients of a gate's weights."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
import torch.distributed as dist

from harness.comm.job import Job


def worst_token(found: torch.Tensor, expected: torch.Tensor, sure: torch.Tensor) -> tuple[float, int]:
    """Largest difference among the ``sure`` ones of [T, q], and whose it is."""
    difference = (found.double() - expected.double()).abs().amax(1).nan_to_num(nan=torch.inf)
    difference = difference.where(sure, torch.full_like(difference, -1))
    token = int(difference.argmax())
    return float(difference[token]), token


def worst_pair(
    pairs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], ids: torch.Tensor, gradients: torch.Tensor | None
) -> tuple[float, int]:
    """Of gradients [T, k] of the weights of ``ids`` [T, k] (None: there are none) the largest error, relative to the
    largest of what is expected of ``pairs`` (token, expert, gradient: [n]), and whose token it is."""
    token, expert, expected = pairs
    if not len(token):
        return 0.0, 0
    found = expected.new_zeros(len(ids), 1 + int(torch.stack([ids.max(), expert.max()]).max()))
    if gradients is not None:
        found.scatter_add_(1, ids, gradients.double())
    difference = (found[token, expert] - expected).abs().nan_to_num(nan=torch.inf)
    worst = int(difference.argmax())
    return float(difference[worst] / (expected.abs().max() or 1.0)), int(token[worst])


def of_experts(experts: list[int]) -> str:
    return f" (experts {', '.join(map(str, experts[:4]))}{', ...' if len(experts) > 4 else ''})" if experts else ""


def scale_of(job: Job, found: torch.Tensor, expected: torch.Tensor, sure: torch.Tensor) -> float:
    """Collective: the number that errors of the rows ``found`` [T, q + 1] are relative to; 1 of nothing.

    Rounding takes some part of every number of a row, in any direction: through the lens a normal error, whose
    deviation is that part of the row's length. So the largest error is relative to the largest number that rows of
    these lengths usually show, were each seen through directions of its own; rows of a trained layer are alike, and
    all may stand nearly at right angles to these. A found row is as long as the right one, or is wrong by half its
    length at least."""
    lengths = found[sure, -1].double()
    parts = torch.zeros(4, dtype=torch.float64, device=found.device)
    if len(lengths):
        parts[0], parts[1] = expected[sure].abs().max(), lengths.max()
        parts[2], parts[3] = lengths.square().sum(), lengths.numel() * expected.shape[1]
    every = [torch.empty_like(parts) for _ in range(job.num_ranks)]
    if job.num_ranks > 1:
        dist.all_gather(every, parts, group=job.world)
    else:
        every = [parts]
    largest, longest = torch.stack(every).amax(0)[:2].tolist()
    squares, count = torch.stack(every).sum(0)[2:].tolist()
    if not count:
        return 1.0
    usual = NormalDist().inv_cdf(1 - 0.5 / count) * math.sqrt(squares * expected.shape[1] / count)
    scale = max(largest, longest, usual)
    return scale if math.isnan(squares) or scale > 1e-300 else 1.0
