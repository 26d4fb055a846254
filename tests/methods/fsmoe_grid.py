"""The paper's grid of configured layers (Table 4), for the tests of FSMoE's planners."""

from __future__ import annotations

import itertools

import numpy as np

from harness import presets
from methods.fsmoe.costs import Array, LayerCosts, attention_gradient_elements, reduce_costs
from methods.fsmoe.grid import layers

SEQ = {"fsmoe-a": (512, 1024, 2048), "fsmoe-b": (256, 512, 1024)}


def grid(testbed: str) -> tuple[LayerCosts, Array, Array]:
    """Forward costs [1458], gradient bytes [1458] and their all-reduce's seconds [1458] (k 2; factor 1 for no drop)."""
    cluster = presets.cluster(testbed)
    axes = ((1, 2, 4), (8, 16, 32), SEQ[testbed], (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4, 1.0), (2, 3))
    batch, _, seq, hidden, ratio, factor, gemms = np.array(list(itertools.product(*axes))).T
    sizes = {"batch": batch, "seq": seq, "hidden": hidden, "ffn": hidden * ratio, "copies": 2 * factor}
    costs = layers(cluster, **sizes, num_gemms=gemms).costs
    kv = np.where(gemms == 2, 1, 0.25)
    gradient = 4 * attention_gradient_elements(hidden, cluster.shape[-1], biased=gemms == 2, kv_fraction=kv)
    return costs, gradient, reduce_costs(cluster).time_s(gradient)
