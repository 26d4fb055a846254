"""The face that every system wears, native or real package.

A system is a class in a file of ``baselines/`` or a folder of ``methods/``; that is its registration. Modules there
must import cheaply: the package itself is imported inside ``missing``, ``version`` and ``build``.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from harness.dtypes import TORCH_DTYPE
from harness.groups import Groups
from harness.placement import Placement
from harness.routing.certificate import expert_counts
from harness.routing.types import Routing
from harness.specs import Cluster, Dtype, ExchangeDtype, Gemm, Model
from harness.topology import Topology

if TYPE_CHECKING:
    from harness.comm.job import Job
    from harness.layer.weights import Weights
    from harness.plan.cost import Operation
    from harness.plan.course import Course
    from harness.plan.graph import Timeline
    from harness.plan.passage import Passage


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One layer to build: shapes, where the experts live, and the routing that its tokens will take.

    ``routing`` is for planning (``planned_bytes``, ``refuse``); a layer routes by its own gate all the same.
    ``identity_experts``: phase ``exchange``; experts return their input, so that only dispatch and combine remain.
    """

    model: Model
    dtype: Dtype
    topology: Topology
    placement: Placement
    routing: Routing
    device: str = "cpu"
    identity_experts: bool = False
    options: dict[str, bool | int | float | str] = dataclasses.field(default_factory=dict)
    cluster: Cluster | None = None  # for systems that plan by its costs; None: there is no timing to plan for
    stand_in: bool = False  # computation is a timed wait, as long as the cluster's gemm costs say
    exchange_dtype: ExchangeDtype | None = None  # of rows that travel; None: the case's own
    room_bytes: float | None = None  # of a device, beside a training step's state and activations; None: not known
    groups: Groups | None = None  # expert-parallel ones, where there are several: a system is given ``parts``
    whole: Routing | None = None  # of a part: the routing of all groups

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPE[self.dtype]

    @property
    def stand_in_costs(self) -> Gemm | None:
        """By which computation waits; None: it computes."""
        return self.cluster.gemm if self.stand_in and self.cluster is not None else None

    @functools.cached_property
    def parts(self) -> list[Case]:
        """Of every expert-parallel group, as if it were alone; this one where all ranks are one."""
        from harness.plan.grouped import part_of

        return [self] if self.groups is None else [part_of(self, self.groups, at) for at in range(len(self.groups))]

    @property
    def load(self) -> np.ndarray:
        """Assignments to each expert in all groups, int64 [E], for what is decided alike in all."""
        return expert_counts(self.whole or self.routing).sum(0)

    @property
    def num_holders(self) -> int:
        """Ranks that share all experts among them."""
        return self.topology.num_ranks if self.groups is None else self.groups.size

    def of_rank(self, rank: int) -> Case:
        """Of the expert-parallel group of ``rank``."""
        return self if self.groups is None else self.parts[self.groups.of_rank(rank)[0]]

    def placed(self, placement: Placement) -> Case:
        """The same with experts elsewhere."""
        return self if placement is self.placement else dataclasses.replace(self, placement=placement)

    @property
    def ragged(self) -> bool:
        return len(set(self.routing.tokens)) > 1


