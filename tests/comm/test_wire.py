from __future__ import annotations

import pytest
import torch

from harness.comm import wire


@pytest.mark.parametrize("function", ["uneven", "interleaved"])
def test_exchange(session, function: str) -> None:
    assert session("local-4").call(f"tests.comm.on_ranks:{function}", {}, timeout_s=60) == [True] * 4


def test_reduce_scatter_exchanges_parts_and_rounds_once(session) -> None:
    for found in session("local-4").call("tests.comm.on_ranks:scattered", {}, timeout_s=60):
        assert found == {"same": True, "first": float(torch.tensor(259.0).bfloat16()), "calls": 1}


def test_wrong_splits_are_named(session) -> None:
    for message in session("local-4").call("tests.comm.on_ranks:bad_splits", {}, timeout_s=60):
        assert "do not add up to 4 rows over 4 ranks" in message


def test_unknown_wire() -> None:
    with pytest.raises(ValueError, match="must be recv_first or gloo"):
        wire.install("nccl")
