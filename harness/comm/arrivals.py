"""Bytes that this rank has received from others, counted at the one interface that every system goes through: the
methods of torch's process groups, native or real package, whatever the network is made of.

What sums (all-reduce, broadcast of scalars, barriers) is left out: rows and weights travel by all-to-all, messages,
gathers and scatters. A library that sends by a transport of its own is not seen.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.distributed import ProcessGroup

from harness.routing.types import Routing

_lock = threading.Lock()
_received = 0


def received_bytes() -> int:
    """So far, since ``install``."""
    return _received


def _of_all_to_all(group: ProcessGroup, output: Any, input: Any, rows: Any = (), *_: Any) -> int:
    if not len(rows):
        return _bytes(output) * (group.size() - 1) // group.size()
    return _bytes(output) * (sum(rows) - rows[group.rank()]) // max(1, sum(rows))


def _of_lists(group: ProcessGroup, outputs: Any, inputs: Any, *_: Any) -> int:
    """Lists with a tensor of every rank."""
    every = outputs[0] if outputs and isinstance(outputs[0], (list, tuple)) else outputs
    return sum(_bytes(each) for rank, each in enumerate(every) if rank != group.rank())


def _of_gather(group: ProcessGroup, output: Any, input: Any, *_: Any) -> int:
    return _bytes(output) - _bytes(input)


def _of_scatter(group: ProcessGroup, output: Any, input: Any, *_: Any) -> int:
    one = output[0] if isinstance(output, (list, tuple)) else output
    return _bytes(one) * (group.size() - 1)


def _of_message(group: ProcessGroup, tensors: Any, *_: Any) -> int:
    return sum(map(_bytes, tensors))


#: by the names that torch's versions give them
_METHODS: dict[str, Callable[..., int]] = {
    "recv": _of_message,
    "recv_anysource": _of_message,
    "alltoall": _of_lists,
    "alltoall_base": _of_all_to_all,
    "all_to_all_single": _of_all_to_all,
    "allgather": _of_lists,
    "_allgather_base": _of_gather,
    "all_gather_single": _of_gather,
    "reduce_scatter": _of_scatter,
    "_reduce_scatter_base": _of_scatter,
    "reduce_scatter_single": _of_scatter,
}


@functools.cache
def install() -> None:
    """Count from now on, in this process."""
    for name, size_of in _METHODS.items():
        if hasattr(ProcessGroup, name):
            setattr(ProcessGroup, name, _counted(getattr(ProcessGroup, name), size_of))


def _counted(method: Callable[..., Any], size_of: Callable[..., int]) -> Callable[..., Any]:
    @functools.wraps(method)
    def counted(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        global _received
        num_bytes = size_of(group, *args)
        with _lock:
            _received += num_bytes
        return method(group, *args, **kwargs)

    return counted


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def least_rows(routing: Routing, hosts: np.ndarray) -> np.ndarray:
    """Rows that each rank must receive at least, by any way of sending no row twice, int64 [2, num_ranks]: of tokens of
    others that its experts alone can take, and, once each, of its own tokens that only others' experts can take, when
    they come home.

    ``hosts`` bool [E, num_ranks]: who has each expert. An expert that several have asks for nothing here but that a
    token leave a rank that has it not."""
    num_ranks = hosts.shape[1]
    alone = np.where(hosts.sum(1) == 1, hosts.argmax(1), -1)[routing.ids]  # [T, k]
    needs = np.zeros((len(routing.ids), num_ranks + 1), dtype=bool)
    np.put_along_axis(needs, alone, True, axis=1)  # the last column is nobody's
    needs[np.arange(len(needs)), routing.source] = False
    there = needs[:, :num_ranks].sum(0)
    away = (~hosts[routing.ids, routing.source[:, None]]).any(1)
    home = np.bincount(routing.source[away], minlength=num_ranks)
    return np.stack([there, home]).astype(np.int64)
