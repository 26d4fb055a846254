"""Collectives as NCCL has them: tensors of the device only, and what is asynchronous runs on a stream of its own.

The bytes go over gloo. ``async_op``, ``isend`` and ``irecv`` work on a stream of their group, which begins behind the
current one; ``wait`` orders the current stream behind it. Lists of objects may travel: torch puts them on the device
by itself.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.cuda import memory, streams
from tests.cuda.streams import Stream

_ASYNCHRONOUS = ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter",
                 "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "gather", "scatter", "isend",
                 "irecv")  # fmt: skip
_OF_OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list",
               "monitored_barrier")  # fmt: skip

_objects = 0  # depth of collectives of objects
_streams: weakref.WeakKeyDictionary[Any, Stream] = weakref.WeakKeyDictionary()


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """A collective's operator: its first argument is written (or sent), its second, if it has tensors, read."""
    from tests.cuda.device import tensors_in

    name = func._schema.name.removeprefix("c10d::").strip("_")
    if "barrier" not in name and not _objects:
        operands = []
        for place, value in enumerate(args[:2]):
            for tensor in tensors_in(value):
                block = memory.block_of(tensor)
                if block is None:
                    raise RuntimeError(
                        f"No backend type associated with device type cpu ({name} of {tuple(tensor.shape)} in "
                        f"[{memory.task}])"
                    )
                operands.append((tensor, block, place == 0 and name != "send"))
        memory.use(name, operands)
    return func(*args, **kwargs)


class Pending:
    """A ``dist.Work``; as NCCL's, it holds its tensors until ``wait``."""

    def __init__(self, work: Any, stream: Stream, held: Any):
        self._work, self._stream, self._held = work, stream, held

    def wait(self, *args: Any) -> Any:
        streams.current().wait_stream(self._stream)
        self._held = None
        return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _aside(native: Callable[..., Any]) -> Callable[..., Any]:
    always = native.__name__ in ("isend", "irecv")

    @functools.wraps(native)
    def collective(*args: Any, **kwargs: Any) -> Any:
        if not (always or kwargs.get("async_op")):
            return native(*args, **kwargs)
        group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), dist.group.WORLD)
        stream = _streams.get(group)
        if stream is None:
            stream = _streams[group] = Stream()
            stream.name = f"the stream of group {len(_streams)}"
        stream.wait_stream(streams.current())
        with streams.use(stream):
            work = native(*args, **kwargs)
        return None if work is None else Pending(work, stream, (args, kwargs))

    return collective


def _of_objects(native: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(native)
    def collective(*args: Any, **kwargs: Any) -> Any:
        global _objects
        _objects += 1
        try:
            return native(*args, **kwargs)
        finally:
            _objects -= 1

    return collective


def install() -> None:
    """Change ``torch.distributed`` in this process."""
    if not dist.is_available():
        return
    for names, wrap in ((_ASYNCHRONOUS, _aside), (_OF_OBJECTS, _of_objects)):
        for name in names:
            wrapped = wrap(getattr(distributed_c10d, name))
            setattr(distributed_c10d, name, wrapped)
            setattr(dist, name, wrapped)


__all__ = ["Pending", "install", "run"]
torch.distributed  # noqa: B018