@dataclasses.dataclass
class Gradients:
    """Weight gradients in the oracle's layout, after ``backward`` on this rank.

    ``gate``: of every replicated parameter, those in ``Weights.gate`` (``router`` [M, E] and what a gate has beside it)
    and the shared experts' (``harness.layer.weights.shared_names``), this rank's own contribution (its tokens only; the
    harness sums over ranks).
    ``experts``: for every local expert its w1 [M, H], w2 [H, M] (and w3 [M, H] for swiglu): already summed over
    the tokens of all ranks, because they came through the exchange.
    """

    gate: dict[str, torch.Tensor]
    experts: dict[int, dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class GradientSlices:
    """What a layer's backward sends of the gradients that are ready by then: bytes in its MoE part, beside its dense
    part, and after it (with its own), each in so many messages."""

    num_bytes: tuple[int, int, int] = (0, 0, 0)
    messages: tuple[int, int, int] = (1, 1, 1)


class MoELayer(nn.Module, abc.ABC):
    """One MoE layer on this rank.

    ``forward`` is the whole layer. For the ``exchange`` phase the harness calls ``prepare`` untimed (gate, where the
    system can do it apart) and times ``exchange``. ``gate_in_exchange`` says that the gate could not be taken out.
    """

    gate_in_exchange: bool = True
    step: int = 0  # of training, set by the harness: a noisy gate draws other noise at every step
    timeline: Timeline | None = None  # of the last training step, set by the harness

    @abc.abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T_rank, M] -> y [T_rank, M], both in the case's dtype."""

    def prepare(self, x: torch.Tensor) -> Any:
        """Everything before dispatch that the exchange need not repeat; detached from ``x``."""
        return None

    def exchange(self, x: torch.Tensor, state: Any) -> torch.Tensor:
        """Dispatch, (identity) experts, combine: x [T_rank, M] -> y [T_rank, M]."""
        return self.forward(x)

    def how(self) -> str:
        """By which kernels its experts compute, in words for a row; empty where there is but one way."""
        of_experts = getattr(getattr(self, "experts", None), "how", None)
        return "" if of_experts is None else str(of_experts())

    @abc.abstractmethod
    def gradients(self) -> Gradients: ...

    @abc.abstractmethod
    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters replicated on every rank (the router, shared experts): their gradients the harness sums over all
        ranks. All others are this rank's experts."""

    def router_parameters(self) -> list[nn.Parameter]:
        """Of the shared ones those that a prescribed workload leaves as they are: the gate's."""
        return self.shared_parameters()


class AfterStep(abc.ABC):
    """What a system does at the boundary of training steps, collectively: move experts, for instance."""

    @abc.abstractmethod
    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Behind the optimizer's update of ``step``."""

    def state(self) -> dict[str, Any]:
        """What this rank knows beside parameters and placements, for a checkpoint: tensors, numbers, lists of them."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Know it again; ``state`` on the same rank of a job of the same size."""
        assert not state


