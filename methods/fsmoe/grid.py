"""FSMoE's experiments, simulated: the 1,458 configured layers of Table 4 on both testbeds, under six schedules."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import pandas as pd

from harness import presets
from harness.comm.journey import Cut
from harness.errors import bad
from harness.layer.work import ATTENTION_GEMMS, attention_macs
from harness.plan.cost import Compute, Even, Hold
from harness.plan.graph import COMPUTE, INTRA, Plan, Work
from harness.plan.machine import Contention, Machine
from harness.plan.passage import Dense, Direction, backward_layer, forward_layer
from harness.plan.schedule import Chunks
from harness.plan.simulate import simulate
from harness.specs import GEMMS, Cluster
from methods.fsmoe.costs import LayerCosts, attention_gradient_elements, layer_costs, reduce_costs
from methods.fsmoe.degree import DEGREES, closed_form, scan_degree
from methods.fsmoe.sizes import PricedSlots, Sizes, Slices
from methods.fsmoe.step import POLICIES, Decision, Policy, reduction

ELEMENT_BYTES = 4  # the authors' driver runs in float32
TESTBEDS = {"A": ("fsmoe-a", (512, 1024, 2048)), "B": ("fsmoe-b", (256, 512, 1024))}
HEADS = (8, 16, 32)  # no published cost depends on them


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What the paper leaves open, each an interpretation; the defaults were chosen before any result was seen.

    ``top_k``: not stated for the grid; 2 as in the paper's real models. ``no_drop``: copies of a token that f = *
    stands for; without skew no drop means k of them (None), the authors' driver counts 1.
    """

    top_k: int = 2
    no_drop: float | None = None
    dense: bool = True  # the configured layer has attention and its model-parallel collectives
    gradient: bool = True
    attention: Literal["gemm", "driver"] = "gemm"  # priced as GEMMs, or by the time model in the authors' driver
    least_a2a_s: float = 0.0  # a layer whose all-to-all is shorter is not cut; the authors' code has 1 ms
    contention: Contention = dataclasses.field(default_factory=dict)  # between lanes; the paper's model has none
    revise: Callable[[Cluster], Cluster] = lambda published: published  # other readings of the published constants


def table4(lengths: tuple[int, ...], heads: tuple[int, ...] = HEADS) -> pd.DataFrame:
    """The grid: one row a layer (B, heads, L, M, H/M, f, FFN type); f NaN where nothing is dropped."""
    rows = itertools.product(
        (1, 2, 4), heads, lengths, (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4, np.nan), ("gpt", "swiglu")
    )
    return pd.DataFrame(rows, columns=["batch", "heads", "seq", "hidden", "ffn_ratio", "factor", "ffn_type"])


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """[N] generalized layers on one rank of a cluster. Their dense part: an all-gather and a reduce-scatter of
    ``token_bytes`` (None: no dense part) among the model-parallel ranks of a node, and attention between them."""

    cluster: Cluster
    forward: Sizes
    backward: Sizes
    token_bytes: Any
    attention: Compute | Hold  # in forward, half of that in backward
    gradient_bytes: Any
    num_ranks: int | None = None

    @functools.cached_property
    def costs(self) -> LayerCosts:
        """Of forward, for the planners."""
        return layer_costs(self.forward, self.cluster, self.num_ranks)

    def machine(self, contention: Contention | None = None) -> Machine:
        return Machine.published(self.cluster, self.num_ranks, contention)

    def dense_work(self, direction: Direction, task: str) -> Work:
        """Of a task of ``harness.plan.step.SHARED``."""
        if task in ("mp-gather", "mp-scatter"):
            return Work(Even("ag" if task == "mp-gather" else "rs", "intra", self.token_bytes))
        if task != "attention":
            return Work()
        times = {"forward": 1, "backward": 2}[direction]
        if isinstance(self.attention, Hold):
            return Work(Hold(times * self.attention.seconds))
        return Work(Compute(times * self.attention.macs, times * self.attention.launches))

    def dense(self, direction: Direction) -> list[Dense]:
        if self.token_bytes is None:
            return []
        lanes = {"mp-gather": INTRA, "attention": COMPUTE, "mp-scatter": INTRA}
        return [Dense(task, lane, self.dense_work(direction, task)) for task, lane in lanes.items()]

    def dense_backward_s(self) -> Any:
        machine = self.machine()
        return sum(np.asarray(machine.seconds(part.work.cost)) for part in self.dense("backward"))

    def at(self, chosen: np.ndarray) -> Layers:
        """Those ``chosen`` (indices)."""
        shape = np.shape(self.gradient_bytes)

        def of(value: Any) -> Any:
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return dataclasses.replace(
                    value, **{each.name: of(getattr(value, each.name)) for each in fields(value)}
                )
            return np.broadcast_to(value, shape)[chosen] if isinstance(value, np.ndarray) else value

        varied = ("forward", "backward", "token_bytes", "attention", "gradient_bytes")
        return dataclasses.replace(self, **{name: of(getattr(self, name)) for name in varied})


