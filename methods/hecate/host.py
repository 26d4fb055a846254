"""What the processor does in a training step beside the stand-ins for computation: norms, the gate, packing of rows,
embedding, head, optimizer, and small all-to-alls between threads that wait for a core.

Ranks of an emulated cluster share its cores, so these tasks take a part of a step that neither links nor stand-ins
account for. They are the same under every system and are taken from the executed steps of one, ``SYSTEM``, whose own
cells then say nothing about how good predictions are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from harness.plan.graph import COMPUTE, Timeline

SYSTEM = "flat"
Seconds = Mapping[str, float]  # by task, without its layer: "embedding", "forward.gate", "backward.attention"


def beside(executed: Timeline, simulated: Timeline) -> dict[str, float]:
    """Seconds of the tasks of a step [num_tasks, ranks] beyond what ``simulated`` [num_tasks] has for them, mean over
    ranks and layers, at least 0. Exchanges and experts are left out: what they take is what is to be predicted. Of a
    collective (``metadata``) what it takes from the last rank's arrival on."""
    known = dict(zip((task.name for task in simulated.plan.tasks), simulated.end_s - simulated.start_s, strict=True))
    found: dict[str, list[float]] = {}
    for task, start, end in zip(executed.plan.tasks, executed.start_s, executed.end_s, strict=True):
        name = unlayered(task.name)
        if name == "forward.metadata":
            took = float(end.max() - start.max())
        elif task.lane == COMPUTE and not name.endswith(".experts"):
            took = float((end - start).mean())
        else:
            continue
        found.setdefault(name, []).append(max(0.0, took - float(known.get(task.name, 0.0))))
    return {name: float(np.mean(values)) for name, values in found.items()}


def unlayered(task: str) -> str:
    """The task's name in ``Seconds``."""
    return task.split(".", 1)[1] if task.startswith("layer") else task


def merged(several: Sequence[Seconds]) -> dict[str, float]:
    """Mean by task."""
    names = dict.fromkeys(name for each in several for name in each)
    return {name: float(np.mean([each[name] for each in several if name in each])) for name in names}