class System(abc.ABC):
    """A choice of gate, placement, exchange, schedule and expert state, or a real package behind the same face."""

    name: ClassVar[str]
    title: ClassVar[str]  # one line for tables and --help
    kind: ClassVar[Literal["package", "native"]]
    source: ClassVar[str]  # paper, section, or where the package comes from
    options: ClassVar[dict[str, str]] = {}  # option -> one-line meaning with its default
    #: options beside the defaults with which ``moebench check`` tries it too, layers and a few training steps, by name
    variants: ClassVar[dict[str, dict[str, bool | int | float | str]]] = {}
    #: options beside the defaults that cut its pipelines into several chunks; ``moebench check`` tries long batches so
    chunked: ClassVar[dict[str, bool | int | float | str]] = {}
    stands_in: ClassVar[bool] = False  # whether its computation can be a stand-in
    remembers: ClassVar[bool] = False  # whether where a batch's rows go depends on the batches before it
    #: whether all ranks of a job decide together where experts go between steps, so that replicas in several
    #: expert-parallel groups go alike
    moves_alike: ClassVar[bool] = False
    places: ClassVar[bool] = False  # whether it follows any placement, with unequal numbers of experts too
    stages: ClassVar[tuple[str, ...]] = ("flat",)  # of its exchange, outermost first: flat, or inter and intra
    #: parts of ``planned_bytes`` that travel by a collective of equal parts, and its operation (``Cost``'s)
    collectives: ClassVar[dict[str, Operation]] = {}
    preload: ClassVar[tuple[str, ...]] = ()  # slow modules of the package, imported once before ranks are forked

    @classmethod
    def alone(cls) -> type[System]:
        """What runs in one expert-parallel group."""
        return cls

    @classmethod
    def acts_between_steps(cls) -> bool:
        """Whether it does something at the boundary of training steps."""
        return cls.alone().after_step.__func__ is not System.after_step.__func__  # type: ignore[attr-defined]

    @classmethod
    def missing(cls) -> str | None:
        """None if it can be imported; else what is missing, why, and the exact command that brings it."""
        return None

    @classmethod
    def version(cls) -> str | None:
        """Version of the real package; None for native systems (provenance holds the commit)."""
        return None

    @classmethod
    def refuse(cls, case: Case) -> str | None:
        """Why this system cannot run this case, as data; None if it can."""
        return None

    @classmethod
    @abc.abstractmethod
    def tolerance(cls, dtype: Dtype) -> float:
        """Largest relative error (max norm) against the float64 oracle that its own arithmetic allows."""

    @classmethod
    @abc.abstractmethod
    def build(cls, case: Case, job: Job, weights: Weights) -> MoELayer:
        """Collective over the job: make the layer with ``weights``."""

    @classmethod
    def place(cls, case: Case, profile: Sequence[Routing]) -> list[Placement] | None:
        """Where the experts of a served model go, layer by layer, the same at every call; None: in index order.
        ``profile``: the routing of each layer, of other tokens than those that are served."""
        return None

    @classmethod
    def place_gradients(
        cls, layers: Sequence[MoELayer], case: Case, gradient_bytes: Sequence[int], scope: str
    ) -> list[GradientSlices]:
        """Where a training step all-reduces the gradients of its attentions, over ``scope`` (``flat``: all ranks,
        ``inter``: like ranks of the nodes): ``gradient_bytes`` of each layer, last layer first, as the slices. May also
        settle how ``layers``, last layer first, are cut beside them. What no slice takes is reduced after backward: by
        default, all."""
        return [GradientSlices()] * len(gradient_bytes)

    @classmethod
    def after_step(cls, layers: Sequence[MoELayer], case: Case, job: Job) -> AfterStep | None:
        """What to do at the boundary of training steps. ``layers``: first layer first."""
        return None

    @classmethod
    def copied_parameters(cls, case: Case) -> int:
        """Experts of other ranks that one rank may keep at a time in a training step, over all layers, with what it
        keeps of each beside (a gradient, moments), in experts' parameters; as far as it is known beforehand, for the
        memory that is asked for before the start."""
        return 0

    @classmethod
    def planned_bytes(cls, case: Case) -> dict[str, np.ndarray] | None:
        """Payload bytes that each rank sends to each rank, float64 [num_ranks, num_ranks] (diagonal 0), by part:
        ``metadata``, ``dispatch``, ``combine`` (forward) and ``combine_grad``, ``dispatch_grad``, ``metadata_grad``
        (backward). None where it cannot be planned."""
        return None

    @classmethod
    def layout(cls, case: Case) -> Passage | None:
        """The priced twin of ``build``: the layer's tasks with what they cost, before any training. None where bytes
        cannot be planned. By default one task a direction, of ``planned_bytes``, as a real package is."""
        from harness.plan.priced import PricedOpaque

        parts = cls.planned_bytes(case)
        return None if parts is None else PricedOpaque(cls, case, parts)

    @classmethod
    def course(cls, cases: Sequence[Case]) -> Course:
        """The priced twin of what ``after_step`` and policies do from step to step. ``cases``: first layer first."""
        from harness.plan.course import Course

        return Course(cls, cases)

    @classmethod
    def settle(
        cls, cases: Sequence[Case], gradient_bytes: Sequence[int], scope: str
    ) -> tuple[list[Case], list[GradientSlices]]:
        """The priced twin of ``place_gradients``: ``cases``, first layer first, with the options that this settles, and
        the slices of the stream, last layer first."""
        return list(cases), [GradientSlices()] * len(gradient_bytes)

    @classmethod
    def planned_shares(cls, case: Case) -> np.ndarray:
        """Which part of each expert's rows each rank computes, float64 [E, num_ranks]."""
        return case.placement.hosts / case.placement.hosts.sum(1, keepdims=True)

    @classmethod
    def planned_rows(cls, case: Case) -> np.ndarray:
        """Rows that each rank computes of each expert, float64 [num_ranks, E]: those that are routed there, and what
        buffers are filled up with."""
        return (cls.planned_shares(case) * expert_counts(case.routing).sum(0)[:, None]).T

    @classmethod
    def kept(cls, case: Case, probabilities: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """For a system that drops: which assignments survive, by its own documented rule and not its code.
        ``probabilities``: float64 softmax over all experts of each rank's tokens, [T_r, E] per rank.
        Returns bool [T_r, E] per rank; None if nothing is ever dropped."""
        return None
