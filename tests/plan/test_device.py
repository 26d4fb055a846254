"""Devices: experts by their rows, and how near data sheets come to what others measured."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness import presets
from harness.plan.cost import Compute, Experts
from harness.plan.device import CURVE, TILE, Curve, Roofline, Shared, Tiled
from harness.plan.links import Line
from harness.plan.machine import Machine
from harness.plan.points import FITTED, errors, fit, points, sources
from harness.presets import this_machine
from harness.specs import with_levels
from tests.test_ledger import calibration

PRODUCTS = ((1024, 2048), (1024, 1024))
IDEAL = Curve(share=0.5, depth=0.0, memory=1.0, launch_s=0.0)


def seconds(rows, curve=CURVE, memory=3e12) -> np.ndarray:
    return np.asarray(Tiled(1e15, memory, curve).seconds(Compute.of(Experts(np.asarray(rows), PRODUCTS, 2))))


def test_whole_tiles_and_free_memory_are_a_roofline():
    cost = Compute.of(Experts(np.array([[128, 64], [0, 320]]), PRODUCTS, 2))
    assert cost.macs.tolist() == [192 * 3 * 1024**2, 320 * 3 * 1024**2]
    assert cost.read_bytes.tolist() == [2 * 3 * 1024**2 * 2, 1 * 3 * 1024**2 * 2]
    np.testing.assert_allclose(
        Tiled(1e15, None, IDEAL).seconds(cost),
        Roofline(1e15, None, 0.5).seconds(dataclasses.replace(cost, experts=None)),
    )


def test_a_row_beyond_a_tile_costs_a_tile():
    assert seconds([TILE], memory=None) == seconds([1], memory=None)
    assert seconds([TILE + 1], memory=None) - CURVE.launch_s * 2 == pytest.approx(
        2 * (seconds([TILE], memory=None) - CURVE.launch_s * 2)
    )


def test_as_many_rows_take_longer_the_more_experts_share_them():
    took = [float(seconds(np.full(parts, 4096 // parts))) for parts in (1, 8, 64, 512)]
    assert took == sorted(took)
    assert took[-1] > 3 * took[0]


def test_few_rows_last_as_long_as_reading_the_weights_of_the_experts_in_use():
    one, two = seconds([1, 0]), seconds([1, 1])
    assert two - 2 * CURVE.launch_s == pytest.approx(2 * (one - 2 * CURVE.launch_s), rel=0.01)
    assert seconds([0, 0]) == 0


def test_points_are_met_by_a_curve_that_did_not_see_them():
    every = points()
    error = np.array(errors())
    fitted = np.array([point.fitted for point in every])
    bfloat16 = np.array([point.dtype == "bfloat16" for point in every]) & fitted
    assert (np.abs(error[bfloat16]) < 0.25).sum() >= 15
    assert np.abs(error[bfloat16]).max() < 0.27  # the best of many shapes that was tried on an H100
    assert (np.abs(error[fitted]) < 0.25).mean() > 0.85
    assert np.median(np.abs(error[fitted])) < 0.08
    assert {point.device for point in every if point.fitted} == set(FITTED)
    assert {point.source for point in every} == set(sources())
    assert {point.device for point in every} <= set(this_machine.data_sheets())
    found = dataclasses.astuple(fit([point for point in every if point.fitted]))
    assert dataclasses.astuple(CURVE) == pytest.approx(found, rel=0.01)


def test_ranks_of_one_machine_compute_on_its_cores_in_turns():
    """Against small steps of time, in which those that still compute share the cores."""
    work = np.array([[4.0, 1.0, 0.0, 2.5], [3.0, 3.0, 3.0, 3.0]])
    found = Shared(Held(), 4, 2).seconds(Compute(work))
    step, left, ends = 1e-3, work.copy(), np.zeros(work.shape)
    for now in range(9000):
        at_work = left > 1e-9
        ends[at_work] = (now + 1) * step
        left -= np.where(at_work, step * np.minimum(1.0, 2 / np.maximum(at_work.sum(-1, keepdims=True), 1)), 0.0)
    np.testing.assert_allclose(found, ends, atol=5e-3)
    assert Shared(Held(), 4, 2).seconds(Compute(1.0)) == 2.0  # all alike
    assert Shared(Held(), 2, 2).seconds(Compute(work[:, :2])).tolist() == work[:, :2].tolist()


def test_a_profile_of_one_machine_counts_its_cores():
    cost = Compute(np.full(8, 1e9))
    given = calibration(provenance={"num_cores": 2})
    alone, shared = (
        np.asarray(Machine.profiled(given.profiled, each, "real").seconds(cost)) for each in (calibration(), given)
    )
    np.testing.assert_allclose(shared, 4 * alone)
    stand_in = Machine.profiled(presets.cluster("emulated-2x4-balanced"), given, "stand-in")
    assert not isinstance(stand_in.device, Shared)  # timed waits need no core


class Held:
    def seconds(self, cost):
        return np.asarray(cost.macs, dtype=float)


def test_no_point_is_faster_than_its_device():
    for point in points():
        sheet = this_machine.data_sheets()[point.device]
        assert point.tflops * 1e12 < sheet.flops_per_s * (2 if point.dtype == "float8" else 1)


def cluster_of_nodes(ports):
    levels = [
        {"name": "node", "size": 2, "bandwidth_bytes_per_s": 1e9, "ports": ports},
        {"name": "gpu", "size": 8, "bandwidth_bytes_per_s": 3e9},
    ]
    return with_levels("c", levels, kind="physical", device_flops_per_s=1e15)


def test_a_data_sheet_machine_says_what_it_rests_on():
    cluster = with_levels(
        "c", [{"name": "gpu", "size": 2}], kind="physical", device_flops_per_s=1e15, device_bytes_per_s=3e12
    )
    by_rows, flat = Machine.data_sheet(cluster), Machine.data_sheet(cluster, 0.4, links="shared-ports")
    assert by_rows.basis == "data sheet of c, computation by rows per expert, ports"
    assert flat.basis == "data sheet of c, computation 40% of the peak, shared ports"
    cost = Compute.of(Experts(np.array([[100, 3]]), PRODUCTS, 2))
    wide = Machine.data_sheet(cluster_of_nodes(ports=8), tensor_parallel=4).links
    assert wide.lines == (Line(0, 4 * 1e9, 2), Line(1, 4 * 3e9))  # two ranks of four devices, a NIC for each device
    assert by_rows.seconds(cost) == pytest.approx(seconds([[100, 3]]))
    assert by_rows.seconds(Compute(1e12)) == pytest.approx(2e12 / (CURVE.share * 1e15))
