"""What every rank does in ``test_phases``: races whose systems were checked at small shapes elsewhere."""

from __future__ import annotations

from typing import Any
from unittest import mock

from harness.bench import race, serving_check, training_check
from harness.comm.job import Job

CHECKED = {"status": "ok", "reason": "", "errors": {}}


def run(job: Job, payload: dict[str, Any]) -> list[dict[str, list[dict[str, Any]]]]:
    """Each of ``races`` without the trials before it; what is checked at full shape stays. -> of each, by system."""
    found = []
    with (
        mock.patch.object(race, "conforms", return_value=CHECKED),
        mock.patch.object(training_check, "gate_case", return_value=CHECKED),
        mock.patch.object(serving_check, "gate_case", return_value=CHECKED),
    ):
        for experiments in payload["races"]:
            cells = race.run_race(job, {"experiments": experiments, "repeats": 1, "warmup": 1})["cells"]
            found.append(list(cells.values()))
    return found
