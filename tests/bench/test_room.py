"""Contenders that have no room beside each other wait on the host, and find everything again in their turns."""

from __future__ import annotations

import pytest
import torch

from harness.bench.room import Parked, fits
from tests.methods.test_fsmoe_training import training
from tests.methods.test_hiermoe import cluster


def test_what_is_counted():
    assert fits(1, 50e9, 6e9, 80e9)
    assert not fits(1, 60e9, 6e9, 80e9)
    assert fits(5, 10e9, 6e9, 80e9)
    assert not fits(6, 10e9, 6e9, 80e9)


def test_views_and_ties_survive():
    whole = torch.arange(12.0).view(3, 4)
    row, tied, empty = whole[1], whole.view(-1), torch.empty(0)
    parked = Parked([whole, row, tied, empty])
    assert whole.untyped_storage().nbytes() == 0
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
            assert parked["how"]["state"] == "in the host's memory between turns"
            assert stays["how"]["state"] == ""
            assert parked["how"]["experts"].startswith(("one GEMM an expert: ", "one batched"))
            assert parked["errors"] == stays["errors"]
            losses = [[sample["loss"] for sample in each["samples"]] for each in (parked, stays)]
            if phase == "train_step":
                assert losses[0] == losses[1][1::2]
