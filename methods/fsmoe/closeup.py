"""One configured layer in close-up: its timeline under every schedule, and how long its degrees take to find."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd

from harness.plan.graph import Timeline
from harness.plan.simulate import simulate
from harness.studies import Findings, Progress
from methods.fsmoe.degree import scan_degree, slsqp_degree
from methods.fsmoe.grid import TESTBEDS, Assumptions, configured_layers, layer_plan, step_s
from methods.fsmoe.step import POLICIES

#: the middle of every axis of Table 4 but L, which is the testbed's own middle
MIDDLE = {"batch": 2, "heads": 16, "hidden": 2048, "ffn_ratio": 3, "factor": 1.2, "ffn_type": "gpt"}
NUM_TIMED = 12  # of the 1,458 layers, evenly spaced


def timelines(testbed: str) -> dict[str, Timeline]:
    """Forward and backward of the middle layer of Table 4, simulated under each schedule; by the schedule's title."""
    assumed = Assumptions()
    rows, given = configured_layers(testbed, assumed)
    wanted = {**MIDDLE, "seq": TESTBEDS[testbed][1][1]}
    (place,) = np.flatnonzero(np.logical_and.reduce([rows[key] == value for key, value in wanted.items()]))
    found = {}
    for policy in POLICIES.values():
        _, decided = step_s(given, policy)
        plan = layer_plan(given, policy, decided, np.array([place]))
        of_one = simulate(plan, given.machine())
        found[policy.title] = Timeline(plan, of_one.start_s[:, 0], of_one.end_s[:, 0])
    return found


def solver_times(progress: Progress) -> Findings:
    """Milliseconds of processor time to find a layer's two degrees on this machine: by SLSQP (Algorithm 1) as in the
    paper, and by an exact scan of the allowed degrees, once for each layer and once for all layers together. Processor
    time, as what else the machine does is no property of a solver."""
    _, given = configured_layers("A", Assumptions())
    every = given.costs.shape[0]
    rows = []
    for place in np.linspace(0, every - 1, NUM_TIMED).astype(int).tolist():
        progress(f"layer {place}")
        forward = given.costs[place]
        for solver, solve in (("slsqp", slsqp_degree), ("scan", scan_degree)):
            start = time.process_time()
            solve(forward)
            solve(forward.backward())
            rows.append({"solver": solver, "layer": place, "time_ms": 1e3 * (time.process_time() - start)})
    start = time.process_time()
    scan_degree(given.costs)
    scan_degree(given.costs.backward())
    together_ms = 1e3 * (time.process_time() - start) / every
    times = pd.DataFrame([*rows, {"solver": "scan, all layers at once", "layer": -1, "time_ms": together_ms}])
    means = times.groupby("solver", sort=False)["time_ms"].agg(["mean", "min", "max", "size"]).reset_index()
    means.columns = pd.Index(["solver", "mean_ms", "least_ms", "most_ms", "num_timed"])
    notes = (f"Both degrees of a layer; {NUM_TIMED} of the 1,458 layers of testbed A, evenly spaced. Processor time.",)
    return Findings(
        {"solver-times": means.assign(evidence="measured")}, notes, {"times": times.assign(evidence="measured")}
    )
