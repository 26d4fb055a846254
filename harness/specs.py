"""Model, cluster, workload, experiment: frozen, validated, hashable.

The hash of a resolved experiment is its identity: the store keys rows by it and ``run`` resumes by it.
Sizes are counts of elements unless a name says otherwise (``_s`` seconds, ``_bytes`` bytes).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from harness.errors import UserError, bad
from harness.groups import Groups
from harness.layout import Layout
from harness.model import EXPERTS_CHOOSE, GEMMS, Model
from harness.spec import Count, Name, Named, Spec, content_hash
from harness.topology import Topology

Phase = Literal["exchange", "layer", "train_step", "prefill", "decode"]
SERVING = ("prefill", "decode")  # phases of a whole model in inference
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
ExchangeDtype = Literal["float8_e4m3", "bfloat16"]  # of rows that travel
DTYPE_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# of one, or of a recipe's parts (``harness.recipes``)
SystemName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$", max_length=120)]
# operation.scope, or operation.scope@ranks where it was found on another number of ranks: a2a.inter1, ar.inter@16
CollectiveKey = Annotated[str, Field(pattern=r"^[a-z0-9]+\.[a-z0-9]+(@[1-9][0-9]*)?$")]


class Level(Spec):
    """One link level. ``size`` units of the next level inside; ``alpha_s``/``beta_s_per_byte`` of the link
    that joins them (per unit and direction), ``latency_s`` the one-way delay that an emulated link adds."""

    name: Name  # "node", "socket", "rank", ...
    size: Count
    bandwidth_bytes_per_s: Annotated[float, Field(gt=0)] | None = None  # of one port of a unit, one direction
    latency_s: Annotated[float, Field(ge=0)] = 0.0
    burst_bytes: Count | None = None  # token bucket of an emulated link; None: chosen from the rate
    ports: Count = 1  # of a unit (NICs of a node), each of as many neighbouring ranks, which use no other
    #: where nodes have unequal numbers of ranks, as the one level of a cluster: ranks behind each node's port
    ranks_per_port: tuple[Count, ...] = ()

    LATER: ClassVar[tuple[str, ...]] = ("ports", "ranks_per_port")

    @property
    def unit_bytes_per_s(self) -> float | None:
        """Of all ports of a unit together."""
        return None if self.bandwidth_bytes_per_s is None else self.ports * self.bandwidth_bytes_per_s


class Collective(Spec):
    """Start-up time, and time per byte of one rank's buffer, of one collective as a paper or a profile states it."""

    alpha_s: Annotated[float, Field(ge=0)]
    beta_s_per_byte: Annotated[float, Field(ge=0)]
    r2: float | None = None


class Gemm(Spec):
    """Start-up time and time per multiply-add (m n k of them) of a matrix product as a paper or a profile states it."""

    alpha_s: Annotated[float, Field(ge=0)]
    beta_s_per_mac: Annotated[float, Field(ge=0)]
    r2: float | None = None


