"""The report's sentences, made from the data and never stronger than its intervals."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pandas as pd

from harness.bench import stats
from harness.bench.store import SIMULATED
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
    "not run": "it was to run, and no row of it is stored",
    "crashed": "its job ended without a row of it",
    "timed out": "its job reached its time limit before it",
    "cancelled": "its job was cancelled before it",
    "running": "its job is at it",
    "queued": "its job waits for room",
    "requeued": "its job will start again",
    "unsubmitted": "its job has not been submitted",
}
EXPECTED = ("refused", "running", "queued", "requeued", "unsubmitted")  # nothing went wrong (yet)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one group of races shows. ``sure``: a fastest system is shown on every workload, without a mark, and all
    others ran or were refused."""

    title: str
    evidence: str
    network: str
    sentences: tuple[str, ...]
    sure: bool


def findings(run: Run) -> list[Finding]:
    """One finding for every group of which something has a time, and for every other group that was to."""
    times, samples = compare.times(run), compare.samples(run)
    if times.empty:
        return []
    ratios = compare.speedups(run, run.baseline), compare.speedups(run, run.control)
    found = []
    for key, rows in run.rows.groupby(GROUP):
        group = dict(zip(GROUP, key, strict=True))
        cells = rows.drop_duplicates("cell")
        timed = times[times["cell"].isin(cells["cell"])]
        if timed.empty:
            found.append(_untimed(run, group))
        elif group["evidence"] == SIMULATED:
            found.append(_predicted(run, group, cells, timed))
        else:
            found.append(_finding(run, group, cells, timed, samples, *ratios))
    return found


def _predicted(run: Run, key: dict[str, Any], cells: pd.DataFrame, group: pd.DataFrame) -> Finding:
    """Of a simulated group: the order that the judge predicts, as a prediction, and what it rests on."""
    group = group[group["direction"] == main_direction(group)]
    firsts: dict[tuple[str, ...], list[str]] = defaultdict(list)  # shortest, next, ratio -> races
    for race, rows in group.groupby("race", sort=False):
        order = rows.sort_values("point")
        lead = order.iloc[1]["point"] / order.iloc[0]["point"] if len(order) > 1 else float("nan")
        firsts[(*order["label"].iloc[:2], f"{lead:.2f}")].append(str(race))
    sentences = []
    for (first, *after, lead), races in firsts.items():
        here = group[group["race"].isin(races)]
        count = _systems(here, cells[cells["race"].isin(races)])
        text = f"{first} has the shortest simulated time of {count} on {listed(here['workload'].unique())}"
        sentences.append(f"{text}; the next, {after[0]}, takes {lead} times as long." if after else f"{text}.")
    sentences += [*_setbacks(run, key), *_mixed(run, group)]
    sentences.append(f"Nothing was run: {rests_on(run.rows[run.rows['cell'].isin(group['cell'])])}.")
    return Finding(group_title(key), key["evidence"], key["network"], tuple(sentences), False)


def rests_on(rows: pd.DataFrame) -> str:
    """What simulated ``rows`` rest on, and how far that was off where it was tried, in words."""
    return f"by {listed(rows['basis'].dropna().unique()) or 'an unknown machine'}; {heldout(rows['heldout_error'])}"


def heldout(errors: pd.Series) -> str:
    known = pd.to_numeric(errors).dropna()
    if known.empty:
        return "how far off that is, no run has told yet"
    low, high = f"{known.min():.0%}", f"{known.max():.0%}"
    return f"off by {low if low == high else f'{low} to {high}'} on average where it was held against runs"


