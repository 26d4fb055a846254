"""Popularity as logs have it: log-normal, and a walk of log-loads from step to step."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy._core import _multiarray_umath as umath

from harness import presets
from harness.errors import UserError
from harness.routing import counts_of, planned_routing
from harness.routing.draw import PROFILE_STEP, Draw
from harness.routing.skewed import normal_quantiles, shares_of_logs
from harness.routing.trace import Header, Recorded, read_trace, write_trace
from harness.routing.walk import fit, log_loads, told
from harness.specs import Experiment, Model, Workload
from harness.topology import Topology

NODES = Topology((2, 4))
ROOT = Path(__file__).resolve().parents[2]


def model(num_experts: int = 64, top_k: int = 8) -> Model:
    return Model(name="m", num_layers=4, hidden=8, ffn=8, num_experts=num_experts, top_k=top_k)


def counts(generator: str, *, m: Model | None = None, tokens: int = 4096, seed: int = 3, step=0, layer=0, **params):
    """Of each rank and expert, int64 [W, E]."""
    workload = Workload(name="w", tokens_per_rank=tokens, generator=generator, params=params, seed=seed)
    return counts_of(workload, m or model(), NODES, step=step, layer=layer)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_experts=st.integers(2, 300), seed=st.integers(0, 9))
def test_log_loads_are_scaled_to_any_max_over_mean_that_is_possible(data, num_experts, seed):
    target = data.draw(st.floats(1, num_experts))
    logs = np.random.default_rng(seed).standard_normal(num_experts)
    for each in (logs, normal_quantiles(num_experts)):
        load = shares_of_logs(each, target)
        assert load.sum() == pytest.approx(1)
        assert target * (1 - 1e-5) <= load.max() * num_experts <= target * (1 + 1e-12)
        assert (np.diff(load[np.argsort(each)]) >= 0).all()


@pytest.mark.parametrize(
    ("num_experts", "top_k", "target"), [(64, 8, 2), (64, 8, 8), (64, 2, 16), (8, 1, 8), (256, 8, 5), (64, 8, 1)]
)
def test_lognormal_has_its_target_on_every_rank_and_a_normal_logarithm(num_experts, top_k, target):
    found = counts("lognormal", m=model(num_experts, top_k), target=target, tokens=1 << 16)
    mean = (1 << 16) * top_k / num_experts
    assert found.max(1) == pytest.approx(np.full(8, target * mean), abs=1 + 1e-5 * target * mean)
    assert np.ptp(found, axis=0).max() <= 1  # the same experts on all ranks
    if 1 < target < num_experts / top_k:
        loads = np.sort(found.sum(0))
        many = loads > 1000  # where rounding to tokens is nothing
        normal, logs = normal_quantiles(num_experts)[many], np.log(loads[many])
        assert np.abs(logs - np.polyval(np.polyfit(normal, logs, 1), normal)).max() < 0.005
        assert many.sum() > 24


def test_lognormal_has_its_own_popular_experts_in_every_layer_and_seed():
    same = counts("lognormal").argsort()
    assert np.array_equal(counts("lognormal", step=9).sum(0) > 6000, counts("lognormal").sum(0) > 6000)
    for other in ({"layer": 1}, {"seed": 4}):
        assert not np.array_equal(counts("lognormal", **other).argsort(), same)


def test_no_max_over_mean_is_taken_that_distinct_experts_rule_out():
    with pytest.raises(UserError, match=r"workload w \(lognormal\).params.target: 8.5.* E / k = 8"):
        counts("lognormal", target=8.5)


def draw(num_experts: int = 30000, layer: int = 0) -> Draw:
    workload = Workload(name="w", generator="walk", seed=1)
    return Draw.of(workload, model(num_experts), NODES, 0, layer)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_log_loads_walk_as_an_autoregressive_process_does_from_any_step_on(rho):
    """Standard normal at each step, with correlation rho^h after h steps, also across points that are drawn alone."""
    far = 0
    while 0 < rho < 1 and rho**far > 1e-9:
        far = 2 * far or 1
    times = sorted({0, 1, 2, 7, 8, 9, max(far - 1, 0), far, far + 1, 3 * far + 5, 1_000_000})
    logs = np.stack([log_loads(draw(), rho, time) for time in times])
    chance = 4.5 / 30000**0.5
    assert np.abs(logs.mean(1)).max() < chance
    assert np.abs(logs.std(1) - 1).max() < chance
    apart = np.abs(np.subtract.outer(times, times))
    assert np.abs(np.corrcoef(logs) - rho**apart).max() < chance
    assert np.abs(np.corrcoef(logs, log_loads(draw(layer=1), rho, 0)[None])[-1, :-1]).max() < chance
    assert np.array_equal(log_loads(draw(), rho, times[-2]), logs[-2])


@settings(max_examples=15, deadline=None)
@given(
    rho=st.sampled_from([0.0, 0.5, 0.95, 0.999]),
    shape=st.sampled_from([(64, 8, 2.0), (64, 8, 7.5), (16, 2, 4.0), (128, 4, 1.2)]),
    seed=st.integers(0, 99),
)
def test_a_fit_gives_back_what_a_walk_was_made_with(rho, shape, seed):
    num_experts, top_k, target = shape
    given = {"m": model(num_experts, top_k), "rho": rho, "target": target, "seed": seed, "tokens": 1 << 17}
    loads = np.stack([counts("walk", step=step, **given).sum(0) for step in range(120)])
    found_rho, found_target = fit(loads)
    assert found_target == pytest.approx(target, rel=1e-3)
    # what chance has it: 5 standard errors of a walk's autocorrelation (Bartlett), and what scarce experts lose
    assert found_rho == pytest.approx(rho, abs=5 * ((1 - rho**2) / (119 * num_experts)) ** 0.5 + 0.01)


@pytest.mark.parametrize(
    ("logs", "rho"),
    [
        ([[1, 2, 3], [1, 3, 2]], 0.5),
        ([[1, 2, 3], [3, 2, 1]], 0),
        ([[1, 2, 3], [4, 6, 8]], 1),
        ([[2, 2, 2], [1, 2, 3]], 0),
    ],
)
def test_a_fit_is_the_correlation_of_log_loads_half_a_token_added(logs, rho):
    loads = np.exp(np.array(logs, float)) - 0.5
    found = fit(loads)
    assert found == pytest.approx((rho, (loads.max(1) / loads.mean(1)).mean()))
    assert fit(np.zeros((2, 3), int)) == (0, 1)


def test_a_walk_has_its_max_over_mean_at_every_step_and_on_every_rank():
    for step in (0, 1, 5, 70, 10**6):
        found = counts("walk", rho=0.9, target=4.0, step=step, layer=2)
        assert found.max(1) == pytest.approx(np.full(8, 4 * 4096 * 8 / 64), abs=1.1)
        assert np.ptp(found, axis=0).max() <= 1
        assert (found.sum(1) == 8 * 4096).all()


def test_placements_of_a_walk_are_planned_by_the_step_before_the_first():
    ahead, first, later = (np.log(counts("walk", rho=0.99, step=step).sum(0)) for step in (PROFILE_STEP, 0, 900))
    assert np.corrcoef(ahead, first)[0, 1] > 0.95
    assert abs(np.corrcoef(ahead, later)[0, 1]) < 0.5
    assert not np.array_equal(ahead, first)


def drawn_here() -> str:
    """Of both generators, a hash of many steps' and layers' loads."""
    found = hashlib.sha256()
    for num_experts, top_k, target in ((64, 8, 4.0), (256, 8, 11.0), (8, 2, 1.3)):
        for layer in (0, 3):
            given = {"m": model(num_experts, top_k), "layer": layer, "target": target}
            found.update(counts("lognormal", **given).astype("<i8").tobytes())
            for step in (*range(20), PROFILE_STEP):
                found.update(counts("walk", rho=0.97, step=step, **given).astype("<i8").tobytes())
    return found.hexdigest()[:16]


def test_loads_are_the_same_on_all_machines():
    """As they were once; and without any of the vector instructions that numpy may choose here."""
    assert drawn_here() == "1f9b4eb903a1dacf"
    chosen = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
    script = "from tests.routing.test_drift import drawn_here; print(drawn_here())"
    plain = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(chosen)}
    found = subprocess.run([sys.executable, "-c", script], env=plain, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.split() == [drawn_here()], found.stderr


# ---- like a trace -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Three layers of 20 steps of walks with rho and max/mean of their own."""
    path = tmp_path_factory.mktemp("traces") / "walks.parquet"
    header = Header(model="m", num_experts=16, top_k=2, num_layers=3, corpus="none", command="test", date="today")
    rows = []
    for layer, (rho, target) in enumerate(LAYERS):
        workload = Workload(name="w", tokens_per_rank=512, generator="walk", params={"rho": rho, "target": target})
        for step in range(20):
            ids = planned_routing(workload, model(16, 2), NODES, step=step, layer=layer).ids
            rows.append(Recorded(10 * step, layer, ids, np.ones(ids.shape, np.float32), 0.0))
    write_trace(path, header, rows)
    return path


