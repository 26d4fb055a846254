from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.bench import suite, tidy
from harness.bench.timing import interleaved

EXPERIMENTS = """
name: tidy
defaults: {repeats: 2, launches: 1, dtype: float32}
experiments:
  - model: moe-tiny
    cluster: emulated-2x4
    workload: {name: uniform-2048, tokens_per_rank: 2048, generator: uniform}
    system: flat
    phase: exchange
"""
NUM_RANKS = 8
SHAPED = {"network": "shaped", "wire": "recv_first", "levels": []}


def answers(time_s: float = 1.0, own_cpu_s: float = 0.05, shared_clock: bool = True, **outcome: Any) -> list[dict]:
    """Rank r starts r milliseconds late and the last ends ``time_s`` after the first has started."""
    (experiment,) = suite.parse(EXPERIMENTS, "tidy").experiments
    found = []
    for rank in range(NUM_RANKS):
        start = 100 + rank / 1000
        sample = {
            "start_s": start,
            "end_s": 100 + time_s - (NUM_RANKS - 1 - rank) / 1000,
            "device_s": None,
            "own_cpu_s": own_cpu_s,
            "parts_s": None,
            "window_s": 2 * time_s,
            "window_cpu_s": own_cpu_s,
            "window_busy_s": 2.0 * time_s,
            "num_bytes": None,
            "loss": None,
        }
        samples = [{**sample, "rep": rep, "direction": d} for rep in (0, 1) for d in ("forward", "backward")]
        cell = {"status": "ok", "reason": "", "errors": {"output": rank / 1e9}, "samples": samples, **outcome}
        found.append(
            {"host": f"n{rank // 4}", "num_cores": 2, "shared_clock": shared_clock, "cells": {experiment.digest: cell}}
        )
    return found


def rows(given: list[dict], failed: dict[str, tuple[str, str]] | None = None, **setting: Any) -> pd.DataFrame:
    (race,) = suite.parse(EXPERIMENTS, "tidy").races
    where = tidy.Setting("run", 0, "emulated", SHAPED, **setting)
    return tidy.rows_of_race(race, where, given, failed or {})


def values(frame: pd.DataFrame, metric: str, **where: object) -> np.ndarray:
    for column, wanted in {"metric": metric, **where}.items():
        frame = frame[frame[column] == wanted]
    return frame["value"].to_numpy()


def test_a_step_lasts_from_the_first_start_to_the_last_end() -> None:
    frame = rows(answers())
    assert values(frame, "time_s", direction="forward") == pytest.approx([1.0, 1.0])
    assert values(frame, "time_s", direction="total") == pytest.approx([2.0, 2.0])
    assert values(frame, "rank_time_s", direction="forward", rep=0) == pytest.approx([0.993] * NUM_RANKS)
    assert values(frame, "error_output") == pytest.approx([7e-9])  # the worst rank's


def test_without_one_clock_the_slowest_rank_counts() -> None:
    assert values(rows(answers(shared_clock=False)), "time_s", direction="forward") == pytest.approx([0.993] * 2)


@pytest.mark.parametrize("shared_clock", [True, False])
def test_on_gpus_rows_hold_both_times_whatever_the_clocks(shared_clock: bool) -> None:
    given = answers(shared_clock=shared_clock)
    for rank, answer in enumerate(given):
        for cell in answer["cells"].values():
            for sample in cell["samples"]:
                sample["device_s"] = 0.5 + rank / 100
    frame = rows(given)
    assert values(frame, "device_time_s", direction="forward") == pytest.approx([0.57, 0.57])
    assert values(frame, "host_time_s", direction="forward") == pytest.approx([0.993, 0.993])
    assert values(frame, "time_s", direction="forward") == pytest.approx([1.0 if shared_clock else 0.57] * 2)
    assert not len(values(rows(answers()), "device_time_s"))


def test_rows_say_how_a_cell_ran() -> None:
    frame = rows(answers(how={"experts": "one grouped GEMM", "state": ""}))
    (how,) = frame[frame["metric"] == "how"].to_dict("records")
    assert (how["level"], how["reason"], how["status"]) == ("experts", "one grouped GEMM", "ok")


def test_cores_are_the_jobs_and_the_neighbours() -> None:
    frame = rows(answers(own_cpu_s=0.1))
    assert values(frame, "own_cores", direction="forward") == pytest.approx([0.8, 0.8])
    assert values(frame, "foreign_cores", direction="forward") == pytest.approx([0.6, 0.6])  # (2 - 0.8) / 2 s
    assert set(frame["status"]) == {"ok"}


def test_a_run_that_its_cores_limit_is_marked_or_refused() -> None:
    marked = rows(answers(own_cpu_s=0.2))
    times = marked[marked["metric"] == "time_s"]
    assert set(times["status"]) == {"cpu_bound"}
    assert "1.60 of 2 cores" in times["reason"].iloc[0]
    refused = rows(answers(own_cpu_s=0.2), refuse_cpu_bound=True)
    assert values(refused, "time_s").size == 0
    assert set(refused[refused["metric"] == "status"]["status"]) == {"cpu_bound"}


def test_a_time_that_the_link_forbids_is_unphysical() -> None:
    frame = rows(answers(time_s=0.01))
    times = frame[frame["metric"] == "time_s"]
    assert set(times["status"]) == {"unphysical"}
    assert "planned bytes through one node port" in times["reason"].iloc[0]


def test_a_cell_without_time_is_one_row_with_its_reason() -> None:
    frame = rows(answers(status="refused", reason="not installed", errors={}, samples=[]))
    assert list(frame["metric"]) == ["status"]
    assert list(frame["reason"]) == ["not installed"]
    (experiment,) = suite.parse(EXPERIMENTS, "tidy").experiments
    frame = rows([], {experiment.digest: ("hung", "rank 3 in 'flat'")})
    assert list(frame["status"]) == ["hung"]


def test_systems_alternate() -> None:
    assert interleaved(2, 2) == [(0, 0), (0, 1), (1, 1), (1, 0)]
