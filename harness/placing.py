"""``moebench place``: where the experts of a whole model go, planned from recorded routing and kept as a file.

A planner is found as a study is: ``methods/<name>/placers.py`` holds ``PLACERS``, a mapping from names to ``Placer``.
The harness knows none by name.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, model_validator

from harness import __version__, outputs, sealed
from harness.errors import UserError, bad, unknown, unreadable, words
from harness.layer.work import expert_parameters
from harness.placement import Placement
from harness.registry import brought
from harness.routing import Routing
from harness.specs import DTYPE_BYTES, Cluster, Count, Dtype, Model, Spec
from harness.system import Case
from harness.topology import Topology, check_size

SCHEMA_VERSION = 1
ROUNDS = 8  # of annealing for what is served: what a few layers need, and the same wherever it is planned
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What is to be placed. ``profile`` and ``held``: routing to plan by and to judge by, int [L, T, k] each.
    ``bandwidth``: between expert-parallel ranks, float64 [G, G], bytes per second or any unit (inf: free). For planners
    that predict times: ``cluster`` (None: its rates do not hold), of whose devices ``tensor_parallel`` make up a rank;
    ``tokens`` of each rank in a batch (empty: a sequence each); ``dtype``."""

    model: Model
    topology: Topology  # of the expert-parallel ranks
    bandwidth: np.ndarray
    profile: np.ndarray
    held: np.ndarray
    gap: float = 0.025
    time_limit_s: float = math.inf
    rounds: int | None = None  # of a search that could go on; None: as many as the planner likes
    cluster: Cluster | None = None
    tensor_parallel: int = 1
    tokens: tuple[int, ...] = ()
    dtype: Dtype = "bfloat16"
    say: Say = lambda text: None


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """``owner`` int [L, E]. ``objective``, ``bound``, ``gap``, ``ended`` and what else the planner has to say of it;
    ``scores``: by ``profile`` and ``held-out``; ``notes``: what to know before using it."""

    owner: np.ndarray
    objective: dict[str, Any]
    scores: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Placer:
    """``run`` raises ``UserError`` for what cannot be planned."""

    title: str
    run: Callable[[Request], Placed]


class PlacementFile(Spec):
    """A placement of all layers, and what is known of it. ``slots``: of each layer the experts of each rank."""

    schema_version: Count = SCHEMA_VERSION
    model: str
    num_experts: Count
    num_ranks: Count
    cluster: str
    tensor_parallel: Count = 1
    method: str
    slots: tuple[tuple[tuple[int, ...], ...], ...]
    objective: dict[str, Any] = {}
    scores: dict[str, dict[str, float]] = {}
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = {}
    time_s: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> PlacementFile:
        for layer, ranks in enumerate(self.slots):
            if len(ranks) != self.num_ranks:
                raise ValueError(f"layer {layer} has {len(ranks)} ranks, not num_ranks = {self.num_ranks}")
            experts = sorted(expert for rank in ranks for expert in rank)
            if experts != list(range(self.num_experts)):
                raise ValueError(f"layer {layer} must hold each of the {self.num_experts} experts once")
        return self

    @property
    def placements(self) -> list[Placement]:
        """Of every layer."""
        return [Placement.of_slots(ranks) for ranks in self.slots]

    def fit(self, model: Model, num_ranks: int, where: str) -> list[Placement]:
        """``placements``, if they are for such a model on so many ranks; else a ``UserError`` that names ``where``."""
        for field, own, wanted in (
            ("layers", len(self.slots), model.num_moe_layers),
            ("experts", self.num_experts, model.num_experts),
            ("ranks", self.num_ranks, num_ranks),
        ):
            if own != wanted:
                raise bad(where, f"{own} {field}", f"the experiment has {wanted}; plan for it with moebench place")
        return self.placements


