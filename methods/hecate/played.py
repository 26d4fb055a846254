"""Hecate and the systems that it is compared with, over given loads: trainings as their own courses play them, of which
the judge of time prices some steps.

What moves, and when, is what the executed systems decide, told of every step's loads. Steps are laid out as they are
executed. Interpretations: rates are the data sheets', without start-up times (``start_s`` adds one to every message);
``bw`` of the paper is the node's port, through which all GPUs of a node go; an owner sends an expert to every node that
wants it, where the paper's broadcasts pass it on (``passes_on``); all rearrange every 25 steps, where Hecate's paper
sees the best; those with copies keep them in twice the slots that experts need; attention is not causal.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from harness.layer.work import attention_macs, expert_parameters
from harness.plan.cost import Compute, Cost, InTurn, Timed, Transfer
from harness.plan.course import MOMENTS
from harness.plan.graph import Timeline
from harness.plan.machine import Machine
from harness.plan.passage import Passage
from harness.plan.priced_step import PricedTraining
from harness.plan.simulate import simulate
from harness.routing.types import Routing
from harness.simulation import Training
from harness.specs import Cluster, Experiment, Gemm, Model, Workload
from harness.topology import Topology
from methods.hecate.memory_model import OPTIMIZER, PARAMETER, Copies

Array = np.ndarray
#: of what a device can do, that computation reaches; no paper states it
EFFICIENCY = 0.4
WARM = 100  # steps before those that count, so that everything has been placed by loads that were seen
#: which steps are priced, in hundredths of those that count: as long after a rearrangement, for intervals of 5 to 100
#: steps, as a step is in the mean; and more of them, where intervals are compared
PRICED = (13, 41, 77)
OFTEN = (2, 17, 22, 37, 42, 57, 62, 77, 82, 97)
REARRANGE_EVERY, RESHARD_EVERY = 25, 100
RIVALS = ("fastermoe", "smartmoe", "flexmoe")  # that the paper compares with, beside EP
#: by the name in tables: the registered system
SYSTEMS = {
    "ep": "flat",
    "fastermoe": "fastermoe",
    "smartmoe": "smartmoe",
    "flexmoe": "flexmoe",
    "fsdp": "fsdp-experts",
    "eplb": "eplb",
    "hecate": "hecate",
    "hecate-rm": "hecate-rm",
}
#: of a layer's step, by kind of task; ``move``: between steps
PARTS = {"attention": "attention", "experts": "experts"}
PARTS |= dict.fromkeys(("metadata", "dispatch", "combine"), "all-to-all")
PARTS |= dict.fromkeys(("gather", "late", "regather"), "gather") | dict.fromkeys(("reduce", "spread"), "reduce")
#: what a step has once
ONCE = ("embedding", "head", "embedding.backward", "gradients-tail", "optimizer")


@dataclasses.dataclass(frozen=True)
class Options:
    """``every``: steps between rearrangements; ``slots``: of a rank, over E / W. Of Hecate: ``m`` copies of a layer on
    a device (None: as many as t), ``t``, ``reshard_every`` (0: never), ``materialises`` (False: sharding alone)."""

    every: int = REARRANGE_EVERY
    slots: int = 2
    m: int | None = None
    t: int | None = None
    reshard_every: int = RESHARD_EVERY
    materialises: bool = True
    calibrates: bool = False


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model on a cluster, ``samples`` sequences a rank. ``bw_ranks``: GPUs that share the paper's bw, where t is
    computed (1: it is the node's port, 8: each GPU has its part). ``passes_on``: nodes pass an expert on
    to the next, all at once: a gather lasts as long as what comes to the busiest node, a reduction as what leaves
    it."""

    model: Model
    cluster: Cluster
    samples: float
    efficiency: float = EFFICIENCY
    start_s: float = 0.0
    bw_ranks: int = 1
    passes_on: bool = False

    @property
    def tokens(self) -> int:
        return int(self.samples * self.model.seq)

    @functools.cached_property
    def machine(self) -> Machine:
        return Machine.data_sheet(self.cluster, self.efficiency, self.start_s)

    def priced(self, cost: Cost | None) -> Cost | None:
        """In seconds; of experts between nodes by the side on which less goes through the busiest port."""
        if not self.passes_on or not isinstance(cost, Transfer) or cost.scope != "inter":
            return self.machine.priced(cost)
        num_nodes, rate = self.cluster.shape[0], self.cluster.levels[0].unit_bytes_per_s
        assert rate is not None
        between = cost.matrix.reshape(num_nodes, self.cluster.num_ranks // num_nodes, num_nodes, -1).sum((1, 3))
        np.fill_diagonal(between, 0)
        seconds = cost.messages * self.start_s + min(between.sum(0).max(), between.sum(1).max()) / rate
        return Timed(cost.operation, cost.scope, seconds)

    @property
    def attention_s(self) -> float:
        """T_non-MoE, forward: projections and scores."""
        return float(
            self.machine.seconds(Compute(attention_macs(self.model.hidden, self.tokens, self.model.seq, causal=False)))
        )

    @property
    def overlap_degree(self) -> int:
        """t = T_non-MoE bw / expert_size."""
        rate = self.cluster.levels[0].unit_bytes_per_s
        assert rate is not None
        return int(self.attention_s * rate / self.bw_ranks / (PARAMETER * expert_parameters(self.model)))

    def experiment(self, name: str, num_layers: int, options: Options) -> Experiment:
        """Of a system, with what planners are told of the cluster: computation as fast as it is here."""
        assert self.cluster.device_flops_per_s is not None
        gemm = Gemm(alpha_s=0.0, beta_s_per_mac=2 / (self.efficiency * self.cluster.device_flops_per_s))
        return Experiment(
            model=self.model.model_copy(update={"num_layers": num_layers}),
            cluster=self.cluster.model_copy(update={"gemm": gemm}),
            workload=Workload(name="loads", tokens_per_rank=self.tokens),
            system=SYSTEMS[name],
            phase="train_step",
            dtype="bfloat16",
            compute="stand-in",
            options=self._options(name, options),
        )

    def _options(self, name: str, options: Options) -> dict[str, bool | int | float | str]:
        num_experts = self.model.num_experts
        match name:
            case "smartmoe":
                return {"place_every": options.every}
            case "flexmoe" | "eplb":
                slots = min(num_experts, options.slots * num_experts // self.cluster.num_ranks)
                return {"rearrange_every": options.every, "slots": slots}
            case "hecate" | "hecate-rm":
                t = self.overlap_degree if options.t is None else options.t
                t = min(t, num_experts) if options.materialises else 0
                found = {"t": t, "m": t if options.m is None else min(options.m, num_experts)}
                return {**found, "reshard_every": options.reshard_every, "calibrate": options.calibrates}
        return {}


class Loads(Routing):
    """A routing of which ``counts`` int [W, E] alone are known."""

    def __init__(self, counts: Array, top_k: int):
        self.__dict__.update(counts=counts, num_experts=counts.shape[1], k=top_k)

    @functools.cached_property
    def tokens(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple((self.counts.sum(1) // self.top_k).tolist())

    @property
    def top_k(self) -> int:
        return int(self.__dict__["k"])


# ------------------------------------------------------------------------------------------------------- the result


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
    setup: Setup, steps: list[Timeline], num_layers: int, move_s: float, once_s: float, busiest: float, copies: Copies
) -> Result:
    """``steps``: timelines [num_tasks, W] of those that are priced."""

    def mean(several: list[dict[str, float]]) -> dict[str, float]:
        return {name: float(np.mean([each.get(name, 0.0) for each in several])) for each in several for name in each}

    once = [sum(_lasts(each, name) for name in ONCE) for each in steps]
    return Result(
        setup.model.num_layers,
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


# -------------------------------------------------------------------------------------------------------- to play it


def play(setup: Setup, loads: Array, name: str, options: Options, at: tuple[int, ...] = PRICED) -> Result:
    """``loads`` int [WARM + steps, layers, W, E]: rows of each rank for each expert. ``at``: as ``PRICED``."""
    num_steps, num_layers = loads.shape[:2]
    machine, topology = setup.machine, Topology(setup.cluster.shape)
    training = Training(setup.experiment(name, num_layers, options), priced=False)
    priced = WARM + (num_steps - WARM) * np.array(at) // 100
    steps, moves, received, added, owned = [], [], [], [], 0
    for step, of_layers in enumerate(loads):
        routings = [Loads(counts, setup.model.top_k) for counts in of_layers]
        if step in priced:
            pairs = zip(training.cases, routings, strict=True)
            training.cases = [dataclasses.replace(case, routing=routing) for case, routing in pairs]
            steps.append(simulate(training.lay_out(setup.priced), machine, topology))
            received.append(sum(rows_of(each) for each in training.passages))
            added.append([copies_of(each) for each in training.passages])
            owned = max(owned, int(training.own.max()))
        if training.course.learns:
            moved = training.course.saw(step, routings, None)
            moves.append(float(np.max(machine.seconds(whole_state(moved)))))
    rows, copies = np.array(received), np.array(added)  # [steps, W], [steps, layers, W]
    if "slots" in training.experiment.options:  # set aside, used or not
        owned = num_layers * int(training.experiment.options["slots"])
    scale = setup.model.num_layers / num_layers
    resident = copies.max() if name in ("hecate-rm", "fsdp") else copies.sum(1).max() * scale
    return result(
        setup,
        steps,
        num_layers,
        float(np.mean(moves[WARM:])) if moves else 0.0,
        once_s(setup, name, options, np.round(training.own * scale).astype(int)),
        float((rows.max(-1) / rows.mean(-1)).max()),
        Copies(owned * scale, float(resident), float(copies.max())),
    )


def whole_state(moved: Cost | None) -> Cost | None:
    """What is done between steps, where an expert moves with all the state that mixed precision has (``OPTIMIZER``);
    a training that is executed in ``PARAMETER`` bytes has two moments of as many."""
    match moved:
        case InTurn():
            return InTurn(tuple(each for part in moved.parts if (each := whole_state(part)) is not None))
        case Transfer():
            times = (PARAMETER + OPTIMIZER) / (PARAMETER * (1 + MOMENTS))
            return dataclasses.replace(moved, matrix=moved.matrix * times)
    return moved


def rows_of(passage: Passage) -> Array:
    """That each rank computes, [W]."""
    return np.asarray(passage.rows.sum(-1))  # type: ignore[attr-defined]


def copies_of(passage: Passage) -> Array:
    """Of one batch on each rank, [W]."""
    own = passage.case.placement.hosts  # type: ignore[attr-defined]
    return np.asarray((getattr(passage, "hosts", own) & ~own).sum(0))


def once_s(setup: Setup, name: str, options: Options, num_own: Array) -> float:
    """Of ``ONCE``, in a step of the whole model."""
    whole = setup.experiment(name, setup.model.num_layers, options)
    step = PricedTraining(whole, (), (), num_own)
    tasks = [step.work(task) for task in ("embedding", "embedding_back", "head", "optimizer")]
    tasks.append(
        step.tail(step.stream.take("gradients-tail", step.stream.left_bytes, after_part=setup.model.num_layers))
    )
    return sum(float(np.max(setup.machine.seconds(each.cost))) for each in tasks)
