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
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from harness.layer.work import attention_macs, expert_parameters
from harness.memory import OPTIMIZER_STATES
from harness.plan.cost import Compute, Cost, InTurn, Timed, Transfer
from harness.plan.machine import Machine
from harness.plan.passage import Passage
from harness.plan.priced_step import PricedTraining
from harness.plan.simulate import simulate
from harness.routing.types import Routing
from harness.simulation import Training
from harness.specs import Cluster, Experiment, Gemm, Model, Workload
from harness.topology import Topology
from methods.hecate.memory_model import OPTIMIZER, PARAMETER, Copies
from methods.hecate.outcome import Result, result

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


# -------------------------------------------------------------------------------------------------------- to play it


def play(setup: Setup, loads: Array, name: str, options: Options, at: tuple[int, ...] = PRICED) -> Result:
    """``loads`` int [WARM + steps, layers, W, E]: rows of each rank for each expert. ``at``: as ``PRICED``."""
    machine, topology, num_layers = setup.machine, Topology(setup.cluster.shape), loads.shape[1]
    steps, moves = [], []

    def price(training: Training) -> None:
        steps.append(simulate(training.lay_out(setup.priced), machine, topology))

    def move(moved: Cost | None) -> None:
        moves.append(float(np.max(machine.seconds(whole_state(moved)))))

    held = follow(setup, loads, name, options, at, price, move)
    behind = float(np.mean(moves[WARM:])) if moves else 0.0
    once = once_s(setup, name, options, held.owned)
    return result(setup.model.num_moe_layers, steps, num_layers, behind, once, held.busiest, held.copies)


class Held(NamedTuple):
    """Of a training: ``owned`` [W], experts of the whole model; the rest as ``Result`` has it."""

    owned: Array
    busiest: float
    copies: Copies


def follow(
    setup: Setup,
    loads: Array,
    name: str,
    options: Options,
    at: tuple[int, ...] = PRICED,
    price: Callable[[Training], None] = Training.decide,
    move: Callable[[Cost | None], None] = lambda moved: None,
) -> Held:
    """What ranks hold and compute as a training goes on; ``price`` is told of the steps ``at``, and decides or
    lays them out, ``move`` of what is done behind each step."""
    num_steps, num_layers = loads.shape[:2]
    training = Training(setup.experiment(name, num_layers, options), priced=False)
    priced = WARM + (num_steps - WARM) * np.array(at) // 100
    received, added, owned = [], [], 0
    for step, of_layers in enumerate(loads):
        routings = [Loads(counts, setup.model.top_k) for counts in of_layers]
        if step in priced:
            pairs = zip(training.cases, routings, strict=True)
            training.cases = [dataclasses.replace(case, routing=routing) for case, routing in pairs]
            price(training)
            received.append(sum(rows_of(each) for each in training.passages))
            added.append([copies_of(each) for each in training.passages])
            owned = max(owned, int(training.own.max()))
        if training.course.learns:
            move(training.course.saw(step, routings, None))
    rows, copies = np.array(received), np.array(added)  # [steps, W], [steps, layers, W]
    if "slots" in training.experiment.options:  # set aside, used or not
        owned = num_layers * int(training.experiment.options["slots"])
    scale = setup.model.num_moe_layers / num_layers
    resident = copies.max() if name in ("hecate-rm", "fsdp") else copies.sum(1).max() * scale
    return Held(
        np.round(training.own * scale).astype(int),
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
            times = (PARAMETER + OPTIMIZER) / (PARAMETER * (1 + OPTIMIZER_STATES["bfloat16"]))
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
    whole = setup.experiment(name, setup.model.num_moe_layers, options)
    step = PricedTraining(whole, (), (), num_own)
    tasks = [step.work(task) for task in ("embedding", "embedding_back", "head", "optimizer")]
    tasks.append(
        step.tail(step.stream.take("gradients-tail", step.stream.left_bytes, after_part=setup.model.num_moe_layers))
    )
    return sum(float(np.max(setup.machine.seconds(each.cost))) for each in tasks)
