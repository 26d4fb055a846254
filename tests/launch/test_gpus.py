"""Which device ranks get: what CUDA says is real but for its library, which is a stand-in that obeys masks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from harness import devices
from harness.errors import UserError
from harness.launch import gpus, tasks
from harness.launch.session import open_session
from tests.launch.clusters import EMULATED, LOCAL

H100, V100 = "NVIDIA H100 80GB HBM3|9.0", "Tesla V100-SXM2-32GB|7.0"
UUIDS = ["GPU-" + "-".join((2 * n, n, n, n, 3 * n)) for n in (f"{0xA0 + card:02x}" * 2 for card in range(4))]
ONE = LOCAL.model_copy(update={"levels": (LOCAL.levels[1],), "name": "two"})  # one node of two ranks


def physical(device: str = "H100", cluster=ONE):
    return cluster.model_copy(update={"kind": "physical", "device": device})


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        (None, [0, 1, 2, 3]),
        ("3", [3]),
        ("2,0", [2, 0]),
        (UUIDS[1], [1]),
        (UUIDS[3][:9] + "," + UUIDS[0], [3, 0]),
        ("MIG-" + UUIDS[2][4:], [2]),
        ("", []),
        ("-1", []),
    ],
)
def test_a_mask_means_what_cuda_takes_it_for(cards, mask, shown):
    cards(*[H100] * 4, mask=mask)
    found = devices.ask()
    assert [device.uuid for device in found.devices] == [UUIDS[card] for card in shown]
    assert found.cuda == (13, 0)
    assert all(device.capability == (9, 0) and device.memory_bytes == 80 << 30 for device in found.devices)


def test_a_machine_without_a_driver(no_driver):
    found = devices.ask()
    assert (found.cuda, found.devices) == (None, ())
    assert "libcuda" in found.error
    assert gpus.suffice(LOCAL) is False


@pytest.mark.parametrize("mask", [None, "0,1", ",".join(UUIDS[:2])])
def test_ranks_get_the_gpus_that_there_are(cards, cuda_build, mask):
    cards(H100, H100, mask=mask)
    cuda_build()
    assert gpus.suffice(ONE) is True
    assert gpus.suffice(physical()) is True
    assert gpus.suffice(EMULATED) is False


@pytest.mark.parametrize(
    ("cuda", "build", "said"),
    [
        (
            12080,
            "13.0",
            r"is built for CUDA 13.0, the driver supports 12.8 at most; make setup TORCH_INDEX=cu126, or a",
        ),
        (13000, None, r"is a CPU build, the driver is one for CUDA 13.0; make setup TORCH_INDEX=cu130; or choose"),
        (12040, None, r"is a CPU build, the driver is one for CUDA 12.4; make setup TORCH_INDEX=cu126; or choose"),
    ],
)
def test_a_torch_that_the_driver_cannot_run_is_never_gloo_in_silence(cards, cuda_build, caplog, cuda, build, said):
    cards(H100, H100, cuda=cuda)
    cuda_build(build)
    with pytest.raises(UserError, match=r"^cluster two.kind: 'physical': needs 2 GPUs.*" + said):
        gpus.suffice(physical())
    assert gpus.suffice(ONE) is False  # a local cluster is on whatever there is
    assert "cluster two runs on the CPU: torch" in caplog.text


def test_a_newer_driver_runs_an_older_build(cards, cuda_build):
    cards(H100, H100, cuda=13020)
    cuda_build("12.6")
    assert gpus.suffice(physical()) is True


def test_cards_that_a_build_has_no_kernels_for(cards, cuda_build):
    cards(V100, V100)
    cuda_build()
    with pytest.raises(UserError, match=r"no kernels for Tesla V100-SXM2-32GB, capability 7.0; make setup .*cu126"):
        gpus.suffice(physical("V100"))
    cuda_build("12.6", ("sm_50", "sm_70", "sm_90"))
    assert gpus.suffice(physical("V100")) is True
    cuda_build("12.6", ("compute_52",))
    assert gpus.suffice(physical("V100")) is True


@pytest.mark.parametrize(
    ("mask", "part"),
    [("7", "7"), ("0,9", "9"), ("0,1x", None), ("1,1", "1"), ("GPU-beef", "GPU-beef"), ("gpu0", "gpu0")],
)
def test_a_mask_that_names_no_device(cards, cuda_build, mask, part):
    cards(H100, H100, mask=mask)
    cuda_build()
    if part is None:  # CUDA reads numbers as C does
        assert len(devices.ask().devices) == 2
        return
    for cluster in (ONE, physical()):
        with pytest.raises(UserError, match=rf"^CUDA_VISIBLE_DEVICES: '{mask}': '{part}' names no device.*0 to 1"):
            gpus.suffice(cluster)
    assert gpus.suffice(EMULATED) is False


@pytest.mark.parametrize("mask", ["", "-1", "NoDevFiles"])
def test_a_mask_that_hides_all_is_a_wish(cards, cuda_build, caplog, mask):
    cards(H100, H100, mask=mask)
    cuda_build()
    assert gpus.suffice(ONE) is False
    assert not caplog.records
    with pytest.raises(UserError, match=r"needs 2 GPUs on this machine, which has 0 that torch can use"):
        gpus.suffice(physical())


def test_a_driver_that_fails_says_so(cards, cuda_build):
    cards(H100, H100, fails=802)
    cuda_build()
    with pytest.raises(UserError, match=r"system not yet initialized \(CUDA error 802\)"):
        gpus.suffice(physical())


def test_fewer_gpus_than_ranks(cards, cuda_build, caplog):
    cards(H100)
    cuda_build()
    with pytest.raises(UserError, match=r"^cluster two.kind: 'physical': needs 2 GPUs on this machine, which has 1; "):
        gpus.suffice(physical())
    assert gpus.suffice(ONE) is False
    assert "cluster two runs on the CPU: 2 ranks, 1 GPUs" in caplog.text


@pytest.mark.parametrize("device", ["A100", "H200", "H100-PCIe-94GB"])
def test_another_card_than_the_clusters(cards, cuda_build, device):
    cards(H100, H100)
    cuda_build()
    for cluster in (physical(device), ONE.model_copy(update={"device": device})):
        with pytest.raises(UserError, match=rf"^cluster two.device: '{device}': the GPU here is NVIDIA H100 80GB HBM3"):
            gpus.suffice(cluster)
    with pytest.raises(UserError, match=r"^cluster two.device: 'cpu': the GPUs here are NVIDIA H100 80GB HBM3"):
        gpus.suffice(physical("cpu"))


@pytest.mark.parametrize(
    ("named", "found", "same"),
    [
        ("H100", "NVIDIA H100 80GB HBM3", True),
        ("H100-SXM5-80GB", "NVIDIA H100 80GB HBM3", True),
        ("H100-SXM5-80GB", "NVIDIA H100 PCIe", False),
        ("H200-SXM5", "NVIDIA H200", True),
        ("H200", "NVIDIA GH200 480GB", False),
        ("A100", "NVIDIA A100-SXM4-40GB", True),
        ("A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", False),
        ("A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", False),
        ("A100 MIG 1g.5gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", True),
        ("V100-SXM2-32GB", "Tesla V100-SXM2-32GB-LS", True),
        ("RTX A6000", "NVIDIA RTX A6000", True),
        ("RTX A6000", "NVIDIA RTX 6000 Ada Generation", False),
        ("RTX 2080 Ti", "NVIDIA GeForce RTX 2080 Ti", True),
        ("nvidia h100 80 GB", "NVIDIA H100 80GB HBM3", True),
        ("gpu", "NVIDIA B200", True),
    ],
)
def test_names_of_cards(named, found, same):
    assert gpus.same_card(named, found) is same


@pytest.mark.parametrize(
    ("card", "cuda", "index"), [(H100, 13000, ""), (H100, 12080, "cu126"), (V100, 13010, "cu126"), (None, 0, "")]
)
def test_setup_learns_whose_torch_the_driver_can_run(cards, card, cuda, index):
    if card:
        cards(card, cuda=cuda, mask="")  # a mask is no reason to install another torch
    command = [sys.executable, "-I", devices.__file__]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == index


class TestOfARank:
    """``device_of`` on a rank, where torch has the last word."""

    @pytest.fixture
    def torch_sees(self, monkeypatch):
        import torch

        chosen = []

        def sees(*names: str) -> list[int]:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
            monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
            monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
            return chosen

        return sees

    def test_each_rank_has_its_own(self, torch_sees):
        chosen = torch_sees("NVIDIA H100 PCIe", "NVIDIA H100 PCIe")
        assert [gpus.device_of(physical(), rank, 2).index for rank in range(2)] == chosen == [0, 1]

    def test_one_that_slurm_has_bound(self, torch_sees, monkeypatch):
        torch_sees("NVIDIA H100 PCIe")
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
        assert gpus.device_of(physical(), 1, 2).index == 0
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")  # one for all tasks of the node
        with pytest.raises(
            UserError, match=r"needs 2 GPUs on this machine, which has 1.*ask for as many GPUs as ranks"
        ):
            gpus.device_of(physical(), 1, 2)

    def test_none_where_the_cluster_names_one(self, torch_sees, no_driver):
        torch_sees()
        with pytest.raises(
            UserError, match=r"^cluster two.kind: 'physical': needs 2 GPUs .* there is no NVIDIA driver"
        ):
            gpus.device_of(physical(), 0, 2)

    def test_none_where_a_local_cluster_names_one(self, no_driver):
        wanted = LOCAL.model_copy(update={"device": "H100"})
        with pytest.raises(UserError, match=r"\.device: 'H100': needs 4 GPUs .*; choose a cluster of device: cpu$"):
            gpus.suffice(wanted)

    def test_cpu_means_cpu(self, torch_sees):
        torch_sees("NVIDIA H100 PCIe")
        assert gpus.device_of(physical("cpu"), 0, 2).type == "cpu"
        assert gpus.device_of(EMULATED, 0, 4).type == "cpu"
        assert gpus.device_of(LOCAL, 0, 4, use_cuda=False).type == "cpu"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

    def test_slurms_tasks_ask_too(self, torch_sees, monkeypatch):
        task = {"JOB_ID": "7", "NTASKS": "1", "JOB_NUM_NODES": "1", "NODEID": "0", "PROCID": "0", "LOCALID": "0"}
        for name, value in {**task, "JOB_NODELIST": "localhost", "GPUS_ON_NODE": "1"}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        monkeypatch.setattr(os, "environ", dict(os.environ))  # what the task exports ends with it
        torch_sees()
        one = physical(cluster=ONE.model_copy(update={"levels": (ONE.levels[0].model_copy(update={"size": 1}),)}))
        with pytest.raises(UserError, match=r"needs 1 GPUs .* that torch can use: .*; ask for as many GPUs as ranks"):
            tasks.join(one)
        torch_sees("NVIDIA A100-SXM4-80GB")
        with pytest.raises(UserError, match=r"^cluster two.device: 'H100': the GPU here is NVIDIA A100-SXM4-80GB"):
            tasks.join(one)

    def test_another_card(self, torch_sees):
        torch_sees("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB")
        with pytest.raises(UserError, match=r"^cluster two.device: 'H100': the GPU here is NVIDIA A100-SXM4-80GB"):
            gpus.device_of(physical(), 0, 2)
        assert gpus.device_of(ONE, 1, 2, use_cuda=True).index == 1  # a local cluster takes what there is


def test_ranks_on_gpus_are_started_afresh(cards, cuda_build, tmp_path, monkeypatch):
    """The whole way of a session on CUDA, with gloo in NCCL's place in the ranks alone."""
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(NCCL_IS_GLOO))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path.cwd())
    cards(H100, H100, mask=f"{UUIDS[1]},0")
    cuda_build()
    with open_session(physical(), log_dir=tmp_path / "log") as ranks:
        assert ranks.evidence == "measured"
        assert ranks.network["backend"] == "nccl"
        seen = ranks.call("tests.launch.work:where")
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    assert seen == [(f"cuda:{rank}", f"{UUIDS[1]},0", cores, 1.0) for rank in range(2)]
    log = (tmp_path / "log" / "rank-1.log").read_text()
    assert re.search(r"nccl as gloo, device_id=cuda:1, 6:00:00", log)


NCCL_IS_GLOO = """
    import sys

    if "harness.launch.rank" in sys.orig_argv:
        import torch
        import torch.distributed as dist

        start = dist.init_process_group

        def begin(backend, device_id=None, **more):
            print(f"{backend} as gloo, device_id={device_id}, {more['timeout']}")
            start("gloo", **more)

        dist.init_process_group = begin
        torch.cuda.is_available = lambda: True
        torch.cuda.device_count = lambda: 2
        torch.cuda.get_device_name = lambda device: "NVIDIA H100 80GB HBM3"
        torch.cuda.set_device = lambda device: None
"""
