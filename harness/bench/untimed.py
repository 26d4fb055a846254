"""What is timed is all of it: nothing is made before the clock starts or after it has stopped, and the process stays as
it is for the others of the race."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.comm import arrivals

_PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "mv", "addmv", "dot")
    if hasattr(torch.ops.aten, name)
}
_TASKS = Path("/proc/self/task")  # threads of this process
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size of a number


class Untimed(TorchDispatchMode):
    """Around what a system does outside the clock, where it may lay out anew what is there; ``wrong``: what it did
    beyond that, in words. ``products``: whether it may multiply matrices (a gate does); ``receives``: whether it may
    put together what other ranks have."""

    def __init__(self, doing: str, products: bool = False, receives: bool = False):
        super().__init__()
        self.doing, self.products, self.receives, self.wrong = doing, products, receives, ""
        self._received = 0

    def __enter__(self) -> Any:
        self._received = arrivals.received_bytes()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        received = arrivals.received_bytes() - self._received
        if received and not self.receives:
            self.wrong = f"{received:,} bytes were received {self.doing}, outside the clock"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.products and func.overloadpacket in _PRODUCTS:
            self.wrong = f"matrices were multiplied {self.doing}, outside the clock"
        return func(*args, **(kwargs or {}))


def marks(tensors: Iterable[torch.Tensor | None]) -> list[int | None]:
    """A number of each that another value of it does not have: the sum of its bits."""
    return [None if each is None else _mark(each.detach()) for each in tensors]


def _mark(tensor: torch.Tensor) -> int:
    return int(tensor.view(_INTEGERS[tensor.element_size()]).sum())


def settings() -> dict[str, Any]:
    """Of this process, that races share."""
    return {
        "cores of threads": _cores(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
    }


def _cores() -> list[tuple[int, ...]]:
    """Sets of cores that threads of this process may run on."""
    found = set()
    for thread in _TASKS.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            found.add(tuple(sorted(os.sched_getaffinity(int(thread.name)))))
    return sorted(found)


def _give_cores(before: list[tuple[int, ...]]) -> None:
    """To every thread the largest set that there was."""
    _, cores = max((len(each), each) for each in before)
    for thread in _TASKS.iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


#: how ``settings`` are set, one by one
_SET: tuple[Callable[[Any], object], ...] = (
    _give_cores,
    torch.set_float32_matmul_precision,
    torch.use_deterministic_algorithms,
    torch.set_num_threads,
    torch.set_default_dtype,
    torch.set_grad_enabled,
)


def put_back(before: dict[str, Any]) -> str:
    """Settings as they were ``before`` -> which had changed, in words."""
    now = settings()
    changed = [f"{name} from {was} to {now[name]}" for name, was in before.items() if now[name] != was]
    if changed:
        for (name, was), setter in zip(before.items(), _SET, strict=True):
            if now[name] != was:
                setter(was)
    return f"it changed {', '.join(changed)}, which the others of the race share" if changed else ""
