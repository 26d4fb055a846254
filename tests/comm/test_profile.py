"""Fits recover what made the times, and what a shaped link allows."""

from __future__ import annotations

import pytest
import torch

from harness.bench import contention
from harness.comm import profile
from harness.comm.profile import OPERATIONS, fit

SIZES = [1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20]


def seen(spans, **fields):
    return {"x": SIZES, "held_out": [1], "spans": spans, **fields}


def test_a_collective_lasts_from_the_first_start_to_the_last_end_shared_by_its_train():
    early = [[(1.0, 1.0 + 1e-6 * n, 4)] for n in SIZES]
    late = [[(1.5, 1.5 + 1e-6 * n, 4)] for n in SIZES]
    product = seen([[(0.0, 1e-6 * n, 2)] for n in SIZES], dtype="torch.float32")
    collectives, products = fit([{"a2a.node": seen(early), "gemm": product}, {"a2a.node": seen(late)}])
    assert collectives["a2a.node"].alpha_s == pytest.approx(0.5 / 4)
    assert collectives["a2a.node"].beta_s_per_byte == pytest.approx(1e-6 / 4)
    assert products["gemm"].beta_s_per_mac == pytest.approx(1e-6 / 2)
    assert products["gemm"].dtype == "float32"


def test_a_disturbed_repetition_makes_no_price():
    spans = [[(0.0, 1e-6 * n * slow, 1) for slow in (1, 1, 9, 1, 7)] for n in SIZES]
    collectives, _ = fit([{"a2a.node": seen(spans)}])
    assert collectives["a2a.node"].beta_s_per_byte == pytest.approx(1e-6)


def test_every_operation_on_every_level(session):
    payload = {"levels": ["node", "rank"], "repeats": 1}
    of_ranks = session("local-4").call("harness.comm.profile:measure", payload, timeout_s=120)
    collectives, products = fit(of_ranks)
    assert set(collectives) == {f"{op}.{scope}" for op in OPERATIONS for scope in ("node", "rank", "flat")}
    assert all(each.alpha_s + each.beta_s_per_byte > 0 for each in collectives.values())
    assert set(products) == {"gemm", "grouped_gemm"}
    assert all(each.beta_s_per_mac > 0 for each in products.values())


def test_a_shaped_link_shows_in_the_fit(session):
    """400 Mbit/s a node, shared by 4 ranks that each send half of their buffer to the other node."""
    ranks = session("emulated-2x4")
    if ranks.network["network"] != "shaped":
        pytest.skip(f"no shaped links here: {ranks.network['reason']}")
    payload = {"levels": ["node", "rank"], "operations": ["a2a"], "repeats": 2}
    for _ in range(3):  # other programs may take the cores away
        collectives, _ = fit(ranks.call("harness.comm.profile:measure", payload, timeout_s=120))
        found = collectives["a2a.node"]
        if not found.refused and found.held_out_error < 0.1:
            break
    assert found.beta_s_per_byte == pytest.approx(4 / 2 / 50e6, rel=0.15)
    assert found.held_out_error < 0.1
    assert collectives["a2a.rank"].beta_s_per_byte < found.beta_s_per_byte


def test_no_constant_numbers_are_measured(monkeypatch):
    """A device draws less power for them than for a model's."""
    made: list[torch.Tensor] = []
    for name in ("drawn", "drawn_bytes"):
        make = getattr(profile, name)
        monkeypatch.setattr(profile, name, lambda *a, make=make, **k: (made.append(make(*a, **k)), made[-1])[1])
    monkeypatch.setattr(contention, "drawn_bytes", profile.drawn_bytes)
    device = torch.device("cpu")
    plain = profile.gemm(8, 16, device)()
    grouped = profile._grouped_gemm(8, 16, device)()
    profile.drawn_bytes(2, 64, device)
    assert len(made) == 5
    for tensor in (*made, plain, grouped):
        numbers = tensor.view(torch.float32) if tensor.dtype == torch.uint8 else tensor
        assert len(numbers.unique()) > 0.9 * numbers.numel()
        assert numbers.isfinite().all()
