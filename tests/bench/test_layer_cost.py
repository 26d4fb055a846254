"""A whole layer as a black box: timed through the same building blocks as a race."""

from __future__ import annotations

import pytest

from harness import presets
from harness.bench import layer_cost
from harness.errors import UserError
from harness.specs import with_levels


@pytest.mark.timed
def test_a_layer_costs_more_with_more_tokens(session):
    experiments = layer_cost.experiments(presets.cluster("local-4"), "flat", "local-m512-e16k2")
    payload = {"experiments": [experiment.model_dump(mode="json") for experiment in experiments]}
    fits = layer_cost.fit(session("local-4").call("harness.bench.layer_cost:measure", payload, timeout_s=120))
    assert set(fits) == {"forward", "backward"}
    assert all(fit.beta_s_per_token > 0 for fit in fits.values())


def test_a_model_that_does_not_divide_is_refused_before_anything_starts():
    three = with_levels("three", [{"name": "node", "size": 3}, {"name": "rank", "size": 1}], kind="local")
    with pytest.raises(UserError, match=r"--model: 'moe-tiny': its 8 experts do not divide over 3 ranks"):
        layer_cost.experiments(three, "flat", "moe-tiny")
