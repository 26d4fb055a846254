"""The paper's grid of configured layers (Table 4), for the tests of FSMoE's planners."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike

from harness import presets
from methods.fsmoe.costs import Array, LayerCosts, attention_gradient_elements, reduce_costs
from methods.fsmoe.degree import chunk_times
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


def pipeline_time(costs: LayerCosts, degree: ArrayLike, t_gar: ArrayLike = 0.0) -> Array:
    """The layer's time [...] as the longest of all four cases' paths, whichever predicates hold.

    Interpretation: equal to ``closed_form`` where t_ag = t_rs, or the degree is 1, or there is no t_ag and t_rs. Where
    t_a2a lies between t_ag and (t_ag + t_rs) / 2, Q1 (which asks t_ag alone) names the wrong lane as the bottleneck;
    the paper's formula is then the shorter one, and not long enough for that lane's work.
    """
    r = np.asarray(degree)
    t = chunk_times(costs, r)
    intra = t.ag + t.rs
    idle = np.maximum(
        np.maximum(t_gar, intra),
        np.maximum(r * t.exp + intra, r * intra) - 2 * (r - 1) * t.a2a,
    )
    return 2 * r * t.a2a + idle
