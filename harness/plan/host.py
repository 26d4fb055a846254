"""What the processor does in every task beside what its cost says: norms, the gate, packing of rows, embedding, head,
optimizer, and small all-to-alls between threads that wait for a core. What only moves bytes (the optimizer by what a
rank owns, the embedding, the mix) takes it for each of them.

Ranks of an emulated cluster share its cores, so these take a part of a step that neither links nor computation account
for. They are much the same under every system. So they are taken from executed steps of one, whose own cells then say
nothing about how good predictions are, and become ``Machine.host``:
``dataclasses.replace(machine, host=merged([beside(executed, simulate(plan, machine, topology)), ...]))``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harness.plan.cost import Compute, Cost, Hold, OnLinks, leaves
from harness.plan.graph import COMPUTE, Task, Timeline

#: by task, without its layer: "embedding", "forward.gate", "backward.attention"; of what only moves bytes, of each
Seconds = Mapping[str, float]
LINKS = "links"  # among ``Seconds``: no task, but a share of all that goes over links
SUMS = "forward.restore"  # of each byte of the sums there, and of any others
PREDICTED = ("experts", "moe")  # kinds of computation that are not host time, but what is to be predicted


def beside(executed: Timeline, simulated: Timeline) -> dict[str, float]:
    """Seconds of the tasks of any phase's plan, executed [num_tasks, W], beyond what ``simulated`` [num_tasks] or
    [num_tasks, W] has for the task of the same name; mean over ranks and layers, at least 0. ``simulated``: by a
    machine without host time.

    Exchanges, experts and whole layers of packages are left out, as they are what is to be predicted. Of metadata what
    it takes from the last rank's arrival on."""
    lasts = simulated.end_s - simulated.start_s
    known = {task.name: float(np.mean(each)) for task, each in zip(simulated.plan.tasks, lasts, strict=True)}
    amounts = {task.name: amount(task.cost) for task in simulated.plan.tasks}
    found: dict[str, list[float]] = {}
    for task, start, end in zip(executed.plan.tasks, executed.start_s, executed.end_s, strict=True):
        if task.kind == "metadata":
            took = float(end.max() - start.max())
        elif task.lane == COMPUTE and task.kind not in PREDICTED:
            took = float((end - start).mean())
        else:
            continue
        more = max(0.0, took - known.get(task.name, 0.0)) / np.mean(amounts.get(task.name, 1.0))
        found.setdefault(unlayered(task.name), []).append(float(more))
    return {name: float(np.mean(values)) for name, values in found.items()}


def amount(cost: Cost | None) -> Any:
    """What ``Seconds`` of a task are multiplied by: bytes where it moves some and computes nothing, else 1."""
    if isinstance(cost, Compute) and not np.any(cost.macs) and np.any(cost.read_bytes):
        return np.asarray(cost.read_bytes, dtype=np.float64)
    return cost.host if isinstance(cost, Hold) else 1.0


def summed(cost: Cost | None) -> Any:
    """Bytes that ranks add up in what goes over links."""
    return sum(np.asarray(each.summed_bytes) for each in leaves(cost) if isinstance(each, OnLinks))


def of_task(host: Seconds, task: Task) -> float:
    """By its name, else by its kind: a second hop's metadata take what the first ones do, sums of a chunk what those of
    a batch do for each byte."""
    name = unlayered(task.name)
    return host.get(name, host.get(f"{name.partition('.')[0]}.{task.kind}", 0.0))


def unlayered(task: str) -> str:
    """The task's name in ``Seconds``.

    >>> unlayered("layer12.forward.gate"), unlayered("forward.gate"), unlayered("layers")
    ('forward.gate', 'forward.gate', 'layers')
    """
    layer, dot, rest = task.partition(".")
    return rest if dot and layer.startswith("layer") else task


def merged(several: Sequence[Seconds]) -> dict[str, float]:
    """Mean by task."""
    names = dict.fromkeys(name for each in several for name in each)
    return {name: float(np.mean([each[name] for each in several if name in each])) for name in names}


__all__ = ["LINKS", "SUMS", "Seconds", "amount", "beside", "merged", "of_task", "summed", "unlayered"]
