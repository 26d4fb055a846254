"""Every file that is read, damaged in every way: one line that names it, or what was written; never another exception,
and never another value."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from harness import ledger, placing, presets
from harness.bench import suite
from harness.bench.store import SCHEMA, SCHEMA_VERSION, Store
from harness.errors import UserError
from harness.layer import stored
from harness.layer.gpt import GPT
from harness.ledger import Calibration
from harness.plan import perfetto
from harness.plan.graph import COMPUTE, Plan, Timeline
from harness.regress import run as regress
from harness.routing.record import LocalMoE
from harness.routing.trace import Header, Recorded, read_trace, write_trace
from harness.specs import Model
from harness.sweep import spec
from harness.sweep.folder import SweepFolder

NUM_FLIPS = 1000  # over all formats together
MODEL = Model(name="m", num_layers=1, hidden=8, ffn=8, num_experts=4, top_k=2, num_heads=2, seq=8, vocab=16)
EXPERIMENTS = """name: demo
experiments:
  - {model: moe-tiny, cluster: local-2, workload: {tokens_per_rank: 8, generator: uniform}, system: flat, phase: layer}
"""


class Format(NamedTuple):
    """``path`` holds what moebench wrote. ``read`` gives it back as plain data, or a word of why not. ``users``:
    whether the text is a user's own, so that another text is another wish and only exceptions are wrong."""

    path: Path
    read: Callable[[], Any]
    users: bool = False


def trace(folder: Path) -> Format:
    path = folder / "t.parquet"
    ids = np.stack([np.arange(16) % 4, (np.arange(16) + 1) % 4], axis=1)
    header = Header(model="m", num_experts=4, top_k=2, num_layers=2, corpus="text", command="record", date="today")
    write_trace(path, header, [Recorded(5, layer, ids, np.full((16, 2), 0.5), 1.25) for layer in range(2)])

    def read() -> Any:
        found = read_trace(path)
        return found.header.model_dump(), [
            (row.step, row.layer, row.loss, row.ids.tolist(), row.weights.tolist()) for row in found.values()
        ]

    return Format(path, read)


def weights(folder: Path) -> Format:
    path = folder / "w.npz"
    stored.save(path, GPT(MODEL, lambda layer: LocalMoE(MODEL, layer, 0)))
    return Format(path, lambda: {name: array.tolist() for name, array in stored.load(path, MODEL).items()})


def placement(folder: Path) -> Format:
    path = folder / "p.json"
    made = placing.PlacementFile(
        model="m", num_experts=4, num_ranks=2, cluster="c", method="joint", slots=(((0, 1), (2, 3)), ((0, 2), (1, 3))),
        objective={"tail": 1.25}, scores={"held-out": {"tokens": 17.5}},
    )  # fmt: skip
    placing.write(path, made)
    return Format(path, lambda: placing.read(path).model_dump())


def store(folder: Path) -> tuple[Store, Path]:
    text = {f.name: "" for f in SCHEMA if f.type == pa.string()}
    base = {**text, "race": "0" * 16, "cell": "c", "launch": 0, "status": "ok", "metric": "time_s", "time_utc": "t"}
    found = Store(folder / "run")
    found.prepare()
    rows = [{**base, "value": i / 7, "rep": i, "rank": -1, "schema_version": SCHEMA_VERSION} for i in range(20)]
    return found, found.append(pd.DataFrame(rows))


def part(folder: Path) -> Format:
    found, path = store(folder)
    return Format(path, lambda: found.read(damaged="raise").to_dict("list"))


def outcomes(folder: Path) -> Format:
    found, path = store(folder)
    return Format(path, lambda: found.outcomes() or "none")


def record(folder: Path) -> Format:
    found, _ = store(folder)
    found.write_record("r", {"launch": 0, "experiments": {"c": {"options": {"t": 4}}}, "repeats": [1, 2.5]})
    return Format(found.path / "record-r.json", lambda: found.records() or "none")


def timeline(folder: Path) -> Format:
    found, _ = store(folder)
    plan = Plan()
    plan.add("a", COMPUTE)
    plan.add("b", "inter", ["a"])
    found.write_trace("c", {"forward": Timeline(plan, np.array([[0.0], [0.5]]), np.array([[0.5], [0.75]]))})

    def read() -> Any:
        try:
            traces = perfetto.read(found.path / "traces" / "c.json")
        except ValueError as error:
            return _line(str(error))
        return {
            name: ([(t.name, t.lane, t.kind) for t in each.plan.tasks], each.start_s.tolist(), each.end_s.tolist())
            for name, each in traces.items()
        }

    return Format(found.path / "traces" / "c.json", read)