class Generalized(PricedSlots):
    """``Layers`` that are cut alike. The paper prices no gate and no order; ``gate``: of studies that do, in forward,
    half of that in backward."""

    def __init__(
        self,
        layer: Layers,
        policy: Policy,
        degrees: tuple[int, int],
        slices: Slices = (None, None, None),
        gate: Compute | None = None,
    ):
        self.layer, self.placed, self.gate = layer, slices, gate
        self.schedule, self.cut = Chunks(policy.overlap), Cut(*degrees, whole=False)
        self.sizes = {"forward": layer.forward, "backward": layer.backward}

    def work(self, direction: Direction, task: str, part: tuple[int, ...] = ()) -> Work:
        if task not in ("gate", "restore"):
            return super().work(direction, task, part)
        if task == "restore" or self.gate is None:
            return Work()
        times = {"forward": 1, "backward": 2}[direction]
        return Work(Compute(times * self.gate.macs, times * self.gate.launches))

    def forward(self, plan: Plan, **where: Any) -> list[str]:
        return self.there_and_back(plan, **where) if self.gate is None else super().forward(plan, **where)

    def backward(self, plan: Plan, **where: Any) -> list[str]:
        return self.back_and_there(plan, **where) if self.gate is None else super().backward(plan, **where)

    def dense(self, direction: Direction) -> list[Dense]:
        return self.layer.dense(direction)

    def slices(self) -> Slices:
        return self.placed


def layers(
    cluster: Cluster,
    *,
    batch: Any,
    seq: Any,
    hidden: Any,
    ffn: Any,
    copies: Any,
    num_gemms: Any,
    kv_fraction: Any = 1.0,
    biased: Any = True,
    attention_s: Any = None,
    dense: bool = True,
    gradient: bool = True,
    num_ranks: int | None = None,
) -> Layers:
    """Layers of ``batch`` B samples of ``seq`` L tokens per node, ``copies`` F = k f rows a token; arrays [N].

    B L tokens are those of a node, whose ranks share them and shard its expert (N_MP = N_ESP = ranks of a node). Work
    sizes as in the authors' solver: n_a2a = F B L M / N_ESP, n_ag = n_rs = F B L M elements of one rank's buffer,
    n_exp = F B L M H / N_ESP multiply-adds a GEMM. Attention is priced as four GEMMs (projections, scores, values,
    output), or given as ``attention_s``, the seconds of its forward. ``num_ranks``: as ``layer_costs``.
    """
    num_mp = cluster.shape[-1]
    tokens, hidden = np.asarray(batch, dtype=np.float64) * seq, np.asarray(hidden, dtype=np.float64)
    slots = np.asarray(copies) * tokens * hidden / num_mp
    forward, backward = Sizes.both(slots, ffn, np.asarray(num_gemms), ELEMENT_BYTES, num_mp)
    macs = attention_macs(hidden, tokens, seq, causal=False, kv_fraction=np.asarray(kv_fraction)) / num_mp
    elements = attention_gradient_elements(hidden, num_mp, biased=biased, kv_fraction=kv_fraction)
    return Layers(
        cluster,
        forward,
        backward,
        tokens * hidden * ELEMENT_BYTES if dense else None,
        Compute(macs, ATTENTION_GEMMS) if attention_s is None else Hold(np.asarray(attention_s)),
        elements * ELEMENT_BYTES if gradient else np.zeros_like(tokens),
        num_ranks,
    )


