"""A model with shared experts never runs as if it had none: refused where layers would lack them, named elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from harness import presets
from harness.bench import dry, layer_cost, race, suite
from harness.comm.job import Job
from harness.errors import UserError
from harness.report import context
from harness.report.run import load
from harness.routing.record import record
from harness.studies import left_out
from harness.topology import Topology
from methods.hiermoe import studies
from methods.hiermoe.replay import RIVALS
from tests.report.synthetic_run import RunMaker

WHY = "deepseek-v3-half has 1 shared expert, and layers run without; give it num_shared_experts: 0 and another name"
SYSTEMS = ["flat", "megatron", "fsmoe", "moetuner"]
PHASES = ["layer", "train_step", "prefill", "decode"]


def parsed(phases: list[str]) -> suite.Suite:
    common = {"model": "deepseek-v3-half", "cluster": "local-1", "workload": "balanced-2048", "system": SYSTEMS}
    return suite.from_data({"name": "shared", "experiments": [{**common, "phase": phases}]}, "shared")


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    """One rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield Job(Topology((1, 1)))
    dist.destroy_process_group()


def test_it_is_refused_in_every_phase_that_runs_layers(job):
    for experiment in parsed(PHASES).experiments:
        assert experiment.lacks == WHY
        outcome = race.Outcome()
        assert race.admit(job, experiment, outcome, {"warmup": 1}, {}) is None
        assert (outcome.status, outcome.reason) == ("refused", WHY)
        assert dry.refusal(experiment) == WHY


def test_exchanges_lack_nothing():
    for experiment in parsed(["exchange"]).experiments:
        assert experiment.lacks is None
        assert (dry.refusal(experiment) or "") != WHY


def test_it_is_neither_recorded_nor_profiled_without_them(tmp_path: Path):
    with pytest.raises(UserError, match="has 1 shared expert"):
        record(presets.model("deepseek-v3-half"), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="has 1 shared expert"):
        layer_cost.experiments(presets.cluster("local-2"), "flat", "deepseek-v3-half")


def test_studies_keep_it_and_say_what_they_leave_out(monkeypatch: pytest.MonkeyPatch):
    (note,) = left_out([presets.model("deepseek-v3-half"), presets.model("qwen3-30b-a3b")], "their time is left out")
    assert note == "Of deepseek-v3-half, shared experts (1 in each layer) have no part in this: their time is left out."
    monkeypatch.setattr(studies, "SKEWS", (1.0,))
    model, two = presets.model("qwen3-30b-a3b"), {name: RIVALS[name] for name in ("megatron", "hd2")}
    small = studies.of_layers(presets.cluster("hiermoe"), model, studies.workload(1.0, 64), two, 2, 0)
    monkeypatch.setattr(studies, "_by_skew", lambda name, skew: small)
    for study in (studies.exchanges, studies.steps):
        found = study(lambda text: None)
        assert "deepseek-v3-half" in set(next(iter(found.tables.values()))["model"])
        assert any("Of deepseek-v3-half, shared experts" in note for note in found.notes)


def test_pages_show_how_many_there_are(tmp_path: Path):
    (experiment, *_) = parsed(["exchange"]).experiments
    maker = RunMaker(tmp_path / "runs" / "demo")
    maker.timed(experiment, 1.0)
    maker.write_records()
    html = context.where(load(maker.path)).html
    assert "shared experts" in html