class Cluster(Named):
    """Nodes, ranks, link levels (outermost first) and devices.

    ``kind``: ``local`` = ranks of this machine over unshaped loopback; ``emulated`` = ranks of this machine in
    network namespaces with shaped links; ``physical`` = a real cluster, whose preset holds published numbers.
    ``device``: the GPU as CUDA names it (``H100``, ``A100-SXM4-40GB``), which must then be there; ``cpu``: the CPU, and
    of a local cluster whatever the machine has.
    """

    kind: Literal["local", "emulated", "physical"]
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]
    loopback_bytes_per_s: Annotated[float, Field(gt=0)] | None = None  # emulated: what a node's ranks send each other
    collectives: dict[CollectiveKey, Collective] = {}  # published or profiled
    gemm: Gemm | None = None
    device: str = "cpu"
    device_flops_per_s: Annotated[float, Field(gt=0)] | None = None
    device_bytes_per_s: Annotated[float, Field(gt=0)] | None = None
    device_memory_bytes: Count | None = None
    source: str = ""
    interpretation: str = ""

    @model_validator(mode="after")
    def _ports_of_ranks(self) -> Cluster:
        for level, link in enumerate(self.levels):
            size = math.prod(self.shape[level + 1 :])
            if size % link.ports:
                raise ValueError(
                    f"level {link.name} has {link.ports} ports for {size} ranks of a unit; share them evenly"
                )
            if link.ranks_per_port:
                self._check_unequal(link)
            if link.ports > 1 and (why := self._no_ports(level)):
                raise ValueError(f"level {link.name} has {link.ports} ports, {why}")
        return self

    def _no_ports(self, level: int) -> str:
        """Why a unit of ``level`` has one port only; empty if it may have several."""
        if self.kind == "local":
            return "and a unit of this machine has one; leave it out, or make it kind: emulated"
        if self.kind == "emulated" and level != len(self.levels) - 2:
            return "and only nodes, the level above the ranks, are emulated with several; leave it out"
        if self.kind == "emulated" and self.loopback_bytes_per_s is not None:
            return "and loopback_bytes_per_s is for ranks of a node behind one; leave one of them out"
        return ""

    def _check_unequal(self, link: Level) -> None:
        unequal = f"level {link.name} has ranks_per_port = {list(link.ranks_per_port)}"
        if sum(link.ranks_per_port) != link.size:
            raise ValueError(f"{unequal}, together {sum(link.ranks_per_port)}, and size = {link.size}")
        if len(self.levels) > 1 or link.ports > 1:
            raise ValueError(f"{unequal}; such nodes, with one port each, are the one level of a cluster")
        if self.kind == "local" or link.latency_s:
            raise ValueError(f"{unequal}, which kind: local and latency_s do not know; leave one of them out")

    @property
    def shape(self) -> tuple[int, ...]:
        """Units per level, outermost first; their product is the number of ranks."""
        return tuple(level.size for level in self.levels)

    @property
    def profile_command(self) -> str:
        """What measures it, for whoever reads an error."""
        from harness import presets  # which reads clusters

        of_file = self.name not in (*presets.names("clusters"), *presets.this_machine.SIZES)
        return "moebench profile CLUSTER.yaml, a file of this cluster" if of_file else f"moebench profile {self.name}"

    def resized(self, num_nodes: int) -> Cluster:
        """With another number of units of the outermost level, and the same constants."""
        outer, *inner = self.levels
        levels = (outer.model_copy(update={"size": num_nodes}), *inner)
        return self.model_copy(update={"levels": levels, "name": f"{self.name}-{num_nodes}-nodes"})

    def with_ports(self, ports: int) -> Cluster:
        """With ``ports`` of an outermost unit that share its present rate."""
        outer, *inner = self.levels
        rate = None if outer.unit_bytes_per_s is None else outer.unit_bytes_per_s / ports
        outer = Level(**{**outer.model_dump(), "bandwidth_bytes_per_s": rate, "ports": ports})
        return Cluster.model_validate({**self.model_dump(), "levels": (outer, *inner)})

    def linear(self, key: str, num_ranks: int | None = None) -> tuple[float, float]:
        """alpha in seconds, beta in seconds per byte of a collective, or per multiply-add of ``gemm``. ``num_ranks``:
        of constants of several sizes (``a2a.inter@16``) those of this one; by default of the cluster's own."""
        if key == "gemm":
            if self.gemm is None:
                raise bad(f"cluster {self.name}.gemm", None, f"is not known; {self.profile_command}")
            return self.gemm.alpha_s, self.gemm.beta_s_per_mac
        at_size = f"{key}@{num_ranks or self.num_ranks}"
        found = self.collectives.get(at_size) or self.collectives.get(key)
        if found is None:
            known = ", ".join(sorted(self.collectives)) or "none"
            raise bad(
                f"cluster {self.name}.collectives",
                key,
                f"has no cost; known are {known}; {self.profile_command} measures them",
            )
        return found.alpha_s, found.beta_s_per_byte

    @property
    def num_ranks(self) -> int:
        return math.prod(self.shape)

    @property
    def device_type(self) -> str:
        """Of its ranks, as torch names it."""
        return "cuda" if self.kind == "physical" and self.device != "cpu" else "cpu"

    @property
    def num_nodes(self) -> int:
        """Units of the outermost levels that own a network port: all but the innermost level."""
        return len(self.levels[0].ranks_per_port) or math.prod(self.shape[:-1])


