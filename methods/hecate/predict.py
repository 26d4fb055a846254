"""What the simulator says of executed training steps, from the profiler's calibration alone: tasks as they stand in the
plan, of the bytes that each system plans, on lanes.

For steps whose computation is a stand-in (attention and experts wait as long as the cluster's gemm costs say), of the
systems that go through the native layer. A transfer takes what the busiest port carries over the rate that the
profiler found there; an exchange and the experts between take what they take on the busiest rank. What the processor
does beside costs what it took in the executed steps of one system of the run, where there are any
(``harness.plan.host``); the optimizer by what a rank owns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from baselines._smart_schedule import apart
from baselines.fastermoe import FasterMoE, num_groups
from baselines.smartmoe import greedy
from harness import ledger
from harness.bench.store import Store
from harness.case import case_of
from harness.comm.replicas import nearest
from harness.comm.sparse import SparsePlan, plan_sparse
from harness.layer.work import ATTENTION_GEMMS, attention_macs, expert_macs, kv_fraction
from harness.ledger import Calibration
from harness.memory import expert_bytes, state_bytes
from harness.placement import Placement
from harness.plan.agreement import Agreement, agreement
from harness.plan.copied import CopiedSystem
from harness.plan.cost import Hold
from harness.plan.graph import COMPUTE, INTER, INTRA, Plan, Timeline
from harness.plan.host import Seconds, beside, merged, unlayered
from harness.plan.links import Line, Ports
from harness.plan.machine import Machine
from harness.plan.native import NativeSystem
from harness.plan.replicated import ReplicatedSystem
from harness.plan.simulate import simulate
from harness.registry import system
from harness.routing.certificate import expert_counts
from harness.specs import DTYPE_BYTES, GEMMS, Experiment
from harness.system import Case, System
from harness.topology import Topology
from methods.hecate.shard import shard

Array = np.ndarray
SYSTEM = "flat"  # whose steps say what the processor does beside


@dataclasses.dataclass(frozen=True)
class Links:
    """Bytes per second, as the profiler found them: of a node's port, and of all that ranks of a node send each
    other; ``all_reduce``: alpha and beta of one over all ranks."""

    topology: Topology
    port: float
    inside: float
    all_reduce: tuple[float, float]

    @classmethod
    def of(cls, calibration: Calibration) -> Links:
        topology = Topology(calibration.profiled.shape)
        nodes, inner = topology.shape[0], topology.num_ranks // topology.shape[0]
        between, within = calibration.fit("a2a.inter"), calibration.fit("a2a.intra")
        whole = calibration.fit("ar.flat")
        return cls(
            topology,
            inner * (nodes - 1) / nodes / _beta(between),
            inner * (inner - 1) / inner / _beta(within),
            (whole.alpha_s, _beta(whole)),
        )

    def seconds(self, matrix: Array) -> tuple[float, float]:
        """Of bytes [num_ranks, num_ranks]: until they have crossed between nodes, and inside them."""
        lines = Line(0, self.port), Line(1, self.inside, shared=True)
        between, inside = (Ports(self.topology, (line,)).of(matrix) for line in lines)
        return float(between), float(inside)

    def both(self, matrix: Array) -> float:
        """Side by side, as in one exchange."""
        return max(self.seconds(matrix))


def _beta(fit: Any) -> float:
    return float(fit.beta_s_per_byte)


#: tasks of a transfer in the order of their lanes: name, lane, seconds
Tasks = tuple[tuple[str, str, float], ...]


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """Seconds of one layer's tasks. ``sent``: by part of ``System.planned_bytes``, of each piece of the exchange;
    ``computed``: of each piece; ``shadows_s``: of what is computed last; transfers: ``gather`` before the experts,
    ``late`` behind the dispatch, ``regather``, and ``reduce``, which goes inside first (and to copies again)."""

    attention_s: float
    metadata_s: float
    metadata_grad_s: float
    sent: Mapping[str, tuple[float, ...]]
    computed: tuple[float, ...]
    shadows_s: float
    gather: Tasks = ()
    late: Tasks = ()
    regather: Tasks = ()
    reduce: Tasks = ()


def cases_of(known: type[System], experiment: Experiment, topology: Topology) -> list[Case]:
    """The layers of a step, with t as Hecate profiles it in its second step, and with experts where a placement or a
    re-sharding has brought them whose interval is an option (it is longer than a run otherwise)."""
    cases = [case_of(experiment, layer=layer) for layer in range(experiment.model.num_layers)]
    options, model = dict(experiment.options), experiment.model
    if "t" in known.options and "t" not in options:
        bandwidth = experiment.cluster.levels[0].unit_bytes_per_s or 0.0
        gathered = attention_s(cases[0]) * bandwidth / expert_bytes(model, experiment.dtype)
        options["t"] = min(model.num_experts, int(gathered))
    loads = np.stack([expert_counts(case.routing).sum(0) for case in cases])
    placements = [case.placement for case in cases]
    if "place_every" in options:
        placements = [greedy(load, placement) for load, placement in zip(loads, placements, strict=True)]
    elif options.get("reshard_every"):
        owners = shard(loads, int(options["t"]), topology, np.stack([each.owner for each in placements]))
        placements = [Placement.reshaped(owner, each) for owner, each in zip(owners, placements, strict=True)]
    return [
        dataclasses.replace(case, options=options, placement=placement)
        for case, placement in zip(cases, placements, strict=True)
    ]


def attention_s(case: Case) -> float:
    """Forward, as its stand-in waits."""
    gemm, model = case.stand_in_costs, case.model
    assert gemm is not None
    tokens = max(case.routing.tokens)
    context = min(model.seq, tokens)
    macs = attention_macs(model.hidden, tokens, context, causal=False, kv_fraction=kv_fraction(model))
    return float(ATTENTION_GEMMS * gemm.alpha_s + macs * gemm.beta_s_per_mac)


def layer_costs(known: type[System], case: Case, links: Links) -> LayerCosts | None:
    """None where the bytes of a layer are not known."""
    gemm, model = case.stand_in_costs, case.model
    assert gemm is not None
    parts = known.planned_bytes(case)
    if parts is None:
        return None
    hosts = hosts_of(known, case)
    rows = nearest(hosts, links.topology).rows(expert_counts(case.routing))  # [source, E, rank]
    masks = [np.ones(rows.shape[::2], dtype=bool)]
    shadows = np.zeros(rows.shape[2])
    if issubclass(known, FasterMoE) and (groups := num_groups(case)) > 1:
        distance = apart(links.topology.num_ranks, groups)
        masks = [distance == j for j in range(groups)]
        home = np.arange(rows.shape[2])
        copied = hosts & ~case.placement.hosts
        stays = np.where(copied.T, rows[home, :, home], 0)  # [rank, E]
        shadows = stays.sum(1)
        rows = rows.copy()
        rows[home, :, home] -= stays
    row_macs = expert_macs(model)
    start_s = GEMMS[model.ffn_type] * gemm.alpha_s
    busiest = [float((rows.sum(1) * mask).sum(0).max()) for mask in masks]
    shadows_s = start_s + float(shadows.max()) * row_macs * gemm.beta_s_per_mac if shadows.any() else 0.0
    return LayerCosts(
        attention_s(case),
        links.both(parts["metadata"]),
        links.both(parts["metadata_grad"]) if "metadata_grad" in parts else 0.0,
        {
            name: tuple(links.both(parts[name] * (mask if out else mask.T)) for mask in masks)
            for name, out in (("dispatch", True), ("combine", False), ("combine_grad", True), ("dispatch_grad", False))
        },
        tuple(start_s + most * row_macs * gemm.beta_s_per_mac for most in busiest),
        shadows_s,
        **transfers(known, case, links),
    )


def transfers(known: type[System], case: Case, links: Links) -> dict[str, Tasks]:
    """Of copies, as ``harness.plan.replicated`` and ``harness.plan.copied`` lay them out."""
    owner, own, each = case.placement.owner, case.placement.hosts, expert_bytes(case.model, case.dtype)

    def gather(name: str, hosts: Array) -> Tasks:
        """What comes from inside the node goes beside what crosses between nodes, and before what does so after it."""
        sparse = plan_sparse(owner, hosts, links.topology)
        near, far = (links.seconds(sparse.bytes(each, near)) for near in (True, False))
        return (f"{name}.{INTER}", INTER, far[0]), (f"{name}.near", INTRA, near[1]), (f"{name}.{INTRA}", INTRA, far[1])

    def home(name: str, sparse: SparsePlan) -> Tasks:
        between, inside = links.seconds(sparse.bytes(each).T)
        return (f"{name}.{INTRA}", INTRA, inside), (f"{name}.{INTER}", INTER, between)

    if issubclass(known, CopiedSystem):
        first = known.first(case)
        sparse = plan_sparse(first.owner, first.hosts, links.topology)
        between, inside = links.seconds(sparse.bytes(each))
        spread: Tasks = (f"spread.{INTER}", INTER, between), (f"spread.{INTRA}", INTRA, inside)
        return {"reduce": (*home("reduce", sparse), *spread)}
    if not issubclass(known, ReplicatedSystem):
        return {}
    policy = known.policy(case, None)
    early, hosts = known.planned_hosts(case, policy, case.routing)
    found = {"gather": gather("gather", early), "late": gather("late", (hosts & ~early) | own)}
    found["reduce"] = home("reduce", plan_sparse(owner, hosts, links.topology))
    return found | ({"regather": gather("regather", hosts)} if policy.rematerialises else {})


def hosts_of(known: type[System], case: Case) -> Array:
    """Who holds what in a batch, bool [E, num_ranks]."""
    if issubclass(known, CopiedSystem):
        return known.first(case).hosts
    if issubclass(known, ReplicatedSystem):
        return known.planned_hosts(case, known.policy(case, None), case.routing)[1]
    return case.placement.hosts


def step_plan(experiment: Experiment, links: Links, processor_s: Seconds | None = None) -> Plan | None:
    """The tasks of one training step, priced; None where some are not known. ``processor_s``: ``host.beside``."""
    known = system(experiment.system)
    if not issubclass(known, NativeSystem | ReplicatedSystem | CopiedSystem):
        return None
    cases = cases_of(known, experiment, links.topology)
    found = [layer_costs(known, case, links) for case in cases]
    layers = [each for each in found if each is not None]
    if len(layers) < len(found):
        return None
    plan, extra = Plan(), processor_s or {}

    def add(name: str, lane: str, seconds: float, after: list[str]) -> str:
        return plan.add(name, lane, after, Hold(seconds))

    def transfer(prefix: str, tasks: Tasks, after: list[str]) -> list[str]:
        """One task behind another, but ``near``, which waits for none of them."""
        last, ends = after, []
        for name, lane, seconds in tasks:
            if seconds and name.endswith(".near"):
                ends = [add(f"{prefix}{name}", lane, seconds, after)]
            elif seconds:
                last = [add(f"{prefix}{name}", lane, seconds, last)]
        return [*ends, *last]

    def exchange(prefix: str, each: LayerCosts, there: str, back: str, factor: int, needed: list[str]) -> list[str]:
        out, home_s = (each.sent[name if factor == 1 else f"{name}_grad"] for name in (there, back))
        sent = [add(f"{prefix}{there}[{j}]", INTER, s, []) for j, s in enumerate(out)]
        late = transfer(prefix, each.late, [f"{prefix}metadata"]) if factor == 1 else []
        made = [
            add(f"{prefix}experts[{j}]", COMPUTE, factor * s, [arrived, *needed])
            for j, (s, arrived) in enumerate(zip(each.computed, sent, strict=True))
        ]
        last = [add(f"{prefix}experts", COMPUTE, factor * each.shadows_s, [made[-1], *late])]
        home = [add(f"{prefix}{back}[{j}]", INTER, s, [made[j]]) for j, s in enumerate(home_s)]
        if factor == 2 and each.metadata_grad_s:
            home = [add(f"{prefix}metadata", INTER, each.metadata_grad_s, [])]
        return [*last, home[-1]]

    def processor(name: str, after: list[str], seconds: float = 0.0) -> list[str]:
        """``seconds``: of a stand-in."""
        return [add(name, COMPUTE, seconds + extra.get(unlayered(name), 0.0), after)]

    last = processor("embedding", [])
    for i, each in enumerate(layers):
        prefix = f"layer{i}.forward."
        ready = transfer(prefix, each.gather, [])
        last = processor(f"{prefix}attention", last, each.attention_s)
        last = processor(f"{prefix}gate", last)
        add(f"{prefix}metadata", INTER, each.metadata_s + extra.get("forward.metadata", 0.0), last)
        last = exchange(prefix, each, "dispatch", "combine", 1, ready)
        last = processor(f"{prefix}restore", last)
    last = processor("head", last)
    again: list[str] = []  # of the layer whose backward is next; the last one's copies stay
    awaited: list[str] = []
    for i in reversed(range(len(layers))):
        each, prefix = layers[i], f"layer{i}.backward."
        add(f"{prefix}start", INTER, 0.0, processor(f"{prefix}restore", last))
        last = processor(f"{prefix}gate", exchange(prefix, each, "combine", "dispatch", 2, again))
        awaited += transfer(prefix, each.reduce, [f"{prefix}experts"])
        if i:
            again = transfer(f"layer{i - 1}.backward.", layers[i - 1].regather, [])
        last = processor(f"{prefix}attention", last, 2 * each.attention_s)
    last = processor("embedding.backward", last)
    alpha, beta = links.all_reduce
    seconds = sum(alpha + beta * num_bytes for num_bytes in _replicated_bytes(experiment))
    tail = add("gradients-tail", INTER, seconds, [*last, *awaited])
    more = _optimizer_bytes(known, experiment, cases) / _optimizer_bytes(system(SYSTEM), experiment, cases)
    add("optimizer", COMPUTE, more * extra.get("optimizer", 0.0), [tail])
    return plan


def _optimizer_bytes(known: type[System], experiment: Experiment, cases: Sequence[Case]) -> float:
    """Of the rank that owns the most; whole copies are as good as owned."""
    copied = issubclass(known, CopiedSystem)
    own = sum((known.first(case) if copied else case.placement).hosts.sum(0) for case in cases)  # type: ignore[attr-defined]
    return state_bytes(experiment, cases[0].topology, int(np.max(own)))["optimizer"]


def _replicated_bytes(experiment: Experiment) -> list[float]:
    """All-reduces at the end of a step: gradients of the attentions, of embeddings and norms, and of routers."""
    model, width = experiment.model, DTYPE_BYTES[experiment.dtype]
    head = model.hidden // model.num_heads
    attention = 2 * model.hidden * head * (model.num_heads + (model.num_kv_heads or model.num_heads))
    rest = (model.vocab + model.seq + 1 + 2 * model.num_layers) * model.hidden
    routers = model.num_layers * model.hidden * model.num_experts
    return [model.num_layers * attention * width, rest * width, routers * max(4, width)]


class Simulator:
    """For the report of a run (``harness.report.own_run``): the newest calibration of its cluster, and of the run what
    the processor does beside in steps of ``SYSTEM``. ``folder``: the ledger's."""

    def __init__(self, folder: Path = ledger.LEDGER):
        self.folder = folder

    def predictions(self, run: Any) -> pd.DataFrame:
        """Of every cell in phase ``train_step`` whose tasks are known here."""
        rows, of_shape = [], self._beside(run)
        for cell, data in run.experiments.items():
            experiment = Experiment.model_validate(data)
            for timeline in self._timelines(experiment, of_shape.get(_shape(experiment))).values():
                rows.append({"cell": cell, "direction": "total", "predicted_s": float(timeline.total_s)})
        return pd.DataFrame(rows, columns=["cell", "direction", "predicted_s"])

    def timelines(self, run: Any, cell: str) -> Mapping[str, Timeline]:
        experiment = Experiment.model_validate(run.experiments[cell])
        return self._timelines(experiment, self._beside(run).get(_shape(experiment)))

    def agreement(self, frame: pd.DataFrame) -> Agreement:
        """Of the cells from which nothing was taken."""
        return agreement(frame[frame["label"] != SYSTEM])

    def _beside(self, run: Any) -> dict[str, Seconds]:
        """By ``_shape``."""
        found: dict[str, list[Seconds]] = {}
        for cell, data in run.experiments.items():
            experiment = Experiment.model_validate(data)
            if experiment.system != SYSTEM or not (simulated := self._timelines(experiment)):
                continue
            if (executed := Store(run.path).trace(cell).get("step")) is not None:
                found.setdefault(_shape(experiment), []).append(beside(executed, simulated["step"]))
        return {shape: merged(several) for shape, several in found.items()}

    def _timelines(self, experiment: Experiment, extra: Seconds | None = None) -> dict[str, Timeline]:
        if experiment.phase != "train_step" or experiment.compute != "stand-in" or experiment.cluster.gemm is None:
            return {}
        cluster = experiment.cluster
        found = ledger.profiled(cluster, self.folder)
        plan = step_plan(experiment, Links.of(found), extra)
        machine = Machine.profiled(cluster, found, "stand-in")
        return {} if plan is None else {"step": simulate(plan, machine)}


def _shape(experiment: Experiment) -> str:
    """What the processor's part of a step depends on."""
    return repr((experiment.model, experiment.cluster.name, experiment.dtype, experiment.workload.tokens_per_rank))
