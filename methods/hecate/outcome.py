"""What a training that was played comes to: seconds of its steps, by layer and by part."""

from __future__ import annotations

import dataclasses

import numpy as np

from harness.plan.graph import Timeline
from methods.hecate.memory_model import Copies

Array = np.ndarray
#: of a layer's step, by kind of task; ``move``: between steps
PARTS = {"attention": "attention", "experts": "experts"}
PARTS |= dict.fromkeys(("metadata", "dispatch", "combine"), "all-to-all")
PARTS |= dict.fromkeys(("gather", "late", "regather"), "gather") | dict.fromkeys(("reduce", "spread"), "reduce")
#: what a step has once
ONCE = ("embedding", "head", "embedding.backward", "gradients-tail", "optimizer")


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """Seconds, means over the steps that are priced, of ``num_layers`` of the model's ``of_layers``. ``whole_s``: of a
    step; ``on_layers_s`` [layers]; ``path_s``: of all layers by part, on the critical path; ``busy_s`` of all layers by
    kind of task, hidden or not; ``step_move_s``: of what is done behind a step, mean over all that count; ``once_s``:
    of ``ONCE``, here and in a step with all layers. ``busiest``: most assignments that a rank computes in a step over
    the mean, all layers together. ``copies``: the experts on the rank that has most."""

    of_layers: int
    whole_s: float
    on_layers_s: Array
    path_s: dict[str, float]
    busy_s: dict[str, float]
    step_move_s: float
    once_s: tuple[float, float]
    busiest: float
    copies: Copies

    @property
    def num_layers(self) -> int:
        return len(self.on_layers_s)

    @property
    def layers_s(self) -> Array:
        """Of every layer [layers], moves with it."""
        return np.asarray(self.on_layers_s + self.move_s)

    @property
    def layer_s(self) -> float:
        """Mean of the model's layers; the last one, whose copies stay from forward to backward, is one of them."""
        more = self.of_layers - self.num_layers
        return float((self.layers_s.sum() + more * self.layers_s[:-1].mean()) / self.of_layers)

    @property
    def move_s(self) -> float:
        """Of a layer, on its step."""
        return self.step_move_s / self.num_layers

    @property
    def moe_s(self) -> Array:
        """Of every layer without its attention [layers]."""
        return np.asarray(self.layers_s - self._busy("attention"))

    @property
    def step_s(self) -> float:
        """Of as many layers as the model has."""
        here, whole = self.once_s
        left = self.whole_s - float(self.on_layers_s.sum()) - here  # not hidden behind any layer
        return self.layer_s * self.of_layers + left + whole

    def seconds(self) -> dict[str, float]:
        """Of every part of a layer's step on the critical path."""
        every = dict.fromkeys([*PARTS.values(), "other"])
        found = {name: self.path_s.get(name, 0.0) / self.num_layers for name in every}
        return found | {"move": self.move_s}

    @property
    def all_to_all_s(self) -> float:
        """Of a layer, hidden or not."""
        return self._busy("all-to-all")

    @property
    def collectives_s(self) -> float:
        """Of experts, of a layer, hidden or not."""
        return self._busy("gather") + self._busy("reduce")

    def _busy(self, part: str) -> float:
        return sum(s for kind, s in self.busy_s.items() if PARTS.get(kind) == part) / self.num_layers


def result(
    of_layers: int,
    steps: list[Timeline],
    num_layers: int,
    move_s: float,
    once_s: float,
    busiest: float,
    copies: Copies,
) -> Result:
    """``steps``: timelines [num_tasks, W] of those that are priced."""

    def mean(several: list[dict[str, float]]) -> dict[str, float]:
        return {name: float(np.mean([each.get(name, 0.0) for each in several])) for each in several for name in each}

    once = [sum(_lasts(each, name) for name in ONCE) for each in steps]
    return Result(
        of_layers,
        float(np.mean([each.total_s.max() for each in steps])),
        np.mean([_layers_s(each, num_layers) for each in steps], axis=0),
        mean([critical_path(each) for each in steps]),
        mean([_busy_s(each) for each in steps]),
        move_s,
        (float(np.mean(once)), once_s),
        busiest,
        copies,
    )


def _busy_s(timeline: Timeline) -> dict[str, float]:
    """Of the layers' tasks by kind, each on the rank where it takes longest."""
    found: dict[str, float] = {}
    lasts = (timeline.end_s - timeline.start_s).max(1)
    for task, seconds in zip(timeline.plan.tasks, lasts.tolist(), strict=True):
        if task.name.startswith("layer"):
            found[task.kind] = found.get(task.kind, 0.0) + seconds
    return found


def _lasts(timeline: Timeline, task: str) -> float:
    start, end = timeline.of(task)
    return float((end - start).max())


def _layers_s(timeline: Timeline, num_layers: int) -> Array:
    """From where the layer before has ended, forward and backward, [layers]."""

    def ends(task: str) -> float:
        return float(timeline.of(task)[1].max())

    forward = [ends("embedding"), *(ends(f"layer{i}.forward.restore") for i in range(num_layers))]
    backward = [ends("head"), *(ends(f"layer{i}.backward.attention") for i in reversed(range(num_layers)))]
    return np.diff(forward) + np.diff(backward)[::-1]


def critical_path(timeline: Timeline) -> dict[str, float]:
    """Seconds of the layers' tasks by part, along the chain of tasks that ends last and never waits."""
    plan, start, end = timeline.plan, timeline.start_s, timeline.end_s
    _, waits, bounds = plan.walk
    here, rank = divmod(int(end.argmax()), end.shape[1])
    found: dict[str, float] = {}
    while True:
        task, began = plan.tasks[here], start[here, rank]
        if task.name.startswith("layer"):
            part = PARTS.get(task.kind, "other")
            found[part] = found.get(part, 0.0) + float(end[here, rank] - began)
        before = waits[bounds[here] : bounds[here + 1]]
        if not len(before) or began <= 0:
            return found
        if end[before, rank].max() >= began * (1 - 1e-12):
            here = int(before[end[before, rank].argmax()])
        else:  # a collective, for which another rank was late
            late, rank = divmod(int(end[before].argmax()), end.shape[1])
            here = int(before[late])
