"""The bench against itself, on ranks of an emulated cluster: ``python -m tests.bench.selftest [RUNS]``.

Overhead: an empty system timed by the same path, beside the smallest cell of the quick suite. A/A: one system against
itself, interleaved; its ratio must lie within its interval of 1 in 19 of 20 runs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness import presets, registry
from harness.bench import stats, suite
from harness.bench.layer import LayerContender
from harness.bench.tidy import _span
from harness.bench.timing import Stopwatch, interleaved, quiet
from harness.case import case_of
from harness.comm.job import Job
from harness.launch.session import open_session
from harness.specs import Experiment
from tests.bench import systems

NUM_REPS = 6


def times(job: Job, payload: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """On every rank: samples of each of ``experiments``, interleaved, without admission."""
    systems.register()
    experiments = [Experiment.model_validate(data) for data in payload["experiments"]]
    contenders = [LayerContender(job, registry.system(e.system), e, case_of(e)) for e in experiments]
    for contender in contenders:
        contender.warm_up()
    found: list[list[dict[str, Any]]] = [[] for _ in contenders]
    with quiet():
        watch = Stopwatch(job)
        for rep, which in interleaved(len(contenders), payload["reps"]):
            job.phase(f"{experiments[which].system} {rep}")
            found[which] += [vars(sample) for sample in contenders[which].run(rep, watch)]
    return found


def frames(answers: list[list[list[dict[str, Any]]]]) -> list[pd.DataFrame]:
    """Per contender: launch, rep, value (seconds of the job, forward and backward together)."""
    found = []
    for which in range(len(answers[0])):
        samples = [answer[which] for answer in answers]
        spans = [(of_rep[0]["rep"], _span(of_rep)) for of_rep in zip(*samples, strict=True)]
        frame = pd.DataFrame(spans, columns=["rep", "value"]).groupby("rep", as_index=False).sum()
        found.append(frame.assign(launch=0))
    return found


def experiment(system: str, tokens: int) -> dict[str, Any]:
    workload = {"name": "w", "tokens_per_rank": tokens, "generator": "balanced"}
    given = {
        "model": presets.model("local-m1024-e64k8"),
        "cluster": presets.cluster("emulated-2x4"),
        "workload": workload,
        "system": system,
        "phase": "exchange",
    }
    data: dict[str, Any] = Experiment.parse(given, "selftest").model_dump(mode="json")
    return data


def main(num_runs: int) -> None:
    smallest = min(
        tokens
        for race in suite.load("quick").races
        if race.first.phase == "exchange"
        for tokens in race.first.workload.tokens(race.first.cluster.num_ranks)
    )
    cluster = presets.cluster("emulated-2x4")
    with tempfile.TemporaryDirectory() as folder, open_session(cluster, log_dir=Path(folder)) as session:
        print(f"network: {session.network['network']}")
        payload = {"experiments": [experiment(name, smallest) for name in ("empty", "hiermoe-hd2")], "reps": 20}
        empty, cell = (frame["value"].median() for frame in frames(session.call("tests.bench.selftest:times", payload)))
        print(f"overhead {empty * 1e3:.3f} ms, smallest cell {cell * 1e3:.1f} ms: {empty / cell:.2%} (allowed 1 %)")
        inside, ratios = 0, []
        for _ in range(num_runs):
            payload = {"experiments": [experiment("hiermoe-hd2", smallest)] * 2, "reps": NUM_REPS}
            found = stats.ratio(*frames(session.call("tests.bench.selftest:times", payload)))
            inside += found.low <= 1 <= found.high
            ratios.append(found.point)
        spread = np.abs(np.log(ratios))
        print(f"A/A: 1 within the interval in {inside} of {num_runs} runs; ratio off by {spread.mean():.2%} on average")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
