"""Gradients of replicated parameters on their way to be summed over ranks, in slices that may stand anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from harness.errors import bad
from harness.plan.cost import Even
from harness.plan.graph import Work


class GradientBytes:
    """Gradients of ``part_bytes``, in the order in which backward makes them; ``take`` gives the next ones a place in a
    plan, as an all-reduce (``scope``: as costs know it)."""

    def __init__(self, part_bytes: Sequence[int], element_bytes: int, scope: str):
        self.part_bytes, self.element_bytes, self.scope = list(part_bytes), element_bytes, scope
        self.taken = 0  # elements that have a place in the plan

    @property
    def left_bytes(self) -> int:
        return sum(self.part_bytes) - self.taken * self.element_bytes

    def take(self, task: str, num_bytes: int, messages: int = 1, *, after_part: int) -> Work | None:
        """The next ``num_bytes`` for ``task``, which runs when parts before ``after_part`` are filled; None for none.
        ``UserError`` that names the task if they are more than is there by then."""
        ready = sum(self.part_bytes[:after_part]) - self.taken * self.element_bytes
        if num_bytes % self.element_bytes or not 0 <= num_bytes <= ready:
            raise bad(f"task {task}: slice", num_bytes, f"must be 0 to {ready} bytes of gradient, in whole elements")
        begin, self.taken = self.taken, self.taken + num_bytes // self.element_bytes
        if not num_bytes:
            return None
        return Work(Even("ar", self.scope, num_bytes, messages), self.run_of(slice(begin, self.taken), messages))

    def run_of(self, elements: slice, messages: int) -> Callable[[], None] | None:
        """What sums ``elements``; None where nothing runs."""
        return None


class Stream(GradientBytes):
    """One buffer of the gradients of ``parts``. ``fill`` brings a part, ``take`` sums over ``group``, ``give_back``
    hands out the sums."""

    def __init__(self, parts: Sequence[Sequence[nn.Parameter]], group: dist.ProcessGroup | None, scope: str):
        first = parts[0][0]
        ends = torch.tensor([sum(p.numel() for p in part) for part in parts]).cumsum(0).tolist()
        self.parts, self.group = parts, group
        self.starts, self.ends = [0, *ends[:-1]], ends  # elements
        self.buffer = torch.zeros(ends[-1], dtype=first.dtype, device=first.device)
        element_bytes = self.buffer.element_size()
        sizes = [(end - start) * element_bytes for start, end in zip(self.starts, ends, strict=True)]
        super().__init__(sizes, element_bytes, scope)

    def fill(self, part: int) -> None:
        """The part's gradients are made: copy them in."""
        flat = self.buffer[self.starts[part] : self.ends[part]]
        for parameter, own in zip(self.parts[part], self._views(flat, self.parts[part]), strict=True):
            if parameter.grad is None:
                own.zero_()
            else:
                own.copy_(parameter.grad)

    def run_of(self, elements: slice, messages: int) -> Callable[[], None]:
        part = self.buffer[elements]

        def run() -> None:
            if self.group is not None:
                for message in part.tensor_split(messages):
                    dist.all_reduce(message, group=self.group)

        return run

    def give_back(self) -> None:
        """Sums become the parameters' gradients; all is to be taken anew."""
        for parameters, start, end in zip(self.parts, self.starts, self.ends, strict=True):
            for parameter, own in zip(parameters, self._views(self.buffer[start:end], parameters), strict=True):
                parameter.grad = own.clone()
        self.taken = 0

    @staticmethod
    def _views(flat: torch.Tensor, parameters: Sequence[nn.Parameter]) -> Iterable[torch.Tensor]:
        sizes = [parameter.numel() for parameter in parameters]
        return [own.view_as(parameter) for own, parameter in zip(flat.split(sizes), parameters, strict=True)]


def sum_over(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    """Sum gradients over ``group``, in one bucket per format; a missing one counts as zero."""
    if group is None:
        return
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():
        bucket = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(bucket, group=group)
        for grad, part in zip(grads, bucket.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
