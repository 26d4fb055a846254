"""Lines are found again, judged at sizes that they have not seen, and refused where they explain little."""

from __future__ import annotations

import math

import numpy as np
import pytest

from harness.comm.fits import TRUSTED_ERROR, Fit, GemmFit, judge, line

SIZES = np.array([1.0, 1.5, 2.0, 4.0, 6.0, 8.0, 16.0]) * 65536
HELD_OUT = (1, 4)


def test_a_line_is_found_again():
    assert line(SIZES, 2e-3 + 3e-9 * SIZES) == pytest.approx((2e-3, 3e-9, 1.0))


def test_neither_start_up_nor_rate_is_negative():
    alpha, beta, _ = line([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert alpha > 0
    assert beta == 0.0
    alpha, beta, _ = line([1.0, 2.0, 3.0], [0.5, 2.0, 3.5])
    assert alpha == 0.0
    assert beta > 0


def test_short_operations_weigh_as_much_as_long_ones():
    """One long time is 10 % off: a fit of absolute errors would follow it and miss the start-up time by far."""
    times = 1e-3 + 1e-9 * SIZES
    times[-1] *= 1.1
    alpha, _, _ = line(SIZES, times)
    assert alpha == pytest.approx(1e-3, rel=0.05)


def test_held_out_sizes_judge_the_fit_and_do_not_make_it():
    times = 1e-9 * SIZES
    times[list(HELD_OUT)] *= 2
    found = judge(Fit, SIZES, times, HELD_OUT)
    assert found.beta_s_per_byte == pytest.approx(1e-9)
    assert found.held_out_error == pytest.approx(0.5)
    assert found.refused == ""
    assert len(found.points) == len(SIZES)


def test_the_range_is_where_the_line_holds():
    times = 1e-3 + 1e-9 * SIZES
    assert judge(Fit, SIZES, times, HELD_OUT).range_bytes == (SIZES[0], SIZES[-1])
    times[1] *= 1 + 2 * TRUSTED_ERROR  # a held-out size too
    found = judge(Fit, SIZES, times, HELD_OUT)
    assert found.range_bytes == (SIZES[2], SIZES[-1])
    assert found.refused == ""


def test_a_fit_that_explains_little_is_refused_with_its_points():
    found = judge(Fit, SIZES, [1.0, 3.0, 1.0, 1.0, 3.0, 1.0, 3.0], HELD_OUT)
    assert "is below 0.9" in found.refused
    assert len(found.points) == len(SIZES)


def test_too_few_points_are_refused():
    found = judge(GemmFit, SIZES, [math.nan] * 5 + [1.0, 1.0], HELD_OUT)
    assert found.refused == "2 points are too few"
    assert found.points[0] == (SIZES[0], None)
    assert found.held_out_error is None
