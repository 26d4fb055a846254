"""Popularity that drifts: every expert's log-load is a stationary random walk over steps, an AR(1) process.

Any step is found without those before it. Points of time far enough apart to have forgotten each other are drawn
alone; between two that are known, the one in the middle is normal too, with a mean and a variance that are known
(the bridge of an Ornstein-Uhlenbeck process), and so on down to the step. So it is a walk of any length, the same
whoever asks for whichever step first, and a step costs as many draws as its distance has bits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from harness.errors import bad
from harness.routing.draw import PROFILE_STEP, Draw, rounded_use
from harness.routing.skewed import check_reachable, shares_of_logs
from harness.specs import Spec, Workload

FORGOTTEN = 1e-9  # the correlation of points of time that are drawn alone
RHO, TARGET = 0.9, 2.0  # by default


class Walk(Spec):
    """``rho``: correlation of the experts' log-loads from one step to the next (default 0.9). ``target``: load of the
    most used expert over the mean load, 1 to E / k (default 2). ``like``: a trace with as many experts; what is
    not given is as recorded there, for layer 0 in layer ``layer`` and so on, behind the last one from the first on."""

    rho: Annotated[float, Field(ge=0, le=1)] | None = None
    target: Annotated[float, Field(ge=1)] | None = None
    like: str | None = None
    layer: Annotated[int, Field(ge=0)] = 0


def walk(p: Walk, draw: Draw) -> np.ndarray:
    """Log-loads walk from step to step. Their scale is set anew at each, so that max/mean is ``target`` at every one;
    their correlation does not depend on it."""
    rho, target = RHO if p.rho is None else p.rho, TARGET if p.target is None else p.target
    if p.like is not None:
        found = fitted(p.like, p.layer + draw.layer, draw)
        rho, target = found.rho if p.rho is None else rho, found.target if p.target is None else target
    check_reachable(target, draw, "target" if p.like is None else "like")
    # what planners see is the step before the first
    time = 0 if draw.step == PROFILE_STEP else draw.step + 1
    return rounded_use(draw, draw.top_k * shares_of_logs(log_loads(draw, rho, time), target))


def log_loads(draw: Draw, rho: float, time: int) -> np.ndarray:
    """Float [E], each standard normal, and at ``time`` and ``time`` + h correlated by rho^h."""

    def normal(level: int, index: int) -> np.ndarray:
        return draw.walk_rng(level, index).standard_normal(draw.num_experts)

    if rho == 1:
        return normal(0, 0)
    height = 0
    while rho ** (1 << height) > FORGOTTEN:
        height += 1
    begin = time >> height << height
    before, behind = normal(height, begin >> height), normal(height, (begin >> height) + 1)
    for level in reversed(range(height)):
        middle = begin + (1 << level)
        near = rho ** (1 << level)  # correlation of the middle with either side
        free = -math.expm1(2 * (1 << level) * math.log(rho)) / (1 + near**2)  # variance that both sides leave
        between = near / (1 + near**2) * (before + behind) + math.sqrt(free) * normal(level, middle >> level)
        if time < middle:
            behind = between
        else:
            begin, before = middle, between
    return before


# ---- what was recorded ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a recorded layer says of a walk."""

    layer: int  # of the trace
    num_steps: int  # recorded
    rho: float  # correlation over experts of log-loads, of a recorded step and the next; at least 0
    target: float  # max/mean load, the mean over recorded steps


def fit(loads: np.ndarray) -> tuple[float, float]:
    """rho and target of ``loads`` [S, E], two steps or more: one correlation for all pairs of steps, those with more
    spread counting more; half a token is added to each load, as some have none. A correlation below 0 counts as 0.
    Few tokens scatter by chance, and a walk takes that for drift."""
    logs = np.log(loads + 0.5)
    logs -= logs.mean(1, keepdims=True)
    spread = np.sqrt((logs**2).sum(1))
    together, apart = (logs[1:] * logs[:-1]).sum(), (spread[1:] * spread[:-1]).sum()
    rho = together / apart if apart > 0 else 0.0
    means = loads.mean(1)
    return float(np.clip(rho, 0, 1)), float((loads.max(1) / np.where(means > 0, means, 1)).mean().clip(1))


def fitted(like: str, layer: int, draw: Draw) -> Fitted:
    """What the trace ``like`` says of ``layer``, or of the one that stands there where it has fewer.

    Errors: as ``read_trace``; another number of experts; a layer that fewer than two steps have."""
    path, num_experts, found = _read(like)
    if num_experts != draw.num_experts:
        remedy = f"the trace {path.name} has {num_experts} experts; use a model or a trace with as many"
        raise bad("model.num_experts", draw.num_experts, remedy)
    if not found:
        raise draw.bad("like", like, "a walk is fitted to two recorded steps of a layer or more; record more of them")
    return found[layer % len(found)]


def told(workload: Workload) -> list[Fitted]:
    """What ``workload`` is fitted to, of each layer of its trace; nothing without one. Errors: as ``read_trace``."""
    if workload.generator != "walk" or "like" not in workload.params:
        return []
    return list(_read(str(workload.params["like"]))[2])


def in_words(found: Sequence[Fitted]) -> str:
    """One line for tables."""
    if not found:
        return ""
    steps = max(each.num_steps for each in found)
    rho, target = _range([each.rho for each in found]), _range([each.target for each in found])
    return f"rho {rho}, max/mean {target}: {len(found)} layers at {steps} steps"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _read(like: str) -> tuple[Path, int, tuple[Fitted, ...]]:
    """The trace, its number of experts, and what each layer says that has two steps or more."""
    from harness.routing.trace import find_trace, read_trace  # pyarrow only where a trace is read

    path = find_trace(like)
    trace = read_trace(path)
    stat = path.stat()
    return path, trace.header.num_experts, _fitted(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _fitted(path: Path, mtime_ns: int, size: int) -> tuple[Fitted, ...]:
    from harness.routing.trace import read_trace

    trace, found = read_trace(path), []
    for layer in trace.layers:
        loads = [trace.counts(step, layer).sum(0) for step in trace.steps if (step, layer) in trace]
        if len(loads) > 1:
            found.append(Fitted(layer, len(loads), *fit(np.stack(loads))))
    return tuple(found)
