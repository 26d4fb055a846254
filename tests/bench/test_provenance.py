"""What a run on GPUs records of them: nvidia-smi is a script that answers as the real one does."""

from __future__ import annotations

import json
import os
import stat
import sys
import textwrap
from pathlib import Path

import pytest

from harness import devices
from harness.bench import provenance, run, suite
from harness.bench.store import Store
from harness.specs import Experiment
from tests.bench.test_tidy import EXPERIMENTS, answers, rows, values

UUIDS = ["GPU-a0a0a0a0-a0a0-a0a0-a0a0-a0a0a0a0a0a0", "GPU-a1a1a1a1-a1a1-a1a1-a1a1-a1a1a1a1a1a1"]
SMI = """
    #!PYTHON
    import sys

    CARDS = [
        {
            "index": str(card), "name": "NVIDIA H100 80GB HBM3", "uuid": uuid, "driver_version": "535.129.03",
            "compute_cap": "9.0", "memory.total": "81559", "mig.mode.current": "Disabled",
            "ecc.mode.current": "Enabled", "persistence_mode": "Enabled", "compute_mode": "Default", "pstate": "P0",
            "clocks.sm": str(1980 - card), "clocks.mem": "2619", "clocks.max.sm": "1980", "clocks.max.mem": "2619",
            "clocks.applications.graphics": "[N/A]", "clocks.applications.memory": "[Not Supported]",
            "power.draw": "119.42", "power.limit": "700.00", "power.default_limit": "700.00", "temperature.gpu": "34",
            "clocks_throttle_reasons.active": "0x0000000000000001",
        }
        for card, uuid in enumerate(UUIDS)
    ]
    if sys.argv[1] == "topo":
        print("\\t\\x1b[4mGPU0\\tGPU1\\tNIC0\\x1b[0m\\nGPU0\\t X \\tNV18\\tPIX")
        sys.exit()
    fields = sys.argv[1].removeprefix("--query-gpu=").split(",")
    assert sys.argv[2:] == ["--format=csv,noheader,nounits"]
    for field in fields:
        if field not in CARDS[0]:
            print(f'Field "{field}" is not a valid field to query.\\n')
            sys.exit(2)
    for card in CARDS:
        print(", ".join(card[field] for field in fields))
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    text = textwrap.dedent(SMI).lstrip().replace("PYTHON", sys.executable).replace("UUIDS", repr(UUIDS))
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_a_run_on_gpus_says_what_it_ran_on(smi, cards, monkeypatch):
    cards(*["NVIDIA H100 80GB HBM3|9.0"] * 2, cuda=12020, mask=UUIDS[1])
    monkeypatch.setenv("NCCL_DEBUG_FILE", str(Path.home() / "nccl.log"))
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    found = provenance.collect([])
    (device,) = found["devices"]  # the job's own, not all that nvidia-smi lists
    assert (device["index"], device["uuid"], device["driver_version"]) == ("1", UUIDS[1], "535.129.03")
    assert (device["mig.mode.current"], device["ecc.mode.current"], device["compute_cap"]) == (
        "Disabled",
        "Enabled",
        "9.0",
    )
    (before,) = found["conditions"]["before"]
    assert (before["clocks.sm"], before["power.limit"], before["clocks.max.sm"]) == ("1979", "700.00", "1980")
    assert before["clocks_throttle_reasons.active"] == "0x0000000000000001"
    assert "clocks.applications.graphics" not in before  # [N/A]
    cuda = found["cuda"]
    assert cuda["supports"] == "12.2"
    assert cuda["topology"].startswith("GPU0\tGPU1\tNIC0\nGPU0")
    assert cuda["environment"]["NCCL_DEBUG_FILE"] == "~/nccl.log"
    assert cuda["environment"]["CUDA_LAUNCH_BLOCKING"] == "1"
    assert str(Path.home()) not in json.dumps(found["cuda"])


def test_libraries_are_those_of_torch(cards, cuda_build, monkeypatch):
    import torch

    cuda_build("12.6")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert provenance._libraries() == {"torch_built_for": "12.6", "cudnn": "91002", "nccl": "2.28.9"}


def test_without_nvidia_smi_cuda_tells_what_it_can(cards, monkeypatch):
    cards("NVIDIA H100 80GB HBM3|9.0")
    found = provenance.collect([])
    assert found["devices"] == [
        {"name": "NVIDIA H100 80GB HBM3", "uuid": UUIDS[0], "compute_cap": "9.0", "memory.total": str(80 << 10)}
    ]
    assert (found["cuda"]["nvidia_smi"], found["cuda"]["topology"]) == ("absent", "absent")
    assert found["conditions"] == {"before": []}
    assert provenance.conditions() == []


def test_without_a_driver_there_is_nothing_to_tell(no_driver):
    found = provenance.collect([])
    assert (found["devices"], found["cuda"]) == ([], {})
    assert "conditions" not in found
    assert provenance.conditions() == []


def test_the_record_is_stored_before_and_after(smi, cards, tmp_path):
    cards("NVIDIA H100 80GB HBM3|9.0")
    store = Store(tmp_path / "run")
    store.prepare()
    finish = run.keep_record(store, "launch-0", {"launch": 0, **provenance.collect([])})
    assert set(store.records()["launch-0"]["conditions"]) == {"before"}
    finish()
    conditions = store.records()["launch-0"]["conditions"]
    assert conditions["before"] == conditions["after"] != []


def test_lines_of_nvidia_smi():
    assert devices.rows("NVIDIA H100 PCIe, [N/A], 45\n\nNo devices were found\n", ["name", "pstate", "power.draw"]) == [
        {"name": "NVIDIA H100 PCIe", "power.draw": "45"}
    ]


@pytest.mark.parametrize("text", ["0", "1"])
def test_rows_say_how_cuda_was_set(monkeypatch, text):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", text)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    told = [{**answer, "launch_settings": devices.launch_settings()} for answer in answers()]
    assert values(rows(told), "cuda_launch_blocking") == [float(text)]
    assert values(rows(told), "cuda_device_max_connections") == [1.0]
    assert not len(values(rows(answers()), "cuda_launch_blocking"))


def test_big_experts_get_the_time_to_be_drawn():
    """DeepSeek-V3's, 32 a rank: minutes, where a small model's are nothing."""
    (experiment,) = suite.parse(EXPERIMENTS, "small").experiments
    fields = experiment.model_dump()
    fields["model"] |= {"hidden": 7168, "ffn": 2048, "num_experts": 256, "ffn_type": "swiglu", "top_k": 8}
    assert run.drawing_s(Experiment.model_validate(fields)) > 60
    assert run.drawing_s(experiment) < 1