LAYERS = [(0.95, 4.0), (0.4, 2.0), (0.8, 1.5)]


def test_a_walk_like_a_trace_has_each_layers_correlation_and_skew(trace):
    found = told(Workload(name="w", generator="walk", params={"like": str(trace)}))
    assert [(each.layer, each.num_steps) for each in found] == [(0, 20), (1, 20), (2, 20)]
    for each, (rho, target) in zip(found, LAYERS, strict=True):
        assert each.target == pytest.approx(target, rel=0.01)
        assert each.rho == pytest.approx(rho, abs=5 * (1 - rho**2) / (19 * 16) ** 0.5 + 0.02)

    def same(layer: int, as_recorded_in: int, first: int = 0, **params: float) -> bool:
        recorded = found[as_recorded_in]
        stated = {"rho": recorded.rho, "target": recorded.target} | params
        at = {"m": model(16, 2), "step": 4, "layer": layer}
        given = {"like": str(trace), "layer": first} | params
        workload = Workload(name="w", tokens_per_rank=4096, generator="walk", params=given, seed=3)
        like = counts_of(workload, model(16, 2), NODES, step=4, layer=layer)
        return np.array_equal(like, counts("walk", **stated, **at))

    assert same(0, as_recorded_in=0)
    assert same(1, as_recorded_in=1)
    assert not same(1, as_recorded_in=0)
    assert same(4, as_recorded_in=1)  # behind the last layer from the first on
    assert same(1, as_recorded_in=2, first=1)
    assert same(1, as_recorded_in=1, rho=0.1)  # what is given beside the trace counts
    assert same(1, as_recorded_in=1, target=3.0)


