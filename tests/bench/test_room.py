"""Contenders that have no room beside each other wait elsewhere, and find everything again in their turns."""

from __future__ import annotations

import shutil
import tempfile
from types import SimpleNamespace

import psutil
import pytest
import torch

from harness.bench.room import Parked, Room, _file_bytes, fits, storages
from tests.methods.test_fsmoe_training import training
from tests.methods.test_hiermoe import cluster


def test_what_is_counted():
    assert fits(1, 50e9, 6e9, 80e9)
    assert not fits(1, 60e9, 6e9, 80e9)
    assert fits(5, 10e9, 6e9, 80e9)
    assert not fits(6, 10e9, 6e9, 80e9)


@pytest.mark.parametrize(("available", "free", "parks"), [(10e9, 0, False), (3e9, 9e9, True), (3e9, 5e9, None)])
def test_ranks_of_one_machine_share_its_memory_and_its_disk(monkeypatch, available, free, parks):
    """Six contenders of 0.1 GB on 10 ranks, of which one is there."""
    job = SimpleNamespace(
        device=torch.device("cpu"), num_ranks=1, shared_clock=False, topology=SimpleNamespace(shape=(10,))
    )
    held = torch.empty(100_000_000, dtype=torch.uint8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    room = Room(job, 6)
    room.clear()
    room.contenders.append(SimpleNamespace(keep=lambda: [held, held[:7], held.view(torch.float32)]))
    if parks is None:
        with pytest.raises(MemoryError, match=r"6 systems of 1 GB on 10 ranks .* 3 GB are left.* with 5 GB; .*TMPDIR"):
            room._crowded()
    else:
        assert room._crowded() == parks


def test_where_temporary_files_are_in_memory_they_wait_in_the_run(monkeypatch, tmp_path):
    job = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    for fstype, folder in (("ext4", tmp_path), ("tmpfs", tmp_path / "run" / "checkpoints")):
        mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=tmp_path, fstype=fstype)]
        monkeypatch.setattr(psutil, "disk_partitions", lambda all, mounts=mounts: mounts)
        assert Room(job, 2, tmp_path / "run" / "checkpoints").folder == folder
        assert folder.is_dir()


def test_a_full_disk_is_an_error_and_no_signal(tmp_path):
    with pytest.raises(OSError, match=r"No space left|File too large"):
        _file_bytes(1 << 60, tmp_path)
    assert not list(tmp_path.iterdir())


def test_who_is_alone_stays():
    assert not Room(SimpleNamespace(device=torch.device("cuda", 0)), 1)._crowded()


def test_views_and_ties_survive(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    row, tied, empty = whole[1], whole.view(-1), torch.empty(0)
    parked = Parked(storages([whole, row, tied, empty], whole.device), whole.device, tmp_path)
    assert whole.untyped_storage().nbytes() == 0
    assert not list(tmp_path.iterdir())  # whatever happens, nothing stays
    parked.back()
    assert whole.tolist() == torch.arange(12.0).view(3, 4).tolist()
    row[0] = -1
    assert tied[4] == whole[1, 0] == -1


@pytest.mark.parametrize(
    ("phase", "systems"), [("train_step", ("flat", "hecate")), ("decode", ("flat",)), ("layer", ("fsmoe",))]
)
def test_a_race_goes_on_as_if_there_had_been_room(session, phase, systems):
    """A turn begins with one more step, so the n-th timed step there is the 2n-th here."""
    changes = {"workload": {"name": "w", "tokens_per_rank": 16, "generator": "uniform"}, "dtype": "float32"}
    experiments = []
    for system in systems:
        found = training(system, cluster((1, 2)), **changes)["experiment"]
        experiments.append(found | {"phase": phase, "backward": phase != "decode"})
    payload = {"experiments": experiments, "repeats": 2, "warmup": 1}
    for rank in session(cluster((1, 2))).call("tests.bench.parked_on_ranks:both", payload, timeout_s=300):
        assert set(rank["held"]) == {0}
        for parked, stays in zip(rank["parked"].values(), rank["stays"].values(), strict=True):
            assert parked["status"] == stays["status"] == "ok", parked["reason"]
            assert parked["how"]["state"] == "on disk between turns"
            assert stays["how"]["state"] == ""
            assert parked["how"]["experts"].startswith(("one GEMM an expert: ", "one batched"))
            assert parked["errors"] == stays["errors"]
            losses = [[sample["loss"] for sample in each["samples"]] for each in (parked, stays)]
            if phase == "train_step":
                assert losses[0] == losses[1][1::2]