class Ragged(Spec):
    """Tokens of ranks that fall evenly from rank 0, which has ``max_over_mean`` times the mean, to the last one."""

    mean: Count
    max_over_mean: Annotated[float, Field(ge=1, le=2)] = 1.75
    multiple: Count = 1  # of which every rank has a whole number of tokens: of ``model.seq`` where samples are whole

    @model_validator(mode="after")
    def _whole(self) -> Ragged:
        if self.mean % self.multiple:
            raise ValueError(f"mean: {self.mean} is no multiple of {self.multiple}")
        return self

    def tokens(self, num_ranks: int) -> tuple[int, ...]:
        """Of each rank; together as many as with ``mean`` on each."""
        shares = np.linspace(self.max_over_mean, 2 - self.max_over_mean, num_ranks) if num_ranks > 1 else np.ones(1)
        ends = np.rint(np.cumsum(shares * (self.mean // self.multiple)))
        return tuple((np.diff(ends, prepend=0).astype(int) * self.multiple).tolist())

    def __str__(self) -> str:
        return f"{self.mean}, max/mean {self.max_over_mean:g}"


class Workload(Named):
    """Tokens per rank and where they go: a generator with a seed, or a recorded trace.

    ``params`` are the generator's own (``harness.routing.generators`` says where they and their ranges stand).
    """

    #: one number, or one per rank, or a rule that gives each rank another one
    tokens_per_rank: Count | tuple[Annotated[int, Field(ge=0)], ...] | Ragged = 1024
    generator: str = "balanced"  # a name of harness.routing.generators, or "trace", or "natural"
    params: dict[str, bool | float | int | str] = {}
    seed: Annotated[int, Field(ge=0)] = 0
    source: str = ""
    interpretation: str = ""

    @field_validator("tokens_per_rank", mode="before")
    @classmethod
    def _ragged(cls, given: Any) -> Any:
        """One reason, and not one for each kind of number that it is none of."""
        try:
            return Ragged.parse(given, "ragged") if isinstance(given, Mapping) else given
        except UserError as error:
            raise ValueError(str(error).removeprefix("ragged.")) from None

    def tokens(self, num_ranks: int) -> tuple[int, ...]:
        """Tokens of each rank; an error if the workload lists another number of ranks."""
        if isinstance(self.tokens_per_rank, Ragged):
            return self.tokens_per_rank.tokens(num_ranks)
        if isinstance(self.tokens_per_rank, int):
            return (self.tokens_per_rank,) * num_ranks
        if len(self.tokens_per_rank) != num_ranks:
            raise bad(
                f"workload {self.name}.tokens_per_rank",
                self.tokens_per_rank,
                f"lists {len(self.tokens_per_rank)} ranks but the cluster has {num_ranks}",
            )
        return self.tokens_per_rank


class Experiment(Spec):
    """model x cluster x workload x system x phase; ``digest`` is its identity in the store."""

    model: Model
    cluster: Cluster
    workload: Workload
    system: SystemName
    phase: Phase
    dtype: Dtype = "bfloat16"
    backward: bool = True
    wire: Literal["recv_first", "gloo"] = "recv_first"  # whose all-to-all runs under torch.distributed
    exchange_dtype: ExchangeDtype | None = None  # of rows that travel (harness.comm.packing); None: as they are
    loss_scale: int | str = "dynamic"  # of float16 training steps; a number is a power of two
    compute: Literal["real", "stand-in"] = "real"  # stand-in: a timed wait, as long as the cluster's gemm costs say
    model_parallel: bool = False  # attention's heads are shared out over the ranks of a node
    layout: Layout = Layout()
    options: dict[str, bool | int | float | str] = {}  # the system's own (pipeline chunks, 2DH, ...)

    LATER: ClassVar[tuple[str, ...]] = ("exchange_dtype", "loss_scale", "layout")

    @model_validator(mode="after")
    def _directions(self) -> Experiment:
        if self.phase in SERVING and self.backward:
            raise ValueError(f"phase {self.phase} has no backward; give backward: false")
        if self.phase == "train_step" and not self.backward:
            raise ValueError("phase train_step goes backward too; leave out backward: false, or give phase layer")
        return self

    @model_validator(mode="after")
    def _formats(self) -> Experiment:
        if self.exchange_dtype is not None and self.dtype in ("float64", self.exchange_dtype):
            why = "for exact checks" if self.dtype == "float64" else "and so are its rows"
            raise ValueError(f"exchange_dtype = {self.exchange_dtype}: dtype is {self.dtype} {why}; leave one out")
        scale = self.loss_scale
        if scale == "dynamic":
            return self
        if not isinstance(scale, int) or scale < 1 or scale & (scale - 1):
            raise ValueError(f"loss_scale = {scale} is neither a power of two, which rounds nothing, nor dynamic")
        if self.dtype != "float16" or self.phase != "train_step":
            of = f"phase {self.phase} in {self.dtype}"
            raise ValueError(f"loss_scale = {scale} belongs to train_step in float16, not to {of}; leave it out")
        return self

    @model_validator(mode="after")
    def _laid_out(self) -> Experiment:
        """One way of writing a layout; its degree of tensor parallelism is that of ``model_parallel``."""
        topology = Topology(self.cluster.shape)
        layout = self.layout.on(topology)
        shares = self.model_parallel or layout.tensor_parallel > 1
        degree = topology.num_ranks // topology.shape[0] if shares else 1
        self.__dict__.update(model_parallel=shares, layout=layout.model_copy(update={"tensor_parallel": degree}))
        return self

    @property
    def groups(self) -> Groups | None:
        """Its expert-parallel groups; None where all ranks are one."""
        return self.layout.groups(Topology(self.cluster.shape))

    @property
    def formats(self) -> str:
        """In words: of what is computed, and of rows that travel where that is another."""
        return self.dtype if self.exchange_dtype is None else f"{self.dtype}, rows {self.exchange_dtype}"

    @property
    def lacks(self) -> str | None:
        """What of its model the phase would run without, in words; None if nothing. It is refused for that."""
        return None if self.phase in ("exchange", "layer") else self.model.lacks

    @property
    def exactly_planned(self) -> bool:
        """Whether what is planned is what runs: not where routing differs from step to step, or is the model's own."""
        return not self.goes_on and not (self.phase in SERVING and self.workload.generator == "natural")

    @property
    def goes_on(self) -> bool:
        """Whether its routing is another one at each step: in trainings, and where a replay is served."""
        replayed = self.workload.generator == "trace" and bool(self.workload.params.get("replay"))
        return self.phase == "train_step" or (self.phase in SERVING and replayed)

    @property
    def race(self) -> str:
        """Identity of what systems race over: everything but the system, its options, drop rule and layout."""
        fields = self.model_dump(mode="json", exclude={"system", "options", "layout"})
        fields["model"].pop("capacity_factor")
        return content_hash(fields)


def with_levels(name: str, levels: Iterable[dict[str, Any]], **fields: Any) -> Cluster:
    """Build a cluster from plain dictionaries (tests and one-off clusters)."""
    return Cluster.parse({"name": name, "levels": list(levels), **fields}, f"cluster {name}")


__all__ = [
    "DTYPE_BYTES", "EXPERTS_CHOOSE", "GEMMS", "SERVING", "Cluster", "Collective", "Dtype", "ExchangeDtype",
    "Experiment", "Gemm", "Level", "Model", "Phase", "Spec", "UserError", "Workload", "with_levels",
]  # fmt: skip
