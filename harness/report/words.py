"""The report's sentences, made from the data and never stronger than its intervals."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pandas as pd

from harness.bench import stats
from harness.report import compare
from harness.report.run import GROUP, Run

PHASES = {
    "exchange": "Exchange",
    "layer": "MoE layer",
    "train_step": "Training step",
    "prefill": "Prefill of a whole model",
    "decode": "Decoding a token of every sequence, whole model",
}
DIRECTIONS = {"total": "forward and backward", "forward": "forward", "backward": "backward", "": "no direction stated"}
WHOLE = {"train_step": "whole step", "prefill": "whole batch", "decode": "one token of every sequence"}
STATUS_WORDS = {
    "refused": "the system said that it cannot run this case",
    "failed": "a rank raised an error",
    "hung": "a rank did not finish in time",
    "oom": "out of memory",
    "nonconforming": "its numbers differ from the oracle's, so its time does not count",
    "unphysical": "its time is shorter than its speed of light or not finite, so it does not count",
    "cpu_bound": "timed, but the ranks used so much CPU that the cores, not the link, may set the time",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one group of races shows. ``sure``: a fastest system is shown on every workload, without a mark."""

    title: str
    evidence: str
    network: str
    sentences: tuple[str, ...]
    sure: bool


def findings(run: Run) -> list[Finding]:
    """One finding for every group that holds times."""
    times, samples = compare.times(run), compare.samples(run)
    if times.empty:
        return []
    baseline, control = compare.speedups(run, run.baseline), compare.speedups(run, run.control)
    return [
        _finding(run, dict(zip(GROUP, key, strict=True)), group, samples, baseline, control)
        for key, group in times.groupby(GROUP, sort=False)
    ]


def group_title(group: dict[str, Any]) -> str:
    """Phase, cluster, model and dtype of a group; the wire and stand-in compute only where they are not the default."""
    what = PHASES.get(group["phase"], group["phase"])
    extras = [group["model"], group["dtype"]]
    extras += [f"wire {group['wire']}"] if group["wire"] != "recv_first" else []
    extras += ["stand-in compute"] if group["compute"] != "real" else []
    return f"{what} on {group['cluster']} ({', '.join(extras)})"


def direction_words(phase: str, direction: str) -> str:
    """What was timed."""
    return WHOLE.get(phase, DIRECTIONS[direction])


def main_direction(frame: pd.DataFrame) -> str:
    """``total`` where forward and backward were timed, else the one that was."""
    found = set(frame["direction"])
    return next(d for d in DIRECTIONS if d in found)


def _finding(
    run: Run, key: dict[str, Any], group: pd.DataFrame, samples: pd.DataFrame, *ratios: pd.DataFrame
) -> Finding:
    direction = main_direction(group)
    group = group[group["direction"] == direction]
    samples = samples[samples["direction"] == direction]
    sure = True
    outcomes: dict[tuple[str, tuple[str, ...], bool], list[str]] = defaultdict(list)  # -> races
    for race, rows in group.groupby("race", sort=False):
        fastest, level = _fastest(rows, samples[samples["race"] == race])
        outcomes[fastest, level, len(rows) == 1].append(str(race))
        sure = sure and not level and len(rows) > 1

    sentences = []
    for (fastest, level, alone), races in outcomes.items():
        here = group[group["race"].isin(races)]
        every = len(outcomes) == 1 and len(races) > 3
        where = f"on all {len(races)} workloads" if every else "on " + _listed(here["workload"].unique())
        if alone:
            sentences.append(f"Only {fastest} has a time {where}: nothing to compare.")
            continue
        if level:
            text = f"{fastest} has the shortest time {where}, but no difference from {_listed(level, 'or')} is shown"
        else:
            text = f"{fastest} is the fastest of {_span(here.groupby('race').size())} systems {where}"
        mine = [frame[(frame["label"] == fastest) & frame["race"].isin(races)] for frame in ratios]
        clauses = list(filter(None, (_against(rows[~rows["reference"].isin(level)], direction) for rows in mine)))
        joint = "; it is " if level else ": "
        sentences.append(text + (joint + "; ".join(clauses) if clauses else "") + ".")
    own = ratios[0][ratios[0]["cell"].isin(compare.references(run, run.control).values())]
    if clause := _against(own[own["race"].isin(group["race"])], direction):
        sentences.append(f"The control {run.control}, native code without any paper's idea, is itself {clause}.")
    if not set(compare.references(run, run.baseline).values()) & set(group["cell"]):
        sentences.append(_absent(run, key))
    if (marked := group[group["status"] == "cpu_bound"]["label"].unique()).size:
        sentences.append(f"Marked cpu_bound, so not a result about the network: {_listed(marked)}.")
        sure = False
    sentences.append(_scope(group))
    return Finding(group_title(key), key["evidence"], key["network"], tuple(sentences), sure)


def _fastest(times: pd.DataFrame, samples: pd.DataFrame) -> tuple[str, tuple[str, ...]]:
    """The label with the least time in a race, and those that it is not shown to beat."""
    fastest = times.sort_values("point").iloc[0]
    best = samples[samples["cell"] == fastest["cell"]]
    level = []
    for rival in times[times["cell"] != fastest["cell"]].to_dict("records"):
        estimate = stats.ratio(samples[samples["cell"] == rival["cell"]], best)
        if compare.verdict(estimate.low, estimate.high) != "faster":
            level.append(rival["label"])
    return str(fastest["label"]), tuple(level)


def _against(speedups: pd.DataFrame, direction: str) -> str:
    """``3.30 to 3.62 times as fast as megatron (95 % intervals within 3.21 to 3.70)``; empty without a pair."""
    rows = speedups[speedups["direction"] == direction].dropna(subset=["low", "high"])
    if rows.empty:
        return ""
    low, high = rows["point"].min(), rows["point"].max()
    point = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    ends = f"{compare.bound(rows['low'].min())} to {compare.bound(rows['high'].max())}"
    interval = f"95 % interval{'s within' if len(rows) > 1 else ''} {ends}"
    unshown = int((rows["verdict"] == "no difference shown").sum())
    tail = f", no difference shown{_share(unshown, len(rows))}" if unshown else ""
    return f"{point} times as fast as {_listed(rows['reference'].unique(), 'or')} ({interval}{tail})"


def _share(part: int, whole: int) -> str:
    if whole == 1:
        return ""
    return " on any of them" if part == whole else f" on {part} of {whole}"


def _absent(run: Run, key: dict[str, Any]) -> str:
    rows = run.rows[(run.rows["system"] == run.baseline) & (run.rows[list(key)] == pd.Series(key)).all(axis=1)]
    why = rows[rows["status"] != "ok"][["status", "reason"]].drop_duplicates()
    if why.empty:
        return f"{run.baseline} was not run here, so there is no ratio to it."
    return f"{run.baseline} has no time here ({why.iloc[0]['status']}: {why.iloc[0]['reason']})."


def _scope(group: pd.DataFrame) -> str:
    """What the intervals speak for."""
    reps = int(group["num_samples"].min())
    if group["num_launches"].max() == 1:
        return f"One launch of {_count(reps, 'repetition')}: the intervals say nothing about change between launches."
    return f"Paired over {_span(group['num_launches'])} launches, at least {reps} repetitions of each system in all."


def _span(numbers: pd.Series) -> str:
    """``4``, or ``3 to 4`` where they differ."""
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low} to {high}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(names: Iterable[Any], last: str = "and") -> str:
    """``a, b and c``."""
    words = [str(n) for n in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
