"""Whole steps of FSMoE's models: no gradient sent before it exists, plans that add up, and every rank of 1,024."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harness import presets
from harness.plan.graph import INTER, INTRA
from harness.plan.machine import Machine
from harness.plan.simulate import simulate
from methods.fsmoe import studies
from methods.fsmoe.models import (
    DS_MOE,
    SCHEDULES,
    Gate,
    ModelStep,
    duplicated,
    expert_loads,
    many_ranks,
    model_layer,
    optimizer_s,
    place_gradients,
    prepare,
    step_times,
)
from methods.fsmoe.pipeline import gpipe_step
from methods.fsmoe.step import LINA_CHUNK_BYTES, reduction

NUM_LAYERS = 5
SETUPS = [("mixtral-8x7b-fsmoe-a", "fsmoe-a"), ("mixtral-8x22b-fsmoe-a", "fsmoe-a"), ("gpt2-xl-moe-fsmoe-b", "fsmoe-b")]


def short(name: str):
    return presets.model(name).model_copy(update={"num_layers": NUM_LAYERS})


@pytest.fixture(params=SETUPS, ids=lambda setup: setup[0])
def setup(request):
    model, cluster = short(request.param[0]), presets.cluster(request.param[1])
    return model, cluster, model_layer(model, cluster)


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_sent_once_and_not_before_they_exist(setup, name):
    _, _, layer = setup
    slices = place_gradients(SCHEDULES[name], layer, NUM_LAYERS)
    new = int(layer.gradient_bytes)
    inside = np.cumsum(slices.moe_bytes + slices.dense_bytes)
    assert (inside <= new * np.arange(NUM_LAYERS) + 1e-6).all()  # of the layers done before
    assert inside[-1] + np.sum(slices.after_bytes) + slices.tail_bytes == pytest.approx(new * NUM_LAYERS)
    if SCHEDULES[name].gradients == "after":
        assert (slices.after_bytes == new).all()


@pytest.mark.parametrize("most", [LINA_CHUNK_BYTES, 1e6])
def test_lina_sends_whole_chunks_of_at_most_30_mb(setup, most):
    _, _, layer = setup
    slices = place_gradients(SCHEDULES["lina"], layer, NUM_LAYERS, chunk_bytes=most)
    pieces = int(np.ceil(int(layer.gradient_bytes) / most))
    assert max(slices.moe_chunks.max(), slices.dense_chunks.max()) > (most == 1e6)
    each = int(layer.gradient_bytes) / pieces
    for num_bytes, chunks in ((slices.moe_bytes, slices.moe_chunks), (slices.dense_bytes, slices.dense_chunks)):
        np.testing.assert_allclose(num_bytes, chunks * each)
    assert slices.tail_chunks + slices.moe_chunks.sum() + slices.dense_chunks.sum() == pieces * NUM_LAYERS


def test_without_overlap_a_step_is_the_sum_of_its_tasks(setup):
    model, cluster, layer = setup
    _, slices = prepare("no-overlap", layer, NUM_LAYERS)
    plan = ModelStep([layer] * NUM_LAYERS, SCHEDULES["no-overlap"], slices, optimizer_s(model, cluster)).lay_out()
    timeline = simulate(plan, Machine.published(cluster))
    busy = timeline.busy_s()
    assert timeline.total_s == pytest.approx(sum(busy.values()))
    one_s = Machine.published(cluster).seconds(reduction(int(layer.gradient_bytes)).cost)
    assert busy["gradients"] == pytest.approx(NUM_LAYERS * one_s)
    weights = {"gpt": 2, "swiglu": 3}[model.ffn_type] * model.hidden * model.ffn / cluster.shape[-1]
    assert busy["optimizer"] > NUM_LAYERS * weights * 7 * 4 / cluster.device_bytes_per_s


def test_fsmoe_is_ahead_of_its_rivals_and_no_step_beats_its_busiest_lane(setup):
    _, cluster, layer = setup
    took = {}
    for name, policy in SCHEDULES.items():
        as_run, slices = prepare(name, layer, NUM_LAYERS)
        timeline = simulate(ModelStep([as_run] * NUM_LAYERS, policy, slices).lay_out(), Machine.published(cluster))
        for lane in timeline.plan.lanes:
            here = [i for i, task in enumerate(timeline.plan.tasks) if task.lane == lane]
            assert timeline.total_s >= (timeline.end_s - timeline.start_s)[here].sum() * (1 - 1e-12)
        took[name] = float(timeline.total_s)
    assert took["fsmoe"] < took["no-iio"] < took["tutel"] <= took["no-overlap"] < took[DS_MOE]


def test_without_overlap_of_links_the_plan_is_made_for_one_link(setup):
    """A placement that counts on side-by-side links serves no-iio no better than its own."""
    model, cluster, layer = setup
    policy = SCHEDULES["no-iio"]
    own, others = (place_gradients(SCHEDULES[name], layer, NUM_LAYERS) for name in ("no-iio", "fsmoe"))
    mine, theirs = (
        simulate(ModelStep([layer] * NUM_LAYERS, policy, slices).lay_out(), Machine.published(cluster)).total_s
        for slices in (own, dataclasses.replace(others, degree_forward=own.degree_forward))
    )
    assert mine < theirs or (model.name == "gpt2-xl-moe-fsmoe-b" and mine == theirs)


def test_only_fsmoe_uses_both_links_in_the_moe_part(setup):
    _, _, layer = setup
    for name, policy in SCHEDULES.items():
        _, slices = prepare(name, layer, NUM_LAYERS)
        plan = ModelStep([layer] * NUM_LAYERS, policy, slices).lay_out()
        lanes = {task.lane for task in plan.tasks if task.kind in ("gather", "scatter")}
        assert lanes == ({INTRA} if name == "fsmoe" else {INTER})


def test_deepspeed_moe_sends_all_tokens_of_a_node_from_every_rank(setup):
    _, cluster, layer = setup
    times, twice = cluster.shape[-1], duplicated(layer)
    assert twice.forward.slot_bytes == times * layer.forward.slot_bytes
    assert twice.backward.macs == times * layer.backward.macs
    (row,) = step_times(short("mixtral-8x7b-fsmoe-a"), presets.cluster("fsmoe-a"), schedules=[DS_MOE])
    assert row["busy_s"]["gather"] == row["busy_s"]["scatter"] == 0
    assert row["degree_forward"] == 1


def test_a_gate_costs_its_products_three_times():
    model, cluster = short("gpt2-xl-moe-fsmoe-b"), presets.cluster("fsmoe-b")
    common = {"schedules": ["no-overlap"]}
    (without,), (with_gate,) = (step_times(model, cluster, gate=gate, **common) for gate in (None, Gate(2, 1e9)))
    alpha, beta = cluster.linear("gemm")
    assert with_gate["step_s"] - without["step_s"] == pytest.approx(NUM_LAYERS * 3 * (2 * alpha + 1e9 * beta))


# -------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_gpipe_fills_and_drains(num_micro_batches):
    cluster = presets.cluster("fsmoe-a")
    layer = dataclasses.replace(model_layer(short("mixtral-8x7b-fsmoe-a"), cluster), gradient_bytes=0)
    policy = SCHEDULES["no-overlap"]
    _, slices = prepare("no-overlap", layer, 2)
    stage = float(simulate(ModelStep([layer] * 2, policy, slices).lay_out(), Machine.published(cluster)).total_s)
    sizes = {"layers_per_stage": 2, "num_micro_batches": num_micro_batches, "num_stages": 2}
    plan = gpipe_step(layer, policy, slices, send_s=0.0, **sizes)
    assert simulate(plan, Machine.published(cluster)).total_s == pytest.approx((num_micro_batches + 1) * stage)
    slow = simulate(gpipe_step(layer, policy, slices, send_s=0.5, **sizes), Machine.published(cluster))
    assert slow.total_s >= ((num_micro_batches + 1) * stage + 2 * 0.5) * (1 - 1e-12)
    sends = [task for task in plan.tasks if task.kind == "send"]
    assert len(sends) == 2 * num_micro_batches


def test_pipelined_gradients_are_reduced_in_the_last_micro_batch_alone():
    cluster = presets.cluster("fsmoe-a")
    layer = model_layer(short("mixtral-8x7b-fsmoe-a"), cluster)
    _, slices = prepare("fsmoe", layer, NUM_LAYERS)
    plan = gpipe_step(
        layer,
        SCHEDULES["fsmoe"],
        slices,
        layers_per_stage=NUM_LAYERS,
        num_micro_batches=3,
        num_stages=2,
        send_s=1e-3,
    )
    reduced = [task for task in plan.tasks if task.kind == "gradients"]
    assert sum(task.cost.num_bytes for task in reduced) == pytest.approx(2 * NUM_LAYERS * int(layer.gradient_bytes))
    assert {task.name.split(".")[1] for task in reduced} == {"micro0", "gradients-tail"}
    cut = {task.name.split("[")[0] for task in plan.tasks if task.name.endswith(f"experts[{slices.degree_plain - 1}]")}
    assert any(".micro2.layer0.backward" in name for name in cut)


# ------------------------------------------------------------------------------------------------------- many ranks


def test_ranks_loaded_alike_take_as_long_as_one():
    model, cluster = short("mixtral-8x7b-fsmoe-a"), presets.cluster("fsmoe-a")
    whole = many_ranks(model, cluster, "fsmoe", np.ones((NUM_LAYERS, 6)))[0]
    assert whole.total_s.shape == (48,)
    (one,) = step_times(model, cluster, schedules=["fsmoe"])
    np.testing.assert_allclose(whole.total_s, one["step_s"], rtol=1e-12)


def test_one_loaded_node_holds_all_up():
    model, cluster = short("mixtral-8x7b-fsmoe-a"), presets.cluster("fsmoe-a")
    even, uneven = np.full((NUM_LAYERS, 6), 0.5), np.full((NUM_LAYERS, 6), 0.5)
    uneven[:, 2] = 1
    half, held, full = (
        many_ranks(model, cluster, "tutel", loads)[0].total_s.max() for loads in (even, uneven, np.ones_like(even))
    )
    assert half < held <= full * (1 + 1e-12)
    assert held > (half + full) / 2


def test_loads_are_of_the_capacity():
    loads = expert_loads(128, 32, sigma=0.5, capacity=1.2)
    assert loads.shape == (32, 128)
    assert loads.max() == 1
    assert 0.6 < loads.mean() < 1 / 1.2
    np.testing.assert_allclose(expert_loads(4, 2, sigma=0.0, capacity=1.2), 1 / 1.2)


def test_a_step_of_mixtral_on_1024_ranks_within_10_s():
    found = studies.STUDIES["mixtral-1024"].run(lambda text: None).tables["mixtral-1024"]
    assert (found["num_ranks"] == 1024).all()
    assert (found["simulated_in_s"] < 10).all()
    step = found.set_index(["schedule", "routing"])["step_s"]
    assert step["fsmoe", "balanced"] < step["fsmoe", "skewed"] < step["tutel", "skewed"]
    assert presets.cluster("fsmoe-a").resized(128).num_ranks == 1024
