"""Predictions of a stored run: of every system and phase, with the processor's part of one system's executed tasks."""

from __future__ import annotations

import datetime
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from harness import ledger, presets
from harness.bench.store import BLANK, SCHEMA_VERSION, Store, identity
from harness.errors import UserError
from harness.plan.graph import Timeline
from harness.report.predicted import Simulator
from harness.specs import Experiment

CLUSTER = "emulated-2x4-balanced"


def experiment(system: str, phase: str = "layer", **changes) -> Experiment:
    parts = {"cluster": presets.cluster(CLUSTER), "workload": presets.workload("balanced-2048")}
    fields = {"model": presets.model("local-m512-e16k2"), **parts, "system": system}
    return Experiment.parse(fields | {"phase": phase, "compute": "stand-in"} | changes, "test")


def run_of(path, *experiments: Experiment) -> SimpleNamespace:
    still = pd.DataFrame({"cell": [], "value": []})  # no routing that drifts
    return SimpleNamespace(
        path=path, experiments={each.digest: each.model_dump() for each in experiments}, metric=lambda name: still
    )


def seconds(frame: pd.DataFrame, of: Experiment) -> float:
    (value,) = frame[(frame["cell"] == of.digest) & (frame["direction"] == "total")]["predicted_s"]
    return value


def test_every_phase_and_kind_of_system_is_predicted(tmp_path):
    known = [
        experiment("flat", "exchange"),
        experiment("megatron"),
        experiment("hecate"),
        experiment("flat", "decode", backward=False),
    ]
    unknown = experiment("flat", cluster=presets.cluster("emulated-2x4"))
    calibration = ledger.latest(presets.cluster(CLUSTER))
    assert calibration is not None
    ledger.record(calibration, tmp_path / "ledger")
    found = Simulator(tmp_path / "ledger").predictions(run_of(tmp_path, *known, unknown))
    assert {each.digest for each in known} == set(found[found["direction"] == "total"]["cell"])
    assert (found["predicted_s"] > 0).all()
    layer = found[found["cell"] == known[2].digest].set_index("direction")["predicted_s"]
    assert layer["total"] == pytest.approx(layer["forward"] + layer["backward"])
    with pytest.raises(UserError, match=f"was never profiled; moebench profile {CLUSTER}"):
        Simulator(tmp_path).predictions(run_of(tmp_path, *known))


def stored(path, of: Experiment, time_s: float) -> None:
    """A run in which one cell was timed."""
    base = BLANK | identity(of) | {"run": path.name, "launch": 0, "cell": of.digest, "metric": "time_s"}
    base |= {"evidence": "emulated", "network": "shaped", "unit": "s", "status": "ok", "rank": -1, "value": time_s}
    base |= {"direction": "total", "time_utc": "2026-01-01T00:00:00", "schema_version": SCHEMA_VERSION}
    store = Store(path)
    store.prepare()
    store.append(pd.DataFrame([base | {"rep": rep} for rep in range(2)]))
    store.write_record("0", {"evidence": "emulated", "experiments": {of.digest: of.model_dump(mode="json")}})


def slower(timeline: Timeline, task: str, by_s: float) -> Timeline:
    """What ran, had ``task`` taken so much longer, and all behind it begun as much later."""
    (here,) = [i for i, each in enumerate(timeline.plan.tasks) if each.name == task]
    start, end = timeline.start_s.copy(), timeline.end_s.copy()
    end[here:] += by_s
    start[here + 1 :] += by_s
    return Timeline(timeline.plan, start, end)


def test_the_processor_s_part_comes_from_one_system_whose_cells_are_not_judged(tmp_path):
    flat, other, elsewhere = experiment("flat"), experiment("smartmoe"), experiment("flat", "exchange")
    run = run_of(tmp_path, flat, other, elsewhere)
    plain = Simulator(host_of="flat")
    before = plain.predictions(run)
    assert not plain.fitted  # nothing has run
    forward = plain.timelines(run, flat.digest)["forward"]
    stored(tmp_path, flat, seconds(before, flat) + 0.25)
    Store(tmp_path).write_trace(flat.digest, {"forward": slower(forward, "forward.gate", 0.25)})
    simulator = Simulator(host_of="flat")
    after = simulator.predictions(run)
    for each, more in ((flat, 0.25), (other, 0.25), (elsewhere, 0.0)):  # of another phase nothing is known
        assert seconds(after, each) - seconds(before, each) == pytest.approx(more, rel=1e-3, abs=1e-6)
    assert simulator.fitted == {flat.digest}
    start, end = simulator.timelines(run, other.digest)["forward"].of("forward.gate")
    (begun, ended) = plain.timelines(run, other.digest)["forward"].of("forward.gate")
    assert np.min(end - start) == pytest.approx(0.25 + np.min(ended - begun), rel=1e-3)
    frame = pd.DataFrame({"cell": [flat.digest, other.digest], "race": "r", "measured_s": 1.0, "predicted_s": [9, 2]})
    assert simulator.agreement(frame).largest_error == 1.0
    assert plain.agreement(frame).largest_error == 8.0
    ignorant = Simulator()
    assert seconds(ignorant.predictions(run), other) == seconds(before, other)


def test_the_newest_calibration_is_taken(tmp_path):
    found = ledger.latest(presets.cluster(CLUSTER))
    assert found is not None
    ledger.record(found, tmp_path)
    run = run_of(tmp_path, experiment("flat", "exchange"))
    (first, *_) = Simulator(tmp_path).predictions(run)["predicted_s"]
    later = datetime.datetime.fromisoformat(found.date) + datetime.timedelta(days=1)
    fits = {
        key: fit.model_copy(update={"alpha_s": 0.0, "beta_s_per_byte": 2 * fit.beta_s_per_byte})
        for key, fit in found.fits.items()
    }
    ledger.record(found.model_copy(update={"date": later.isoformat(), "fits": fits}), tmp_path)
    (second, *_) = Simulator(tmp_path).predictions(run)["predicted_s"]
    assert second > 1.5 * first