def _untimed(run: Run, key: dict[str, Any]) -> Finding:
    sentences = ("No system has a time here.", *_setbacks(run, key))
    return Finding(group_title(key), key["evidence"], key["network"], sentences, False)


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
    run: Run,
    key: dict[str, Any],
    cells: pd.DataFrame,
    group: pd.DataFrame,
    samples: pd.DataFrame,
    *ratios: pd.DataFrame,
) -> Finding:
    """``cells``: all of the group; ``group``: times of those that have some."""
    direction = main_direction(group)
    group = group[group["direction"] == direction]
    samples = samples[samples["direction"] == direction]
    back = compare.setbacks(run)
    marks = back.drop_duplicates("cell").set_index("cell")["status"].to_dict()
    sure = all(status in EXPECTED for cell, status in marks.items() if cell in set(cells["cell"]))
    outcomes: dict[tuple[str, tuple[str, ...], bool, str], list[str]] = defaultdict(list)  # -> races
    for race, rows in group.groupby("race", sort=False):
        first, level = _fastest(rows, samples[samples["race"] == race])
        mark = marks.get(first["cell"], "")
        outcomes[first["label"], level, len(rows) == 1, mark].append(str(race))
        sure = sure and not level and len(rows) > 1 and not mark

    sentences = []
    for (fastest, level, alone, mark), races in outcomes.items():
        here = group[group["race"].isin(races)]
        every = len(outcomes) == 1 and len(races) > 3
        where = f"on all {len(races)} workloads" if every else "on " + listed(here["workload"].unique())
        count = _systems(here, cells[cells["race"].isin(races)])
        if alone:
            also = f"; it is not ok there: {mark}" if mark else ""
            sentences.append(f"Only {fastest} has a time {where} ({count}{also}): nothing to compare.")
            continue
        if level:
            unbeaten = listed(level, "or")
            text = f"{fastest} has the shortest time of {count} {where}, but no difference from {unbeaten} is shown"
        elif mark:
            text = f"{fastest} has the shortest time of {count} {where}, but it is not ok there ({mark})"
        else:
            text = f"{fastest} is the fastest of {count} {where}"
        mine = [frame[(frame["label"] == fastest) & frame["race"].isin(races)] for frame in ratios]
        clauses = list(filter(None, (_against(rows[~rows["reference"].isin(level)], direction) for rows in mine)))
        joint = "; it is " if level else ": "
        sentences.append(text + (joint + "; ".join(clauses) if clauses else "") + ".")
    own = ratios[0][ratios[0]["cell"].isin(compare.references(run, run.control).values())]
    if clause := _against(own[own["race"].isin(group["race"])], direction):
        sentences.append(f"The control {run.control}, native code without any paper's idea, is itself {clause}.")
    sentences += _setbacks(run, key)
    if not set(compare.references(run, run.baseline).values()) & set(group["cell"]):
        sentences.append(f"There is no ratio to {run.baseline}, which has no time here.")
    if (marked := group[group["status"] == "cpu_bound"]["label"].unique()).size:
        sentences.append(f"Marked cpu_bound, so not a result about the network: {listed(marked)}.")
    sentences += _mixed(run, group)
    sentences.append(_scope(group))
    return Finding(group_title(key), key["evidence"], key["network"], tuple(sentences), sure)


def _mixed(run: Run, group: pd.DataFrame) -> list[str]:
    """That a time is one of different batches, where it is."""
    names = group[group["race"].isin(compare.drifting(run))]["workload"].unique()
    if not len(names):
        return []
    head = f"The routing of {listed(names)} drifts" if len(names) == 1 else f"The routings of {listed(names)} drift"
    return [f"{head}: every repetition is another step, so times there are means over different batches."]


def _systems(timed: pd.DataFrame, cells: pd.DataFrame) -> str:
    """``4 systems``, or ``3 systems (of 4 that were to run)``, of each race."""
    ran, all_ = timed.groupby("race").size(), cells.groupby("race").size()
    noun = "system" if ran.max() == 1 else "systems"
    return f"{span(ran)} {noun}" + ("" if (ran == all_).all() else f" (of {span(all_)} that were to run)")


def _setbacks(run: Run, key: dict[str, Any]) -> list[str]:
    """Who has no time here, or lost one in some launch, and why: a sentence each, reasons of several as one."""
    back = compare.setbacks(run)
    back = back[(back[list(key)] == pd.Series(key)).all(axis=1) & (back["status"] != "cpu_bound")]
    sentences = []
    for timed, head in ((False, "No time"), (True, "No time in some launches")):
        said = [
            f"{listed(rows['label'].unique())} {status} on {listed(rows['workload'].unique())}"
            + (f" (launch {listed(rows['launches'].unique())})" if timed else "")
            + f": {shortened(str(reason))}"
            for (status, reason), rows in back[back["timed"] == timed].groupby(["status", "reason"], sort=False)
        ]
        sentences += [f"{head}: {'; '.join(said)}."] if said else []
    return sentences


def shortened(reason: str, most: int = 240) -> str:
    """The beginning of a long one; the tables have all of it."""
    reason = " ".join(reason.split()) or "no reason was stored"
    return reason if len(reason) <= most else f"{reason[: most - 1]}…"


def _fastest(times: pd.DataFrame, samples: pd.DataFrame) -> tuple[pd.Series, tuple[str, ...]]:
    """The cell with the least time in a race, and the labels that it is not shown to beat."""
    fastest = times.sort_values("point").iloc[0]
    best = samples[samples["cell"] == fastest["cell"]]
    level = []
    for rival in times[times["cell"] != fastest["cell"]].to_dict("records"):
        estimate = stats.ratio(samples[samples["cell"] == rival["cell"]], best)
        if compare.verdict(estimate.low, estimate.high) != "faster":
            level.append(rival["label"])
    return fastest, tuple(level)


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
    return f"{point} times as fast as {listed(rows['reference'].unique(), 'or')} ({interval}{tail})"


def _share(part: int, whole: int) -> str:
    if whole == 1:
        return ""
    return " on any of them" if part == whole else f" on {part} of {whole}"


def _scope(group: pd.DataFrame) -> str:
    """What the intervals speak for."""
    reps = int(group["num_samples"].min())
    if group["num_launches"].max() == 1:
        return f"One launch of {_count(reps, 'repetition')}: the intervals say nothing about change between launches."
    return f"Paired over {span(group['num_launches'])} launches, at least {reps} repetitions of each system in all."


def span(numbers: pd.Series) -> str:
    """``4``, or ``3 to 4`` where they differ."""
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low} to {high}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(names: Iterable[Any], last: str = "and") -> str:
    """``a, b and c``."""
    words = [str(n) for n in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