def calibrations(folder: Path) -> Format:
    shipped = next(iter(ledger.files(spec.ROOT / "results" / "ledger")))
    made = Calibration.model_validate(json.loads(shipped.read_text())["calibrations"][-1])
    ledger.record(made, folder)
    path = folder / f"{made.profiled.name}.json"
    return Format(path, lambda: [each.model_dump_json() for each in ledger.history(path.stem, folder)] or "none")


def reference(folder: Path) -> Format:
    times = pd.DataFrame([{"race": "r", "system": "flat", "direction": "forward", "pair": 0, "head_s": 0.25}])
    path = regress.write_reference(times, "q")
    return Format(path, lambda: regress.read_reference("q").to_dict("list"))


def sweep(folder: Path) -> Format:
    found = SweepFolder(folder / "run")
    found.write("sweep.json", {"on": "local", "cells": 3})
    return Format(found.path / "sweep.json", found.read)


def _of_lines(path: Path, read: Callable[[], list[Any]]) -> Format:
    """A file that grows line by line: what was not yet or is no more there is "none"."""
    written = read()

    def known() -> Any:
        found = read()
        if any(line not in written for line in found):
            return found
        return written if len(found) >= len(written) else "none"

    return Format(path, known)


def events(folder: Path) -> Format:
    found = SweepFolder(folder / "run")
    for did in ("start", "begin", "race", "end"):
        found.tell(0, did, race="a", launch=0)
    return _of_lines(found.events_path(0), lambda: found.events(0))


def tasks(folder: Path) -> Format:
    found = SweepFolder(folder / "run")
    for job in range(3):
        found.add_job({"tasks": [[0, {"digest": f"{job:016}"}]]})
    return _of_lines(found.path / "tasks.jsonl", found.tasks)


def submissions(folder: Path) -> Format:
    found = SweepFolder(folder / "run")
    found.path.mkdir(parents=True)
    for job in range(3):
        found.add_submission("slurm", {job: f"7_{job}"})
    return _of_lines(found.path / "submissions.jsonl", found.submissions)


def experiments(folder: Path) -> Format:
    path = folder / "e.yaml"
    path.write_text(EXPERIMENTS)
    return Format(path, lambda: suite.load(path).name, users=True)


def cluster(folder: Path) -> Format:
    path = folder / "c.yaml"
    path.write_text((spec.CLUSTERS / "one-machine.yaml").read_text())
    return Format(path, lambda: spec.load_cluster(path).name, users=True)


def bandwidths(folder: Path) -> Format:
    path = folder / "b.csv"
    path.write_text("inf,2.5e9\n2.5e9,inf\n")
    return Format(path, lambda: placing.read_bandwidths(path, 2).tolist(), users=True)


FORMATS = (
    trace, weights, placement, part, outcomes, record, timeline, calibrations, reference, sweep, events, tasks,
    submissions, experiments, cluster, bandwidths,
)  # fmt: skip


def outcome(form: Format) -> Any:
    """What is read, or the line that says why nothing is."""
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = form.read()
    except UserError as error:
        return _line(str(error))
    return _line("; ".join(str(each.message) for each in heard)) if heard and found == "none" else found


class _Line(str):
    """Of an error."""


def _line(text: str) -> _Line:
    assert text
    assert "\n" not in text
    return _Line(text)


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_damaged_file_is_a_line_or_the_right_value(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regress, "REFERENCE", tmp_path / "reference")
    form = make(tmp_path)
    whole, right = form.path.read_bytes(), form.read()
    assert not isinstance(right, _Line)
    random = np.random.default_rng([len(whole), FORMATS.index(make)])
    damaged = [b"", b"\0", b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, whole + whole, whole[::-1]]
    damaged += [whole[: int(cut)] for cut in random.integers(0, len(whole), 20)]
    for position, bit in random.integers(0, (len(whole), 8), (NUM_FLIPS // len(FORMATS) + 1, 2)):
        damaged.append(whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :])
    told = 0
    for content in damaged:
        form.path.unlink(missing_ok=True)
        form.path.write_bytes(content)
        found = outcome(form)
        told += isinstance(found, _Line) or found == "none"
        if not form.users and not isinstance(found, str):
            assert found == right, content[:200]
    assert told > 20 or form.users


def test_a_file_of_another_kind_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regress, "REFERENCE", tmp_path / "reference")
    forms = {}
    for make in FORMATS:
        (tmp_path / make.__name__).mkdir()
        forms[make.__name__] = make(tmp_path / make.__name__)
    contents = {name: form.path.read_bytes() for name, form in forms.items()}
    for name, form in forms.items():
        for other, content in contents.items():
            if other != name and {name, other} != {"part", "outcomes"}:
                form.path.unlink(missing_ok=True)
                form.path.write_bytes(content)
                found = outcome(form)
                assert isinstance(found, _Line) or found == "none", (name, other, found)
        form.path.write_bytes(contents[name])
    assert presets.names("models")
