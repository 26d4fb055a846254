"""What the processor does in every task beside what its cost says: norms, the gate, packing of rows, embedding, head,
optimizer, and small all-to-alls between threads that wait for a core.

Ranks of an emulated cluster share its cores, so these take a part of a step that neither links nor computation account
for. They are much the same under every system. So they are taken from executed steps of one, whose own cells then say
nothing about how good predictions are, and become ``Machine.host``:
``dataclasses.replace(machine, host=merged([beside(executed, simulate(plan, machine, topology)), ...]))``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.plan.graph import COMPUTE, Timeline

#: by task, without its layer: "embedding", "forward.gate", "backward.attention"
Seconds = Mapping[str, float]
PREDICTED = ("experts", "moe")  # kinds of computation that are not host time, but what is to be predicted


def beside(executed: Timeline, simulated: Timeline) -> dict[str, float]:
    """Seconds of the tasks of any phase's plan, executed [num_tasks, W], beyond what ``simulated`` [num_tasks] or
    [num_tasks, W] has for the task of the same name; mean over ranks and layers, at least 0. ``simulated``: by a
    machine without host time.

    Exchanges, experts and whole layers of packages are left out, as they are what is to be predicted. Of metadata what
    it takes from the last rank's arrival on."""
    lasts = simulated.end_s - simulated.start_s
    known = {task.name: float(np.mean(each)) for task, each in zip(simulated.plan.tasks, lasts, strict=True)}
    found: dict[str, list[float]] = {}
    for task, start, end in zip(executed.plan.tasks, executed.start_s, executed.end_s, strict=True):
        if task.kind == "metadata":
            took = float(end.max() - start.max())
        elif task.lane == COMPUTE and task.kind not in PREDICTED:
            took = float((end - start).mean())
        else:
            continue
        found.setdefault(unlayered(task.name), []).append(max(0.0, took - known.get(task.name, 0.0)))
    return {name: float(np.mean(values)) for name, values in found.items()}


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


__all__ = ["Seconds", "beside", "merged", "unlayered"]
