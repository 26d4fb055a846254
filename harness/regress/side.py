"""One side of a comparison: a process that runs races with the code of one checkout. Started as a script.

    PYTHONPATH=CHECKOUT python side.py SUITE.yaml LOG_DIR

Reads a race's index per line of stdin and answers one line of JSON: seconds of every repetition by cell and direction,
or what went wrong. It uses only what every checkout has: a suite, a session of ranks, a race.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path.pop(0)  # this folder: the code comes from PYTHONPATH

from harness.bench import suite
from harness.launch.session import open_session

RUN_RACE = "harness.bench.race:run_race"
PRELOAD = ("harness.bench.race",)


def main(suite_file: Path, log_dir: Path) -> None:
    answer_to = sys.stdout
    sys.stdout = sys.stderr
    races = suite.load(suite_file).races
    with contextlib.ExitStack() as stack:
        sessions: dict[Any, Any] = {}

        def session_of(race: Any) -> Any:
            key = race.first.cluster.digest, race.first.wire
            if key not in sessions or sessions[key].closed:
                folder = log_dir / f"{race.first.cluster.name}-{race.first.wire}"
                ranks = open_session(race.first.cluster, log_dir=folder, wire=race.first.wire, preload=PRELOAD)
                sessions[key] = stack.enter_context(ranks)
            return sessions[key]

        with contextlib.suppress(Exception):  # said when it is asked for
            session_of(races[0])  # both sides start at the same time, and not one when the other is done
        for line in sys.stdin:
            race = races[int(line)]
            try:
                answer = _run(session_of(race), race)
            except Exception as error:  # a side that cannot run a race says so; the other goes on
                traceback.print_exc()  # to this side's log
                answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
            answer_to.write(json.dumps(answer) + "\n")
            answer_to.flush()


def _run(session: Any, race: Any) -> dict[str, Any]:
    payload = {
        "experiments": [experiment.model_dump(mode="json") for experiment in race.experiments],
        "repeats": race.repeats,
        "warmup": race.warmup,
    }
    answers = session.call(RUN_RACE, payload)
    cells = []
    for experiment in race.experiments:
        outcomes = [answer["cells"][experiment.digest] for answer in answers]
        bad = next((outcome for outcome in outcomes if outcome["status"] != "ok"), None)
        times: dict[str, list[float]] = {}
        for samples in zip(*(outcome["samples"] for outcome in outcomes), strict=True):
            if samples[0]["device_s"] is not None:
                time_s = max(sample["device_s"] for sample in samples)
            else:
                time_s = max(s["end_s"] for s in samples) - min(s["start_s"] for s in samples)
            times.setdefault(samples[0]["direction"], []).append(time_s)
        facts = {"status": bad["status"], "reason": bad["reason"]} if bad else {"status": "ok", "reason": ""}
        cells.append({**facts, "times_s": {} if bad else times})
    return {"cells": cells, "evidence": session.evidence, "network": session.network["network"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