def slots_of(owner: np.ndarray, num_ranks: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """owner int [L, E] -> the experts of each rank of each layer, ascending."""
    return tuple(tuple(tuple(np.flatnonzero(row == rank).tolist()) for rank in range(num_ranks)) for row in owner)


def write(path: Path, made: PlacementFile) -> None:
    """As JSON; ``UserError`` for a file that cannot be written."""
    outputs.write(path, sealed.seal(_finite(made.model_dump(mode="json")), "placement", indent=1) + "\n")


def check_out(path: Path) -> None:
    """``UserError`` if ``write`` could not write, or would replace what is no placement."""
    outputs.check(path, is_ours=outputs.starts_with(b'"tensor_parallel"'))


def read(path: Path) -> PlacementFile:
    """``UserError`` names the file and the field."""
    again = "make it again with moebench place"
    try:
        data = sealed.unseal(path.read_text(encoding="utf-8"), "placement")
    except (OSError, ValueError) as error:
        raise unreadable("placement", str(path), f"cannot be read ({words(error)}); {again}") from None
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        remedy = f"schema_version {version} is newer than this moebench reads ({SCHEMA_VERSION}); upgrade moebench"
        raise bad("placement", str(path), remedy)
    try:
        return PlacementFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "contents"
        raise unreadable(f"placement {path.name}: {field}", first["msg"].removeprefix("Value error, "), again) from None


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def placers() -> dict[str, Placer]:
    """Every planner by name, sorted."""
    return brought("placers", "PLACERS", Placer)


def placer(name: str, where: str = "--method") -> Placer:
    """The planner called ``name``; ``UserError`` with the nearest known name if there is none."""
    known = placers()
    if name not in known:
        raise unknown(where, name, known, "methods")
    return known[name]


def found_by(method: str, request: Request, where: str = "--method") -> Placed:
    """What the planner called ``method`` answers; an error if that is no placement."""
    found, shape = placer(method, where).run(request), (len(request.profile), request.model.num_experts)
    if not isinstance(found, Placed):
        raise TypeError(f"the placer {method} made no Placed but {type(found).__name__}")
    owner, num_ranks = found.owner, request.topology.num_ranks
    if owner.shape != shape or owner.dtype.kind not in "iu" or not np.all((owner >= 0) & (owner < num_ranks)):
        raise ValueError(f"the placer {method} must give ranks 0 to {num_ranks - 1} as integers {list(shape)}")
    return found


def planned(case: Case, profile: Sequence[Routing], method: str, where: str = "placement") -> list[Placement]:
    """Where the planner called ``method`` puts the experts of a served model, layer by layer, the same at every call;
    ``case``: of one of them; ``profile``: the routing of each, of other tokens than those that are served."""
    num_ranks = case.topology.num_ranks
    bandwidth = np.ones((num_ranks, num_ranks))
    if case.cluster is not None:
        check_memory(case.model, case.cluster, 1, num_ranks, case.dtype)
        bandwidth, _ = bandwidths(case.cluster)
    ids = np.stack([routing.ids for routing in profile])
    request = Request(
        *(case.model, case.topology, bandwidth, ids, ids),
        rounds=ROUNDS,
        cluster=case.cluster,
        tokens=tuple(case.routing.tokens),
        dtype=case.dtype,
    )
    return [Placement.of_slots(ranks) for ranks in slots_of(found_by(method, request, where).owner, num_ranks)]


# ------------------------------------------------------------------------------------------------------ the command


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The command's arguments."""

    model: str
    trace: Path
    cluster: str
    method: str
    tensor_parallel: int
    step: int | None
    held_out: float
    bandwidths: Path | None
    gap: float
    time_limit_s: float


def place(wanted: Wanted, say: Say, command: str) -> PlacementFile:
    """Everything is checked before any work starts; the errors are ``UserError``s."""
    from harness import presets
    from harness.routing import trace as traces

    placer(wanted.method)  # an unknown name is told before any work
    model, cluster = presets.model(wanted.model), presets.cluster(wanted.cluster)
    recorded = traces.read_trace(traces.find_trace(str(wanted.trace)))
    header = recorded.header
    check_profile(model, header.num_layers, header.num_experts, header.top_k, recorded.path.name)
    bandwidth, topology = bandwidths(cluster, wanted.tensor_parallel)
    if wanted.bandwidths is not None:
        bandwidth = read_bandwidths(wanted.bandwidths, topology.num_ranks)
    check_memory(model, cluster, wanted.tensor_parallel, topology.num_ranks)
    ids = traces.all_layers(recorded, wanted.step)[:, :, : model.top_k]
    profile, held = traces.split(ids, wanted.held_out, traces.window_of(recorded))
    began = time.perf_counter()
    request = Request(
        *(model, topology, bandwidth, profile, held, wanted.gap, wanted.time_limit_s),
        cluster=cluster if wanted.bandwidths is None else None,
        tensor_parallel=wanted.tensor_parallel,
        say=say,
    )
    found = found_by(wanted.method, request)
    return PlacementFile(
        model=model.name,
        num_experts=model.num_experts,
        num_ranks=topology.num_ranks,
        cluster=cluster.name,
        tensor_parallel=wanted.tensor_parallel,
        method=wanted.method,
        slots=slots_of(found.owner, topology.num_ranks),
        objective=found.objective,
        scores=found.scores,
        notes=found.notes,
        time_s=time.perf_counter() - began,
        provenance={
            "command": command,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "moebench": __version__,
            "trace": str(wanted.trace),
            "trace_sha256": hashlib.sha256(recorded.path.read_bytes()).hexdigest()[:16],
            "recorded_step": recorded.steps[-1] if wanted.step is None else wanted.step,
            "tokens_profiled": int(profile.shape[1]),
            "tokens_held_out": int(held.shape[1]),
            "bandwidths": str(wanted.bandwidths or cluster.name),
        },
    )


def bandwidths(cluster: Cluster, tensor_parallel: int = 1) -> tuple[np.ndarray, Topology]:
    """B float64 [G, G] between expert-parallel ranks (inf: as good as free), and their topology. B is the rate of one
    port at the outermost level that lies between the two; all equal where the cluster states none.

    Interpretation: ``tensor_parallel`` neighbours make up one expert-parallel rank, and each sends its own share, so B
    is that of a single port whatever their number; MoETuner's paper, which needs it, does not define it."""
    check_size(cluster.name, cluster.shape)
    *outer, inner = cluster.shape
    if tensor_parallel < 1 or inner % tensor_parallel:
        raise bad("--tensor-parallel", tensor_parallel, f"must divide the {inner} ranks of a node of {cluster.name}")
    topology = Topology((*outer, inner // tensor_parallel))
    rates = np.array([level.bandwidth_bytes_per_s or math.inf for level in cluster.levels] + [math.inf])
    found = rates[topology.level_between]
    off = ~np.eye(topology.num_ranks, dtype=bool)
    if topology.num_ranks > 1 and np.isinf(found[off]).all():
        found[off] = 1.0
    return found, topology


# --------------------------------------------------------------------------------------------------------- checks


def check_memory(model: Model, cluster: Cluster, tensor_parallel: int, num_ranks: int, dtype: str = "bfloat16") -> None:
    """``UserError`` where a rank's share of the experts does not fit its devices, with the ranks that would do."""
    if cluster.device_memory_bytes is None:
        return
    each = expert_parameters(model) * DTYPE_BYTES[dtype]
    whole, memory = each * model.num_experts * model.num_moe_layers, cluster.device_memory_bytes * tensor_parallel
    if whole / num_ranks > memory:
        text = f"{whole / num_ranks / 1e9:.0f} GB of experts on each, and {memory / 1e9:.0f} GB of memory"
        raise bad("expert-parallel ranks", num_ranks, f"{text}; use at least {math.ceil(whole / memory)}")


def check_profile(model: Model, num_layers: int, num_experts: int, top_k: int, name: str) -> None:
    """``UserError`` where a recording is of another model."""
    for field, own, recorded in (
        ("num_layers", model.num_moe_layers, num_layers),
        ("num_experts", model.num_experts, num_experts),
    ):
        if own != recorded:
            raise bad(
                f"model {model.name}.{field}", own, f"the trace {name} has {recorded}; record this model's routing"
            )
    if top_k < model.top_k:
        raise bad(f"model {model.name}.top_k", model.top_k, f"the trace {name} has only k = {top_k} experts per token")


def read_bandwidths(path: Path, num_ranks: int) -> np.ndarray:
    """Rows of numbers divided by commas (inf: free), float64 [G, G] for ``num_ranks`` = G; ``UserError`` names the
    file, and the rate that is none."""
    try:
        found = np.loadtxt(path, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        remedy = f"cannot be read ({words(error)}); give rows of numbers divided by commas"
        raise unreadable("--bandwidths", str(path), remedy) from None
    if found.shape != (num_ranks, num_ranks):
        raise bad(
            f"--bandwidths {path}", list(found.shape), f"must be [{num_ranks}, {num_ranks}], a rate between any two"
        )
    wrong = np.argwhere(~(found > 0) & ~np.eye(num_ranks, dtype=bool))
    if len(wrong):
        row, column = wrong[0].tolist()
        where = f"--bandwidths {path}: row {row + 1}, column {column + 1}"
        raise bad(where, found[row, column].item(), "must be a rate above 0, or inf")
    return found


__all__ = ["Placed", "PlacementFile", "Placer", "Request", "UserError", "placer", "placers", "read", "write"]
