"""Suites for the GPUs that are there: which one, on how many ranks, at what rates, and that its cells can run."""

from __future__ import annotations

import json
import sys

import pytest

from harness import cli, devices, presets
from harness.bench import dry, suite
from harness.cli.run import fitting
from harness.errors import UserError
from harness.presets import this_machine
from harness.registry import systems
from harness.regress.run import suite_file

H100 = devices.Device("NVIDIA H100 80GB HBM3", "GPU-1", (9, 0), 80 * 10**9)
UNKNOWN = devices.Device("NVIDIA Something 9000", "GPU-2", (12, 0), 32 * 10**9)
SLICE = devices.Device("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "GPU-3", (9, 0), 10**10)


@pytest.fixture
def here(monkeypatch):
    """``here(device, 4)``: the GPUs of this machine are those."""

    def be(device: devices.Device, count: int) -> None:
        monkeypatch.setattr(this_machine, "_asked", lambda: (device,) * count)

    return be


@pytest.mark.parametrize(("name", "count", "ranks"), [("gpu", 3, 1), ("gpu-node", 9, 8)])
def test_as_many_ranks_as_fit_and_every_installed_system_takes_every_cell(here, name, count, ranks):
    here(H100, count)
    found = suite.load(name)
    (cluster,) = {experiment.cluster for experiment in found.experiments}
    assert (cluster.shape, cluster.kind, cluster.device) == ((1, ranks), "physical", H100.name)
    assert {experiment.cluster.device_memory_bytes for experiment in found.experiments} == {80 * 10**9}
    refused = {row["system"]: row["refused"] for row in dry.rows(found, here=False) if row["refused"]}
    assert refused == {name: each.missing() for name, each in systems().items() if name in refused}
    assert {race.first.model.name for race in found.races} == {"mixtral-8x7b-layer", "qwen3-30b-a3b-layer"}


@pytest.mark.parametrize(("count", "ranks"), [(2, 2), (3, 2), (7, 4), (8, 8)])
def test_a_node_has_2_4_or_8_ranks(here, count, ranks):
    here(H100, count)
    cluster = presets.cluster("gpu-node")
    assert (cluster.name, cluster.shape) == (f"gpu-node-{ranks}", (1, ranks))


@pytest.mark.parametrize(
    ("device", "flops_per_s", "link"), [(H100, 989.4e12, 450e9), (UNKNOWN, None, None), (SLICE, None, None)]
)
def test_rates_are_the_data_sheets_or_unknown(here, device, flops_per_s, link):
    here(device, 4)
    cluster = this_machine.cluster("gpu-node")
    assert (cluster.device, cluster.device_flops_per_s) == (device.name, flops_per_s)
    assert [level.bandwidth_bytes_per_s for level in cluster.levels] == [None, link]
    assert cluster.source


def test_what_is_not_here_is_said_in_one_line(here, monkeypatch):
    here(H100, 1)
    with pytest.raises(UserError, match=r"'gpu-node': is 2 to 8 GPUs of this machine, which has 1; name another"):
        suite.load("gpu-node")
    here(H100, 0)
    with pytest.raises(UserError, match=r"suites/gpu.yaml: .*'one-gpu': is at least 1 GPU of this machine"):
        suite.load("gpu")
    monkeypatch.setattr(this_machine, "_asked", lambda: (H100, UNKNOWN))
    with pytest.raises(UserError, match=r"needs equal GPUs, but the first 2 here are .*HBM3, .*9000; set CUDA_VISIBLE"):
        suite.load("gpu-node")


def test_a_mask_that_names_no_device_is_no_machine_without_gpus(cards, monkeypatch):
    cards(f"{H100.name}|9.0", f"{H100.name}|9.0", mask="7")
    this_machine._asked.cache_clear()
    for ask in (fitting, lambda: suite.load("gpu"), lambda: suite.load("gpu-node")):
        with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES: '7': '7' names no device .*some of 0 to 1 or of"):
            ask()
    cards(f"{H100.name}|9.0", fails=999)
    with pytest.raises(UserError, match=r"which has 0 \(.*CUDA error 999\)+; name another"):
        suite.load("gpu")
    this_machine._asked.cache_clear()


def test_a_system_that_wants_two_levels_is_not_refused_by_the_comparison_on_one_gpu():
    assert [dry.refusal(experiment) for experiment in suite.load(suite_file("gpu")).experiments] == [None] * 4


@pytest.mark.parametrize(("count", "chosen"), [(0, "quick"), (1, "gpu"), (2, "gpu-node"), (8, "gpu-node")])
def test_auto_takes_what_fits(capsys, count, chosen):
    with this_machine.assuming(count):
        assert fitting() == chosen
    assert f"suite {chosen}: {count} GPU" in capsys.readouterr().err


def test_a_dry_run_lists_every_cell(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moebench", "run", "--suite", "auto", "--dry-run", "--gpus", "1", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["suite"] == "gpu"
    assert len(told["cells"]) == 32
    assert {row["ranks"] for row in told["cells"]} == {1}
    assert all(row["refused"] or row["estimate_s"] > 0 for row in told["cells"])


def test_a_dry_run_says_what_this_machine_lacks(no_driver, tmp_path, monkeypatch, capsys):
    card = {"name": "mine", "kind": "local", "device": "H100", "levels": [{"name": "gpu", "size": 2}]}
    experiment = {"model": "moe-tiny", "workload": "uniform-512", "system": "flat", "phase": "layer"}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"name": "mine", "experiments": [experiment | {"cluster": [card, "local-2"]}]}))
    monkeypatch.setattr(sys, "argv", ["moebench", "run", str(path), "--dry-run", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    refused = {row["cluster"]: row["refused"] for row in json.loads(capsys.readouterr().out)["cells"]}
    assert "2 GPUs" in refused["mine"]
    assert refused["local-2"] is None
