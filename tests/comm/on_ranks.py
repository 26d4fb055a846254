"""What the ranks do in the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from harness.comm import wire
from harness.comm.job import Job


def uneven(job: Job, payload: dict[str, Any]) -> bool:
    """The receive-first exchange moves the same bytes as gloo's own: uneven splits, zero rows, any format, async."""
    sizes = torch.randint(0, 5, (job.num_ranks, job.num_ranks), generator=torch.Generator().manual_seed(3))
    send_rows, receive_rows = sizes[job.rank].tolist(), sizes[:, job.rank].tolist()
    same = True
    for dtype in (torch.float64, torch.bfloat16, torch.uint8):
        send = (torch.randn(sum(send_rows), 3) * 50).to(dtype)
        found, expected = (torch.zeros(sum(receive_rows), 3, dtype=dtype) for _ in range(2))
        work = wire.all_to_all_single(found, send, receive_rows, send_rows, async_op=True)
        assert work is not None
        work.wait()
        wire._gloo_all_to_all_single(expected, send, receive_rows, send_rows)
        same &= torch.equal(found, expected)
    even = torch.arange(job.num_ranks * 2) + 100 * job.rank
    found = torch.zeros_like(even)
    dist.all_to_all_single(found, even)
    same &= found.tolist() == [100 * source + 2 * job.rank + i for source in range(job.num_ranks) for i in range(2)]
    return bool(same)


def interleaved(job: Job, payload: dict[str, Any]) -> bool:
    """Several exchanges of one group in flight at once arrive each in its own buffer."""
    works, buffers = [], []
    for call in range(5):
        send = torch.full((job.num_ranks, 1000), 10.0 * call + job.rank)
        buffers.append(torch.empty_like(send))
        works.append(dist.all_to_all_single(buffers[-1], send, async_op=True))
    for work in reversed(works):
        work.wait()
    source = torch.arange(job.num_ranks, dtype=torch.float32)
    return all(torch.equal(buffer[:, 7], 10.0 * call + source) for call, buffer in enumerate(buffers))


def bad_splits(job: Job, payload: dict[str, Any]) -> str:
    try:
        wire.all_to_all_single(torch.empty(4), torch.empty(4), [1] * job.num_ranks, [3] * job.num_ranks)
    except ValueError as error:
        return str(error)
    return ""


def scattered(job: Job, payload: dict[str, Any]) -> dict[str, Any]:
    """The parts' sums equal gloo's own reduce-scatter; a bfloat16 sum is rounded once."""
    generator = torch.Generator().manual_seed(job.rank)
    same = True
    for dtype in (torch.float64, torch.int64):
        whole = (torch.randn(job.num_ranks * 3, 2, generator=generator) * 50).to(dtype)
        found, expected = torch.zeros(2, 3, 2, dtype=dtype)
        dist.reduce_scatter_tensor(found, whole)
        wire._gloo_reduce_scatter_tensor(expected, whole)
        same &= torch.allclose(found, expected, rtol=1e-12)
    low = torch.full((job.num_ranks, 4), 1 + 2.0**-7, dtype=torch.bfloat16)
    low[:, 0] = 256.0 if job.rank == 0 else 1.0  # in bfloat16 alone 256 + 1 is 256
    found = torch.empty(4, dtype=torch.bfloat16)
    calls = wire.num_calls
    dist.reduce_scatter_tensor(found, low.view(-1))
    return {"same": same, "first": float(found[0]), "calls": wire.num_calls - calls}
