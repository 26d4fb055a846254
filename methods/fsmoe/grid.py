"""FSMoE's experiments, simulated: the 1,458 configured layers of Table 4 on both testbeds, under six schedules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import pandas as pd

from harness import presets
from harness.errors import bad
from harness.layer.work import ATTENTION_GEMMS, attention_macs
from harness.plan.cost import Compute, Cost, Even, Hold
from harness.plan.graph import COMPUTE, INTRA, Plan, Work
from harness.plan.machine import Contention, Machine
from harness.plan.passage import Dense
from harness.plan.simulate import simulate
from harness.specs import GEMMS, Cluster
from methods.fsmoe.costs import LayerCosts, attention_gradient_elements, layer_costs, reduce_costs
from methods.fsmoe.degree import DEGREES, closed_form, scan_degree
from methods.fsmoe.schedule import Priced, Sizes, moe
from methods.fsmoe.step import POLICIES, Decision, Policy, backward_layer, forward_layer, reduction

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
    """[N] generalized layers on one rank of a cluster, and their linear costs for the planners."""

    cluster: Cluster
    forward: Sizes
    backward: Sizes
    dense_forward: list[Dense]
    dense_backward: list[Dense]
    gradient_bytes: Any
    costs: LayerCosts
    num_ranks: int | None = None


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

    The dense part: an all-gather and a reduce-scatter of the tokens among the model-parallel ranks of a node, and
    attention between them, priced as four GEMMs (projections, scores, values, output; twice that in backward) or
    given as ``attention_s``, the seconds of its forward.
    """
    num_mp = cluster.shape[-1]
    tokens = np.asarray(batch, dtype=np.float64) * seq
    slot_bytes = np.asarray(copies) * tokens * hidden * ELEMENT_BYTES / num_mp
    macs = np.asarray(copies) * tokens * hidden * ffn / num_mp * num_gemms
    forward = Sizes(slot_bytes, num_mp, macs, num_gemms)
    backward = Sizes(slot_bytes, num_mp, 2 * macs, 2 * np.asarray(num_gemms))
    hidden = np.asarray(hidden, dtype=np.float64)
    attention = attention_macs(hidden, tokens, seq, causal=False, kv_fraction=np.asarray(kv_fraction)) / num_mp
    token_bytes = tokens * hidden * ELEMENT_BYTES

    def parts(times: int) -> list[Dense]:
        if attention_s is None:
            cost: Cost = Compute(times * attention, ATTENTION_GEMMS * times)
        else:
            cost = Hold(times * np.asarray(attention_s))
        return [
            Dense("mp-gather", INTRA, Work(Even("ag", "intra", token_bytes))),
            Dense("attention", COMPUTE, Work(cost)),
            Dense("mp-scatter", INTRA, Work(Even("rs", "intra", token_bytes))),
        ]

    elements = attention_gradient_elements(hidden, num_mp, biased=biased, kv_fraction=kv_fraction)
    costs = layer_costs(
        cluster,
        batch=batch,
        seq=seq,
        hidden=hidden,
        ffn=ffn,
        copies=copies,
        num_gemms=num_gemms,
        element_bytes=ELEMENT_BYTES,
        num_ranks=num_ranks,
    )
    return Layers(
        cluster,
        forward,
        backward,
        parts(1) if dense else [],
        parts(2) if dense else [],
        elements * ELEMENT_BYTES if gradient else np.zeros_like(tokens),
        costs,
        num_ranks,
    )


def step_s(
    given: Layers, policy: Policy, contention: Contention | None = None, *, least_a2a_s: float = 0.0
) -> tuple[np.ndarray, Decision]:
    """Forward and backward of each layer with one layer's gradient to reduce, simulated: seconds [N], and what the
    policy decided. Layers that were cut alike are simulated together. The policies decide as if lanes were ideal,
    whatever the ``contention``."""
    machine = Machine.published(given.cluster, given.num_ranks, contention or {})
    dense_s = sum(np.asarray(machine.seconds(part.work.cost)) for part in given.dense_backward)
    reduce = reduce_costs(given.cluster, given.num_ranks)
    decided = Decision(
        policy, given.costs, given.costs.backward(), reduce, given.gradient_bytes, dense_s, least_a2a_s=least_a2a_s
    )
    num_layers = len(decided.forward)
    seconds = np.empty(num_layers)
    for pair in sorted(set(zip(decided.forward.tolist(), decided.backward.tolist(), strict=True))):
        chosen = np.flatnonzero((decided.forward == pair[0]) & (decided.backward == pair[1]))
        plan = layer_plan(given, policy, decided, chosen)
        seconds[chosen] = simulate(plan, machine).total_s
    return seconds, decided


def layer_plan(given: Layers, policy: Policy, decided: Decision, chosen: np.ndarray) -> Plan:
    """The plan of the layers ``chosen`` (indices), all cut into the same degrees."""

    def of(values: Any) -> Any:
        values = np.asarray(values, dtype=np.float64)
        return np.broadcast_to(values, decided.forward.shape)[chosen]

    def sizes(whole: Sizes) -> Sizes:
        return Sizes(of(whole.slot_bytes), whole.num_local, of(whole.macs), of(whole.gemms))

    def dense(parts: list[Dense]) -> list[Dense]:
        found = []
        for part in parts:
            match part.work.cost:
                case Compute(macs, launches):
                    cost: Cost = Compute(of(macs), launches)
                case Hold(seconds):
                    cost = Hold(of(seconds))
                case Even(operation, scope, num_bytes):
                    cost = Even(operation, scope, of(num_bytes))
            found.append(Dense(part.name, part.lane, Work(cost)))
        return found

    plan = Plan()
    first = chosen[0]
    done = forward_layer(
        plan, policy, Priced(sizes(given.forward), int(decided.forward[first])), dense(given.dense_forward)
    )
    backward_layer(
        plan,
        policy,
        Priced(sizes(given.backward), int(decided.backward[first])),
        dense(given.dense_backward),
        in_moe=reduction(of(decided.moe_bytes), of(decided.moe_chunks)),
        beside_dense=reduction(of(decided.dense_bytes), of(decided.dense_chunks)),
        after_layer=reduction(of(decided.after_bytes)),
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
    machine = Machine.published(given.cluster)
    slice_s = reduce_costs(given.cluster).time_s(given.gradient_bytes)
    directions = {"forward": (given.forward, given.costs), "backward": (given.backward, given.costs.backward())}
    rows = []
    for (direction, (sizes, costs)), degree, sliced in itertools.product(directions.items(), DEGREES, (False, True)):
        if direction == "forward" and sliced:
            continue
        plan = Plan()
        moe(plan, Priced(sizes, degree), gradients=reduction(given.gradient_bytes) if sliced else None)
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
