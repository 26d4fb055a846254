"""MoETuner's experiments as named studies (``moebench study``): Mixtral-8x7B on its two testbeds, simulated, with
the value that the paper reports as a row of its own where it prints one; and what the paper does not try.

Placements are planned with one part of a recording and judged on another. Routing comes from a byte-level model with
Mixtral's layers and experts, recorded late and early in training, and from a generator in which each of a token's
experts brings its successor in the next layer with a given probability. Mixtral's own is not here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from typing import Any, Literal

import numpy as np
import pandas as pd

from harness import presets
from harness.placing import Request, bandwidths
from harness.routing.draw import Draw
from harness.routing.drawn import Markov, markov_layers
from harness.routing.trace import all_layers, find_trace, read_trace, split, window_of
from harness.specs import Model, Workload
from harness.studies import Findings, Progress, Study, reported
from harness.topology import Topology
from methods.moetuner import balance, joint, mapping
from methods.moetuner.judge import ratios
from methods.moetuner.latency import TRAFFIC, Served, serve
from methods.moetuner.objective import Problem, cost_of, score
from methods.moetuner.placers import PLACERS, problem_of
from methods.moetuner.profile import Profile

MODEL, TRACE = "mixtral-8x7b", "record-l32e8k2.parquet"
TESTBEDS = {"single-node": ("moetuner-single", 2), "multi-node": ("moetuner-multi", 4)}
METHODS = ("contiguous", "random", "greedy", "exflow", "two-stage", "joint")
STEPS = {"recorded": 200, "recorded early": 40}
STRENGTHS = (0.5, 0.9)
EFFICIENCIES = (0.3, 0.5, 0.7)
HELD = 0.5
ROUNDS = 8
TIMES = ("end_to_end_s", "experts_tail_s", "experts_mean_s", "a2a_tail_s", "a2a_mean_s")
NOTE = (
    "Half of the tokens are planned with, the other half is served. 'recorded': a byte-level model with Mixtral's 32 "
    "layers of 8 experts after 200 steps of training, 'recorded early': after 40, when its routers crowd; 'markov s': "
    "each expert of a token brings its successor with probability s, loads are even. Whole batch: 8,192 tokens."
)
MODEL_NOTE = (
    "Links and devices at the rates of their data sheets, GEMMs at a share of the peak (efficiency, 0.5 unless said), "
    "no start-up times; the pass is that of moebench simulate, from embedding to head. Traffic 'dispatcher': tokens go "
    "from their home rank to their experts and home again, as in Megatron-LM; 'paper': straight from expert to expert, "
    "as ILP 2 has it."
)


# ------------------------------------------------------------------------------------------------------------ routing


@functools.cache
def routing(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(to plan with, to serve), int [L, T, k] each."""
    if name in STEPS:
        recorded = read_trace(find_trace(TRACE))
        return split(all_layers(recorded, STEPS[name]), HELD, window_of(recorded))
    strength = float(name.removeprefix("markov "))
    return markov(strength, 0), markov(strength, 1)


def markov(strength: float, step: int, seed: int = 0, num_tokens: int = 8192, model: Model | None = None) -> np.ndarray:
    """Steps of one seed share their successors."""
    model = presets.model(MODEL) if model is None else model
    workload = Workload(name="markov", tokens_per_rank=num_tokens, generator="markov", seed=seed)
    draw = Draw.of(workload, model, Topology((1, 1)), step, model.num_layers - 1)
    return np.stack(list(markov_layers(Markov(strength=strength), draw)))


ROUTINGS = (*STEPS, *(f"markov {strength}" for strength in STRENGTHS))


def request(testbed: str, profile: np.ndarray, held: np.ndarray) -> Request:
    name, tensor_parallel = TESTBEDS[testbed]
    rates, topology = bandwidths(presets.cluster(name), tensor_parallel)
    return Request(presets.model(MODEL), topology, rates, profile, held, rounds=ROUNDS)


@functools.cache
def owners(testbed: str, name: str) -> dict[str, np.ndarray]:
    """By method, planned for ``routing(name)``."""
    given = request(testbed, *routing(name))
    return {method: PLACERS[method].run(given).owner for method in METHODS}


def served(testbed: str, efficiency: float = 0.5) -> Served:
    name, tensor_parallel = TESTBEDS[testbed]
    return Served(presets.model(MODEL), presets.cluster(name), tensor_parallel, efficiency)


# ------------------------------------------------------------------------------------------------------------ latency


