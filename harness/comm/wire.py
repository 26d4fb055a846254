"""One wire for all: the all-to-all that every system uses on CPU, native or real package.

gloo keeps one TCP connection and one transmit queue per pair of ranks, and a "ready to receive" note queues behind
outgoing data. Its own ``all_to_all_single`` therefore blocks at the head of the line and reaches 50 to 100 % of a
link, which NCCL does not. ``install("recv_first")`` replaces ``torch.distributed.all_to_all_single`` on gloo groups by
one that posts every receive before any send; ``install("gloo")`` puts gloo's own back. Groups of other backends are
untouched either way.

gloo's ``reduce_scatter_tensor`` is an all-reduce of which most is thrown away, at twice the bytes; the same switch
replaces it by an exchange of the parts and a sum.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_gloo_all_to_all_single = distributed_c10d.all_to_all_single
_gloo_reduce_scatter_tensor = distributed_c10d.reduce_scatter_tensor
_installed = "gloo"
#: number of exchanges that went over the receive-first wire in this process, for tests and provenance
num_calls = 0
_sequence: collections.Counter[str] = collections.Counter()


def installed() -> str:
    """Which all-to-all runs under torch.distributed now: ``recv_first`` or ``gloo``."""
    return _installed


def install(kind: str) -> None:
    """Choose the all-to-all and the reduce-scatter of this process; ``kind`` is ``recv_first`` or ``gloo``."""
    global _installed
    if kind not in ("recv_first", "gloo"):
        raise ValueError(f"wire: {kind!r}: must be recv_first or gloo")
    own = kind == "recv_first"
    for module in (dist, distributed_c10d):
        module.all_to_all_single = all_to_all_single if own else _gloo_all_to_all_single  # type: ignore[attr-defined]
        module.reduce_scatter_tensor = (  # type: ignore[attr-defined]
            reduce_scatter_tensor if own else _gloo_reduce_scatter_tensor
        )
    _installed = kind


class Exchange:
    """Handle of a running exchange; keeps its buffers alive until ``wait``."""

    def __init__(self, works: list[dist.Work], buffers: tuple[torch.Tensor, ...]):
        self._works = works
        self._buffers = buffers

    def wait(self, timeout: object = None) -> bool:
        for work in self._works:
            work.wait()
        self._works = []
        self._buffers = ()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Exchange | dist.Work | None:
    """As ``torch.distributed.all_to_all_single``; splits count rows of dimension 0 and default to equal parts."""
    pg = group if group is not None else dist.group.WORLD
    if output.device.type != "cpu" or dist.get_backend(pg) != dist.Backend.GLOO:
        return _gloo_all_to_all_single(output, input, output_split_sizes, input_split_sizes, group, async_op)
    global num_calls
    num_calls += 1
    assert pg is not None
    size, me = pg.size(), pg.rank()
    if not (output.is_contiguous() and input.is_contiguous()):
        raise ValueError("all_to_all_single needs contiguous tensors")
    # As torch's own, outside autograd: Tutel hands over tensors that require a gradient and puts its node in after.
    receive = output.detach().split(_splits(output_split_sizes, output, size))
    send = input.detach().split(_splits(input_split_sizes, input, size))
    # Ranks of a group make the same calls in the same order, so the count tells concurrent exchanges apart.
    _sequence[pg.group_name] += 1
    tag = _sequence[pg.group_name] % (1 << 30)
    works: list[dist.Work] = []
    for shift in range(1, size):
        peer = (me - shift) % size
        if receive[peer].numel():
            works.append(pg.recv([receive[peer]], peer, tag))
    for shift in range(1, size):
        peer = (me + shift) % size
        if send[peer].numel():
            works.append(pg.send([send[peer]], peer, tag))
    receive[me].copy_(send[me])
    exchange = Exchange(works, (output, input))
    if async_op:
        return exchange
    exchange.wait()
    return None


def reduce_scatter_tensor(
    output: torch.Tensor,
    input: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """As ``torch.distributed.reduce_scatter_tensor``; a blocking SUM on gloo exchanges parts and adds them, low
    precision in float32. Anything else is left to torch."""
    pg = group if group is not None else dist.group.WORLD
    if output.device.type != "cpu" or dist.get_backend(pg) != dist.Backend.GLOO or op != dist.ReduceOp.SUM or async_op:
        return _gloo_reduce_scatter_tensor(output, input, op, group, async_op)
    assert pg is not None
    parts = torch.empty_like(input).view(pg.size(), *output.shape)
    all_to_all_single(parts, input.view_as(parts), group=pg)
    low = output.dtype in (torch.bfloat16, torch.float16)
    output.copy_(parts.sum(0, dtype=torch.float32 if low else output.dtype))
    return None


def _splits(sizes: Sequence[int] | None, tensor: torch.Tensor, size: int) -> list[int]:
    if sizes is not None and len(sizes):
        splits = [int(rows) for rows in sizes]
        if len(splits) != size or sum(splits) != len(tensor):
            raise ValueError(f"split sizes {splits} do not add up to {len(tensor)} rows over {size} ranks")
        return splits
    if len(tensor) % size:
        raise ValueError(f"{len(tensor)} rows cannot be split evenly over {size} ranks")
    return [len(tensor) // size] * size
