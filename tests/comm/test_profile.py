"""Fits recover what made the times, and what a shaped link allows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.comm.profile import GEMM_SHAPES, HELD_OUT, OPERATIONS, SIZES_BYTES, fit, line


def test_a_line_is_found_again():
    sizes = np.array(SIZES_BYTES)
    assert line(sizes, 2e-3 + 3e-9 * sizes) == pytest.approx((2e-3, 3e-9, 1.0))


def test_neither_start_up_nor_rate_is_negative():
    alpha, beta, _ = line([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert (alpha, beta) == (pytest.approx(2.0), 0.0)
    alpha, beta, _ = line([1.0, 2.0, 3.0], [0.5, 2.0, 3.5])
    assert alpha == 0.0
    assert beta > 0


def test_a_collective_lasts_from_the_first_start_to_the_last_end():
    gemm = [[(0.0, 1e-12 * m * k * n)] for m, k, n in GEMM_SHAPES]
    early = [[(1.0, 1.0 + 1e-9 * n)] for n in SIZES_BYTES]
    late = [[(1.5, 1.5 + 1e-9 * n)] for n in SIZES_BYTES]
    collectives, cost = fit([{"a2a.node": early, "gemm": gemm}, {"a2a.node": late}])
    assert collectives["a2a.node"].alpha_s == pytest.approx(0.5)
    assert collectives["a2a.node"].beta_s_per_byte == pytest.approx(1e-9)
    assert cost.beta_s_per_mac == pytest.approx(1e-12)


def spans_of(times):
    return [[(0.0, seconds)] for seconds in times]


def test_held_out_sizes_judge_the_fit_and_do_not_make_it():
    times = [1e-9 * n for n in SIZES_BYTES]
    for index in HELD_OUT:
        times[index] *= 2
    gemm = spans_of([1e-12 * m * k * n for m, k, n in GEMM_SHAPES])
    found = fit([{"a2a.node": spans_of(times), "gemm": gemm}])[0]["a2a.node"]
    assert found.beta_s_per_byte == pytest.approx(1e-9)
    assert found.held_out_error == pytest.approx(0.5)
    assert found.refused == ""


def test_a_fit_that_explains_little_is_refused_with_its_points():
    times = [1.0, 3.0, 1.0, 1.0, 3.0, 1.0, 1.0]
    found, gemm = fit([{"a2a.node": spans_of(times), "gemm": spans_of([math.nan] * 5 + [1.0, 1.0])}])
    assert "is below 0.9" in found["a2a.node"].refused
    assert [seconds for _, seconds in found["a2a.node"].points] == times
    assert gemm.refused == "1 points are too few"


def test_every_operation_on_every_level(session):
    of_ranks = session("local-4").call("harness.comm.profile:measure", {"levels": ["node", "rank"]}, timeout_s=120)
    collectives, gemm = fit(of_ranks)
    assert set(collectives) == {f"{op}.{scope}" for op in OPERATIONS for scope in ("node", "rank", "flat")}
    assert all(each.alpha_s + each.beta_s_per_byte > 0 for each in collectives.values())
    assert gemm.beta_s_per_mac > 0


def test_a_shaped_link_shows_in_the_fit(session):
    """400 Mbit/s a node, shared by 4 ranks that each send half of their buffer to the other node."""
    ranks = session("emulated-2x4")
    if ranks.network["network"] != "shaped":
        pytest.skip(f"no shaped links here: {ranks.network['reason']}")
    payload = {"levels": ["node", "rank"], "operations": ["a2a"]}
    for _ in range(3):  # other programs may take the cores away
        collectives, _ = fit(ranks.call("harness.comm.profile:measure", payload, timeout_s=120))
        if not collectives["a2a.node"].refused:
            break
    assert collectives["a2a.node"].beta_s_per_byte == pytest.approx(4 / 2 / 50e6, rel=0.25)
    assert collectives["a2a.node"].r2 > 0.9
    assert collectives["a2a.rank"].beta_s_per_byte < collectives["a2a.node"].beta_s_per_byte