def latency(progress: Progress) -> Findings:
    """End to end, tail and mean of computation and all-to-all, of every placement on both testbeds."""
    rows, layers = [], []
    for testbed in TESTBEDS:
        for name in ROUTINGS:
            progress(f"{testbed}, {name}")
            held = routing(name)[1]
            for traffic in TRAFFIC:
                for efficiency in EFFICIENCIES if traffic == "dispatcher" else (0.5,):
                    where = {"testbed": testbed, "routing": name, "traffic": traffic, "efficiency": efficiency}
                    one: list[dict[str, Any]] = []
                    for method, owner in owners(testbed, name).items():
                        found = serve(served(testbed, efficiency), held, owner, traffic)
                        one.append({**where, "placement": method, **found.summary()})
                        if efficiency == 0.5:
                            layers += _of_layers(found, {**where, "placement": method})
                    base = one[0]
                    for row in one:
                        for key in TIMES:
                            row[f"{key.removesuffix('_s')}_gain"] = 100 * (base[key] / row[key] - 1)
                            row[f"{key.removesuffix('_s')}_reduction"] = 100 * (1 - row[key] / base[key])
                        row["a2a_percent"] = 100 * held.shape[0] * row["a2a_tail_s"] / row["end_to_end_s"]
                    rows += one
    every = pd.DataFrame(rows).assign(evidence="simulated")
    printed = reported("moetuner")
    printed = printed[printed["item"] == "end-to-end"]
    said = pd.DataFrame({"testbed": printed["testbed"], "end_to_end_gain": printed["value"].astype(float)})
    said = said.assign(placement="two-stage", routing="WikiText-103 and 3 more", evidence="reported")
    gains = [f"{key.removesuffix('_s')}_{what}" for key in TIMES for what in ("gain", "reduction")]
    shown = every[(every["efficiency"] == 0.5) & (every["placement"] != "contiguous")]
    head = ["testbed", "routing", "traffic", "placement"]
    table = pd.concat([said, shown[[*head, *gains, "evidence"]]], ignore_index=True)[[*head, *gains, "evidence"]]
    times = every[every["efficiency"] == 0.5][[*head, *TIMES, "a2a_percent", "evidence"]]
    note = (
        "gain, in percent: the time under contiguous over the placement's, less one; reduction, in percent: one less "
        "the placement's over contiguous's. The paper states a gain end to end and reductions of tails and means. "
        "waiting: by dispatcher, if all ranks wait for the last before and after the experts (ports), and if each goes "
        "on when its own rows are there, while those of a node share its port evenly (shared-ports); computation by "
        "rows: as public measurements of such devices have it for as many rows an expert "
        "(python -m harness.plan.points)."
    )
    tables = {"gains": table, "times": times, "waiting": waiting(progress)}
    raw = {"latency": every, "layers": pd.DataFrame(layers).assign(evidence="simulated")}
    return Findings(tables, (NOTE, MODEL_NOTE, note), raw)


def waiting(progress: Progress) -> pd.DataFrame:
    """End to end, of ranks that wait for each other and of ranks that do not."""
    rows = []
    choices: list[tuple[Literal["ports", "shared-ports"], float | None]]
    choices = [("ports", 0.5), ("shared-ports", 0.5), ("shared-ports", None)]
    for testbed, name, (links, efficiency) in itertools.product(TESTBEDS, ROUTINGS, choices):
        progress(f"{testbed}, {name}, {links}")
        given = dataclasses.replace(served(testbed), links=links, efficiency=efficiency)
        held = routing(name)[1]
        seconds = {method: serve(given, held, owner).end_to_end_s for method, owner in owners(testbed, name).items()}
        where = {"testbed": testbed, "routing": name, "links": links, "basis": given.machine.basis}
        for method, end_to_end_s in seconds.items():
            gain = 100 * (seconds["contiguous"] / end_to_end_s - 1)
            rows.append({**where, "placement": method, "end_to_end_s": end_to_end_s, "end_to_end_gain": gain})
    return pd.DataFrame(rows).assign(evidence="simulated")


def _of_layers(found: Any, where: dict[str, Any]) -> list[dict[str, Any]]:
    a2a = found.dispatch_s.max(1) + found.combine_s.max(1)
    parts = zip(found.experts_s.max(1), found.experts_s.mean(1), a2a, found.all_to_all_s.mean(1), strict=True)
    names = TIMES[1:]
    return [
        {**where, "layer": layer, **dict(zip(names, map(float, part), strict=True))} for layer, part in enumerate(parts)
    ]


