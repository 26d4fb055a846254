"""Tensors that one task makes and another one uses, perhaps on another lane.

On CUDA a lane is a stream, and the host is far ahead of all of them. A tensor whose last reference goes is given back
while kernels that read it are still waiting, and its memory returns to the stream that *allocated* it. What that stream
does next may then overwrite it under the eyes of the other. ``Tensor.record_stream`` keeps the memory until a named
stream has passed this point as well. This module is the one place that calls it:

    class Batch(Handover):  # a tensor that a task reads from an attribute is recorded on the task's lane
        rows: torch.Tensor

    held = Held()  # the same for a dict: held[key], held.pop(key)

So whoever keeps tensors from task to task derives from ``Handover``, and no task needs to know where its inputs came
from. On CPU nothing happens: there a thread that reads a tensor keeps it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

COPIED_ROWS = 8  # of a tensor that is to be looked at later


def used_here(value: Any) -> Any:
    """Record the tensor, or those in a list, tuple or dict, on the current stream; returns ``value``."""
    if not torch.cuda.is_initialized():
        return value
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))
    elif isinstance(value, (list, tuple)):
        for each in value:
            used_here(each)
    elif isinstance(value, dict) and not isinstance(value, Held):
        for each in list(value.values()):  # at once: another lane may add to it
            used_here(each)
    return value


class Handover:
    """Something that keeps tensors from task to task in its attributes."""

    def __getattribute__(self, name: str) -> Any:
        return used_here(super().__getattribute__(name))


class Held(dict[Any, Any]):
    """Tensors from task to task by key."""

    def __getitem__(self, key: Any) -> Any:
        return used_here(super().__getitem__(key))

    def pop(self, key: Any) -> Any:  # type: ignore[override]
        return used_here(super().pop(key))


@dataclasses.dataclass
class Seen(Handover):
    """A tensor [T, ...] to be looked at later, with what tells whether it was written to since."""

    tensor: torch.Tensor
    version: int  # how often it was written to in place; 0 where torch does not count
    rows: torch.Tensor  # a few, copied: what is written through ``Tensor.data`` is not counted

    @property
    def written(self) -> bool:
        now = _rows(self.tensor)
        return version(self.tensor) != self.version or not torch.allclose(now, self.rows, 0, 0, equal_nan=True)


def seen(tensor: torch.Tensor) -> Seen:
    return Seen(tensor.detach(), version(tensor), _rows(tensor.detach()).clone())


def version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else int(tensor._version)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:: max(1, len(tensor) // COPIED_ROWS)]


def pop(owner: object, name: str) -> Any:
    """Read an attribute and clear it, so that its tensor can be freed as soon as its consumer has let go of it."""
    value = getattr(owner, name)
    setattr(owner, name, None)
    return value


class Moment:
    """How far the current stream has got. Memory that one lane has allocated and another one fills must not be filled
    before the first one's moment of allocating it. On CPU, where nothing is issued ahead, a moment is over at once."""

    def __init__(self, device: torch.device):
        self.event = None
        if device.type == "cuda":
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Let the current stream wait for it."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)