def test_what_was_fitted_is_shown_and_kept(trace, moebench, tmp_path):
    from harness.bench.tidy import certificate  # slow to import

    file = tmp_path / "mine.yaml"
    file.write_text(f"{{tokens_per_rank: 64, generator: walk, params: {{like: {trace}}}}}")
    (row,) = json.loads(moebench("list", "workloads", file, "--json")[1])
    assert [each["layer"] for each in row["fitted"]] == [0, 1, 2]
    assert "max/mean 1.5 to 4" in " ".join(moebench("list", "workloads", file)[1].split())
    workload, cluster = presets.workload(str(file)), presets.cluster("local-2")
    found = certificate(
        Experiment(model=model(16, 2), cluster=cluster, workload=workload, system="flat", phase="exchange")
    )
    assert found is not None
    assert list(found.as_dict()["fitted"]) == row["fitted"]


@pytest.mark.parametrize(
    ("params", "m", "parts"),
    [
        ({"like": "nowhere.parquet"}, None, ["nowhere.parquet", "cannot be read"]),
        ({"like": "record-e64k8.parquet"}, model(16, 2), ["model.num_experts: 16", "64 experts"]),
        ({"like": "record-e64k8.parquet"}, model(64, 32), ["params.like: ", "unreachable", "E / k = 2"]),
        ({"rho": 1.5}, None, ["params.rho: 1.5"]),
        ({"rho": -0.5}, None, ["params.rho: -0.5"]),
        ({"target": 9.0}, None, ["params.target: 9", "E / k = 8"]),
    ],
)
def test_walks_that_cannot_be_are_refused_in_one_line(params, m, parts):
    with pytest.raises(UserError) as error:
        counts("walk", m=m, **params)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_one_recorded_step_is_no_walk(trace, tmp_path):
    rows = read_trace(trace)
    header = rows.header
    write_trace(tmp_path / "one.parquet", header, [rows[0, layer] for layer in range(3)])
    with pytest.raises(UserError, match="two recorded steps"):
        counts("walk", m=model(16, 2), like=str(tmp_path / "one.parquet"))