def step_s(
    given: Layers, policy: Policy, contention: Contention | None = None, *, least_a2a_s: float = 0.0
) -> tuple[np.ndarray, Decision]:
    """Forward and backward of each layer with one layer's gradient to reduce, simulated: seconds [N], and what the
    policy decided. Layers that were cut alike are simulated together. The policies decide as if lanes were ideal,
    whatever the ``contention``."""
    reduce = reduce_costs(given.cluster, given.num_ranks)
    decided = Decision(
        policy,
        given.costs,
        given.costs.backward(),
        reduce,
        given.gradient_bytes,
        given.dense_backward_s(),
        least_a2a_s=least_a2a_s,
    )
    seconds = np.empty(len(decided.forward))
    for pair in sorted(set(zip(decided.forward.tolist(), decided.backward.tolist(), strict=True))):
        chosen = np.flatnonzero((decided.forward == pair[0]) & (decided.backward == pair[1]))
        plan = layer_plan(given, policy, decided, chosen)
        seconds[chosen] = simulate(plan, given.machine(contention)).total_s
    return seconds, decided


def layer_plan(given: Layers, policy: Policy, decided: Decision, chosen: np.ndarray) -> Plan:
    """The plan of the layers ``chosen`` (indices), all cut into the same degrees."""
    degrees = int(decided.forward[chosen[0]]), int(decided.backward[chosen[0]])
    way, plan = Generalized(given.at(chosen), policy, degrees), Plan()
    done = forward_layer(plan, way.forward, way.dense("forward"))
    backward_layer(
        plan,
        way.backward,
        way.dense("backward"),
        in_moe=reduction(decided.moe_bytes[chosen], decided.moe_chunks[chosen]),
        beside_dense=reduction(decided.dense_bytes[chosen], decided.dense_chunks[chosen]),
        after_layer=reduction(decided.after_bytes[chosen]),
        after=done,
    )
    return plan


def configured_layers(
    testbed: str, assumed: Assumptions, heads: tuple[int, ...] = HEADS
) -> tuple[pd.DataFrame, Layers]:
    """Table 4's layers on a testbed, as rows and as what they cost."""
    preset, lengths = TESTBEDS[testbed]
    rows = table4(lengths, heads)
    no_drop = assumed.top_k if assumed.no_drop is None else assumed.no_drop
    copies = np.where(rows["factor"].isna(), no_drop, assumed.top_k * rows["factor"])
    swiglu = (rows["ffn_type"] == "swiglu").to_numpy()
    given = layers(
        assumed.revise(presets.cluster(preset)),
        batch=rows["batch"].to_numpy(),
        seq=rows["seq"].to_numpy(),
        hidden=rows["hidden"].to_numpy(),
        ffn=(rows["hidden"] * rows["ffn_ratio"]).to_numpy(),
        copies=copies,
        num_gemms=np.where(swiglu, GEMMS["swiglu"], GEMMS["gpt"]),
        kv_fraction=1.0,
        attention_s=driver_attention_s(rows) if assumed.attention == "driver" else None,
        dense=assumed.dense,
        gradient=assumed.gradient,
    )
    return rows, given


def driver_attention_s(rows: pd.DataFrame) -> np.ndarray:
    """Seconds [N] of attention's forward by the time model in the authors' driver, half of its backward.

    Its constants are for four model-parallel ranks and L of 256, 512 and 1024, which is testbed B; ``UserError`` for
    another length."""
    table = {256: (0.9061728879, 1.6690605555e-10), 512: (0.7674542565, 1.7435315251e-10)}
    table[1024] = (0.64634952121, 2.5884462453e-10)
    if strangers := sorted(set(rows["seq"]) - set(table)):
        raise bad("seq", strangers, f"the driver's attention model is for {', '.join(map(str, table))} tokens")
    alpha_ms, beta_ms = np.array([table[length] for length in rows["seq"]]).T
    batch, length, hidden = (rows[name].to_numpy(float) for name in ("batch", "seq", "hidden"))
    work = batch * length * hidden**2 + 2 * batch * length**2 * hidden / 4
    return (alpha_ms + work * beta_ms) / 1e3


