"""Popularity as logs have it: log-normal, and a walk of log-loads from step to step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.routing import counts_of
from harness.routing.skewed import normal_quantiles, shares_of_logs
from harness.specs import Model, Workload
from harness.topology import Topology

NODES = Topology((2, 4))


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
    found = counts("lognormal", m=model(num_experts, top_k), target=target)
    mean = 4096 * top_k / num_experts
    assert found.max(1) == pytest.approx(np.full(8, target * mean), abs=1.01)  # rounded to tokens
    assert np.ptp(found, axis=0).max() <= 1  # the same experts on all ranks
    if 1 < target < num_experts / top_k:
        loads = np.sort(found.sum(0))
        many = loads > 1000  # where rounding to tokens is nothing
        normal, logs = normal_quantiles(num_experts)[many], np.log(loads[many])
        assert np.abs(logs - np.polyval(np.polyfit(normal, logs, 1), normal)).max() < 0.005
        assert many.sum() >= 16


def test_lognormal_has_its_own_popular_experts_in_every_layer_and_seed():
    same = counts("lognormal").argsort()
    assert np.array_equal(counts("lognormal", step=9).sum(0) > 6000, counts("lognormal").sum(0) > 6000)
    for other in ({"layer": 1}, {"seed": 4}):
        assert not np.array_equal(counts("lognormal", **other).argsort(), same)


def test_no_max_over_mean_is_taken_that_distinct_experts_rule_out():
    with pytest.raises(UserError, match=r"workload w \(lognormal\).params.target: 8.5.* E / k = 8"):
        counts("lognormal", target=8.5)