def sources(progress: Progress) -> Findings:
    """Where the gain comes from: contiguous with a placement's computation alone, its all-to-all alone, and both."""
    rows = []
    for testbed in TESTBEDS:
        for name in ROUTINGS:
            progress(f"{testbed}, {name}")
            of, held = owners(testbed, name), routing(name)[1]
            for traffic in TRAFFIC:
                base = serve(served(testbed), held, of["contiguous"], traffic)
                for method in ("two-stage", "joint"):
                    tuned = serve(served(testbed), held, of[method], traffic)
                    swaps = {
                        "computation": base.mixed(experts=tuned, exchange=base),
                        "all-to-all": base.mixed(experts=base, exchange=tuned),
                        "both": tuned,
                    }
                    where = {"testbed": testbed, "routing": name, "traffic": traffic, "placement": method}
                    for part, each in swaps.items():
                        rows.append({**where, "part": part, "gain": 100 * (base.end_to_end_s / each.end_to_end_s - 1)})
    note = "Gain end to end in percent over contiguous, if only that part of every layer were as under the placement."
    return Findings({"sources": pd.DataFrame(rows).assign(evidence="simulated")}, (NOTE, MODEL_NOTE, note))


# ---------------------------------------------------------------------------------------------------------- objective


def objective(progress: Progress) -> Findings:
    """The programs' objectives of every placement on held-out routing, and how balanced dispatch is."""
    rows = []
    for testbed in TESTBEDS:
        for name in ROUTINGS:
            progress(f"{testbed}, {name}")
            ids = routing(name)[1]
            held, problem = Profile.of_ids(ids, 8), problem_of(request(testbed, *routing(name)))
            window = window_of(read_trace(find_trace(TRACE)))
            over = ratios(problem, ids, owners(testbed, name), "joint", window)
            for method, owner in owners(testbed, name).items():
                found = dataclasses.asdict(score(problem, owner, held))
                planned = score(problem, owner).objective
                row = {"testbed": testbed, "routing": name, "placement": method, "planned_objective": planned}
                joint_over = dict(zip(("joint_over", "joint_over_low", "joint_over_high"), over[method], strict=True))
                rows.append({**row, **found, **joint_over})
    every = pd.DataFrame(rows).assign(evidence="simulated")
    note = (
        "objective: O1 and O2 on the held-out half, each over its mean for random placements, added (random: 2; J of "
        "the planning half beside it). joint_over: J of the joint placement over the row's, below 1 the joint one is "
        "better; low, high: its 95 % interval over windows of the held-out half drawn again. balance: O1 in tokens; "
        "communication: O2; cross_rank, cross_node: share of the transitions between layers that leave a rank, a node."
    )
    return Findings({"objective": every}, (NOTE, note))


def solvers(progress: Progress) -> Findings:
    """Time, value, bound and gap of both programs, and what both at once adds, for three sizes of model and cluster."""
    rows = []
    for name, num_layers, num_experts, shape, top_k, rounds in (
        ("Mixtral-8x7B, 4 ranks", 32, 8, (2, 2), 2, joint.ROUNDS),
        ("128 experts x 48 layers, 16 ranks", 48, 128, (2, 8), 8, 4),
        ("256 experts x 58 layers, 64 ranks", 58, 256, (8, 8), 8, 0),  # a round takes minutes and gained nothing
    ):
        progress(name)
        model = Model(name="m", num_layers=num_layers, hidden=64, ffn=64, num_experts=num_experts, top_k=top_k)
        ids = routing("recorded")[0] if num_experts == 8 else markov(0.5, 0, model=model)
        topology = Topology(shape)
        rates = np.array([1.0, 9.0, np.inf])[topology.level_between]
        profile = dataclasses.replace(Profile.of_ids(ids, num_experts), repeats=(1.0, 1.0))  # taken at its word
        problem = Problem(profile, cost_of(rates, topology.num_ranks), topology.unit_of(0))
        began = time.perf_counter()
        first = balance.solve(problem.profile.load, problem.num_ranks)
        second = mapping.solve(problem, first.owner)
        whole = float(problem.profile.load.sum())
        for program, stage in (("ILP 1", first), ("ILP 2", second)):
            row = {"size": name, "program": program, "value": stage.value, "bound": stage.bound, "gap": stage.gap}
            share = (stage.value - stage.bound) / whole
            rows.append({**row, "gap_of_all_tokens": share, "ended": stage.ended, "seconds": stage.time_s})
        if not rounds:
            continue
        owner, before = second.owner, score(problem, second.owner).objective
        best = before
        for number in range(rounds):
            found = joint.anneal(problem, owner, joint.WARMTHS[number % 4], number)
            if (value := score(problem, found).objective) < best:
                owner, best = found, value
        bound = first.bound / problem.yardstick[0]
        row = {"size": name, "program": f"both at once, {rounds} rounds", "value": best, "bound": bound}
        gap, seconds = (best - bound) / best, time.perf_counter() - began
        rows.append({**row, "gap": gap, "ended": "search", "seconds": seconds, "over_two_stages": before / best})
    note = (
        "Processor of this machine, first call with compilation. Loads are a recording's for Mixtral, else those of "
        "markov 0.5; two link levels 9 : 1. gap_of_all_tokens: value less bound over all tokens of all layers, "
        "for where the optimum is close to 0. over_two_stages: J after the two stages over J after both at once, whose "
        "bound is that of the balance alone."
    )
    return Findings({"solvers": pd.DataFrame(rows).assign(evidence="measured")}, (note,))