def simulate_grid(
    assumed: Assumptions | None = None, testbeds: Iterable[str] = tuple(TESTBEDS), heads: tuple[int, ...] = HEADS
) -> pd.DataFrame:
    """Every configured layer on both testbeds under every schedule: seconds, degrees and gradient bytes by place."""
    assumed = assumed or Assumptions()
    found = []
    for testbed in testbeds:
        rows, given = configured_layers(testbed, assumed, heads)
        for name, policy in POLICIES.items():
            seconds, decided = step_s(given, policy, assumed.contention, least_a2a_s=assumed.least_a2a_s)
            found.append(
                rows.assign(
                    testbed=testbed,
                    schedule=name,
                    time_s=seconds,
                    degree_forward=decided.forward,
                    degree_backward=decided.backward,
                    moe_bytes=decided.moe_bytes,
                    dense_bytes=decided.dense_bytes,
                    after_bytes=decided.after_bytes,
                    evidence="simulated",
                )
            )
    return pd.concat(found, ignore_index=True)


def speedups(grid: pd.DataFrame, over: str = "tutel") -> pd.DataFrame:
    """Per testbed and schedule: mean speedup over ``over`` (the paper's average is one of ratios), geometric mean,
    least and largest."""
    layer = ["testbed", "batch", "heads", "seq", "hidden", "ffn_ratio", "factor", "ffn_type"]
    times = grid.fillna({"factor": 0.0}).pivot_table(index=layer, columns="schedule", values="time_s")
    ratios = times.rdiv(times[over], axis=0).reset_index().melt(layer, value_name="speedup")
    by = ratios.groupby(["testbed", "schedule"])["speedup"]
    return pd.DataFrame(
        {
            "mean": by.mean(),
            "geometric_mean": by.apply(lambda r: float(np.exp(np.log(r).mean()))),
            "least": by.min(),
            "most": by.max(),
            "num_layers": by.size(),
        }
    ).reset_index()


def closed_form_gap(testbed: str) -> pd.DataFrame:
    """How far the paper's formula lies from the plan on Table 4's layers, MoE part alone: one row for each direction,
    degree, and whether a slice of the whole gradient is between the all-to-alls. Gaps are formula over plan, minus 1.
    """
    _, given = configured_layers(testbed, Assumptions(dense=False))
    machine = given.machine()
    slice_s = reduce_costs(given.cluster).time_s(given.gradient_bytes)
    directions = {"forward": given.costs, "backward": given.costs.backward()}
    rows = []
    for (direction, costs), degree, sliced in itertools.product(directions.items(), DEGREES, (False, True)):
        if direction == "forward" and sliced:
            continue
        plan, way = Plan(), Generalized(given, POLICIES["fsmoe"], (degree, degree))
        walk = way.there_and_back if direction == "forward" else way.back_and_there
        walk(plan, gradients=reduction(given.gradient_bytes) if sliced else None)
        planned = simulate(plan, machine).total_s
        gap = np.round(closed_form(costs, degree, slice_s if sliced else 0.0) / planned - 1, 12) + 0.0
        rows.append(
            {
                "testbed": testbed,
                "direction": direction,
                "degree": degree,
                "gradient_slice": sliced,
                "equal": int((gap == 0).sum()),
                "mean_gap": float(np.abs(gap).mean()),
                "most_below": float(gap.min()),
                "most_above": float(gap.max()),
                "num_layers": len(gap),
                "evidence": "simulated",
            }
        )
    return pd.DataFrame(rows)


def different_degrees(testbed: str) -> dict[str, int]:
    """Of Table 4's layers on a testbed: how many want other degrees backward than forward, without a gradient slice,
    with all of their gradient as one, and as FSMoE places it."""
    _, given = configured_layers(testbed, Assumptions())
    backward = given.costs.backward()
    wanted = scan_degree(given.costs)[0]
    slice_s = reduce_costs(given.cluster).time_s(given.gradient_bytes)
    decided = step_s(given, POLICIES["fsmoe"])[1]
    return {
        "num_layers": len(wanted),
        "without_slice": int((wanted != scan_degree(backward)[0]).sum()),
        "whole_gradient": int((wanted != scan_degree(backward, slice_s)[0]).sum()),
        "as_placed": int((decided.forward != decided.backward).sum()),
    }