# -------------------------------------------------------------------------------------------------------- sensitivity


def profiles(progress: Progress) -> Findings:
    """How many tokens it takes: planned with the first n of the planning half, judged on the held-out half."""
    rows = []
    for name in STEPS:
        own, held = routing(name)
        for num_tokens in (64, 256, 1024, 4096, own.shape[1]):
            progress(f"{name}, {num_tokens} tokens")
            spread = own[:, np.linspace(0, own.shape[1] - 1, num_tokens).astype(int)]
            rows += _judged("multi-node", spread, held, {"routing": name, "tokens": num_tokens})
    note = "Tokens are spread evenly over the planning half."
    return Findings({"profile-size": pd.DataFrame(rows).assign(evidence="simulated")}, (NOTE, note))


def shift(progress: Progress) -> Findings:
    """Data that changes between profile and use: a share of what is served comes from elsewhere."""
    rows = []
    for name, own, held, other in (
        ("markov 0.9", *routing("markov 0.9"), markov(0.9, 1, seed=1)),
        ("recorded", *routing("recorded"), routing("recorded early")[1]),
    ):
        for share in (0.0, 0.1, 0.25, 0.5, 1.0):
            progress(f"{name}, {share:.0%} from elsewhere")
            foreign = np.floor((np.arange(held.shape[1]) + 1) * share) > np.floor(np.arange(held.shape[1]) * share)
            mixed = np.where(foreign[None, :, None], other, held)
            rows += _judged("multi-node", own, mixed, {"routing": name, "foreign_share": share})
    recorded = all_layers(read_trace(find_trace(TRACE)), STEPS["recorded"])
    half = recorded.shape[1] // 2
    for what, parts in (("other files", (recorded[:, :half], recorded[:, half:])), ("same files", routing("recorded"))):
        rows += _judged("multi-node", *parts, {"routing": f"recorded, {what}", "foreign_share": float(what[0] == "o")})
    note = (
        "markov: another seed, so other successors; recorded: the same model much earlier in training; 'other files': "
        "planned with the first half of the recording's files, served the second."
    )
    return Findings({"shift": pd.DataFrame(rows).assign(evidence="simulated")}, (NOTE, note))


def _judged(testbed: str, own: np.ndarray, held: np.ndarray, where: dict[str, Any]) -> list[dict[str, Any]]:
    given, rows = dataclasses.replace(request(testbed, own, held), rounds=2), []
    base: float | None = None
    for method in ("contiguous", "two-stage", "joint"):
        placed = PLACERS[method].run(given)
        whole = serve(served(testbed), held, placed.owner).end_to_end_s
        base = whole if base is None else base
        found = {key: placed.scores["held-out"][key] for key in ("objective", "max_over_mean", "cross_node")}
        rows.append({**where, "placement": method, **found, "gain": 100 * (base / whole - 1)})
    return rows


STUDIES = {
    "moetuner-latency": Study("MoETuner, Figs. 9 to 11: latency of Mixtral-8x7B on both testbeds", latency),
    "moetuner-sources": Study("MoETuner: where the gain comes from", sources),
    "moetuner-objective": Study("MoETuner: objectives and dispatch balance on held-out routing", objective),
    "moetuner-solvers": Study("MoETuner: time, value and proven gap of the programs", solvers),
    "moetuner-profile": Study("MoETuner: how many tokens a profile takes", profiles),
    "moetuner-shift": Study("MoETuner: data that changes between profile and use", shift),
}
