"""FSMoE's costs and pipeline degree: against the paper's figures, a replay of the lanes, and each other."""

from __future__ import annotations

import numpy as np
import pytest

from harness import presets
from harness.errors import UserError
from harness.specs import with_levels
from methods.fsmoe.costs import (
    NOTHING,
    Array,
    LayerCosts,
    Linear,
    Reduce,
    attention_gradient_elements,
    reduce_costs,
)
from methods.fsmoe.degree import (
    DEGREES,
    Chunk,
    case_of,
    chunk_times,
    closed_form,
    overlappable,
    scan_degree,
    slsqp_degree,
)
from methods.fsmoe.grid import layers
from tests.methods.fsmoe_grid import grid, pipeline_time

EVERY = np.array(DEGREES)[:, None]  # [R, 1]


def random_costs(num: int, seed: int, *, equal_intra: bool = False) -> LayerCosts:
    """Layers [num] whose operations differ by up to three orders of magnitude."""
    rng = np.random.default_rng(seed)

    def part() -> Linear:
        return Linear(10 ** rng.uniform(-5, -3, num), np.ones(num), 10 ** rng.uniform(-4, -1.5, num))

    a2a, ag, rs, experts = part(), part(), part(), part()
    return LayerCosts(a2a, ag, ag if equal_intra else rs, experts)


def random_slices(num: int, seed: int) -> Array:
    """Seconds of gradient slices [num], a third of them none."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num) < 1 / 3, 0, 10 ** rng.uniform(-4, -1, num))


def on_lanes(t: Chunk, degree: int, t_gar: Array) -> Array:
    """The schedule replayed: first come, first served on each of three lanes, in the order that section 4 issues."""
    inter = intra = compute = np.zeros(t.a2a.shape)
    gathered, reduced = [], []
    for _ in range(degree):
        inter = inter + t.a2a
        intra = np.maximum(intra, inter) + t.ag
        gathered.append(intra)
    inter = inter + t_gar
    for ready in gathered:
        compute = np.maximum(compute, ready) + t.exp
        intra = np.maximum(intra, compute) + t.rs
        reduced.append(intra)
    for ready in reduced:
        inter = np.maximum(inter, ready) + t.a2a
    return inter


def test_costs_predict_table_2() -> None:
    """Testbed A, Mixtral, B 4, L 1024, k f = 2: 20.0, 12.5, 11.9 ms (with the dense part's own gather and scatter)."""
    cluster = presets.cluster("fsmoe-a")
    costs, dense = (
        layers(cluster, batch=4, seq=1024, hidden=4096, ffn=14336, copies=copies, num_gemms=3).costs
        for copies in (2.0, 1.0)
    )
    assert 2e3 * costs.a2a.chunk_s(1) == pytest.approx(20.0, abs=0.1)
    assert 1e3 * (costs.ag.chunk_s(1) + dense.ag.chunk_s(1)) == pytest.approx(12.5, abs=0.1)
    assert 1e3 * (costs.rs.chunk_s(1) + dense.rs.chunk_s(1)) == pytest.approx(11.9, abs=0.1)
    assert 1e3 * costs.experts.chunk_s(1) == pytest.approx(15.6, rel=0.1)  # measured
    assert 1e3 * costs.backward().experts.chunk_s(1) == pytest.approx(31.8, rel=0.1)  # measured
    gradient = 4 * attention_gradient_elements(4096, 8, biased=False, kv_fraction=0.25)
    assert 1e3 * reduce_costs(cluster).time_s(gradient) == pytest.approx(26.45, abs=0.05)  # measured


def test_backward_doubles_the_experts_alone() -> None:
    costs = random_costs(5, 0)
    there, back = chunk_times(costs, 4), chunk_times(costs.backward(), 4)
    np.testing.assert_allclose(back.exp, 2 * there.exp)
    for same in ("a2a", "ag", "rs"):
        np.testing.assert_array_equal(getattr(back, same), getattr(there, same))


def test_folded_costs_keep_the_time_on_the_wire() -> None:
    """With N_ESP = 4 the fold is the authors' (2 beta_ag + 2 beta_rs, half of each alpha); with 8 it is not."""
    for testbed, factor in (("fsmoe-a", 4), ("fsmoe-b", 2)):
        costs, _, _ = grid(testbed)
        t, folded = chunk_times(costs, EVERY), chunk_times(costs.folded(), EVERY)
        np.testing.assert_allclose(2 * folded.a2a, 2 * t.a2a + t.ag + t.rs, rtol=1e-12)
        assert not np.any(folded.ag + folded.rs)
        beta = costs.a2a.beta_s + factor * (costs.ag.beta_s + costs.rs.beta_s)
        alpha = costs.a2a.alpha_s + (costs.ag.alpha_s + costs.rs.alpha_s) / 2
        np.testing.assert_allclose(folded.a2a[0], alpha + costs.a2a.n * beta, rtol=1e-12)


def test_reduction_and_its_inverse() -> None:
    reduce = Reduce(alpha_s=1e-3, beta_s_per_byte=1e-9)
    np.testing.assert_allclose(reduce.time_s([0, 1_000_000]), [0, 2e-3])
    np.testing.assert_allclose(reduce.bytes_in([0, 1e-3, 2e-3]), [0, 0, 1_000_000], atol=1e-6)


def test_constants_of_another_number_of_ranks() -> None:
    cluster = presets.cluster("fsmoe-a")
    sizes = {"batch": 4, "seq": 1024, "hidden": 64, "ffn": 64, "copies": 2.0, "num_gemms": 2}
    beta_s = {num: float(layers(cluster, **sizes, num_ranks=num).costs.a2a.beta_s) for num in (16, 7, None)}
    assert beta_s[16] < beta_s[7] == beta_s[None]


def test_missing_or_impossible_constants_are_named() -> None:
    bare = with_levels("bare", [{"name": "node", "size": 2}, {"name": "rank", "size": 2}], kind="local")
    sizes = {"batch": 1, "seq": 8, "hidden": 8, "ffn": 8, "copies": 1, "num_gemms": 2}
    with pytest.raises(UserError, match=r"cluster bare\.gemm"):
        _ = layers(bare, **sizes).costs
    with pytest.raises(UserError, match=r"cluster bare\.collectives.*ar\.inter"):
        reduce_costs(bare)
    with pytest.raises(UserError, match=r"cost\.n:"):
        _ = layers(presets.cluster("fsmoe-a"), **{**sizes, "copies": -1}).costs


def test_exactly_one_case_holds() -> None:
    costs, slices = random_costs(20_000, 1), random_slices(20_000, 2)
    cases = case_of(costs, EVERY, slices)
    assert set(np.unique(cases)) == {1, 2, 3, 4}


def test_simplification_is_the_four_cases_where_gather_and_scatter_are_equal() -> None:
    slices = random_slices(20_000, 3)
    costs = random_costs(20_000, 4, equal_intra=True)
    np.testing.assert_allclose(pipeline_time(costs, EVERY, slices), closed_form(costs, EVERY, slices), rtol=1e-12)

    costs = random_costs(20_000, 5)
    whole, cases = pipeline_time(costs, EVERY, slices), closed_form(costs, EVERY, slices)
    np.testing.assert_allclose(whole[0], cases[0], rtol=1e-12)  # one chunk
    assert (cases <= whole * (1 + 1e-12)).all()
    t = chunk_times(costs, EVERY)
    differ = ~np.isclose(whole, cases, rtol=1e-9)
    assert differ.any()
    q1_asks_the_wrong_half = (t.a2a > t.ag) != (2 * t.a2a > t.ag + t.rs)
    assert not (differ & ~q1_asks_the_wrong_half).any()


def test_formulas_are_what_the_lanes_do() -> None:
    """Exact where t_ag = t_rs; elsewhere a lower bound, as a lane may wait for a short piece behind a long one."""
    slices = random_slices(5_000, 6)
    for equal in (True, False):
        costs = random_costs(5_000, 7, equal_intra=equal)
        for degree in DEGREES:
            replayed = on_lanes(chunk_times(costs, degree), degree, slices)
            formula = pipeline_time(costs, degree, slices)
            if equal or degree == 1:
                np.testing.assert_allclose(formula, replayed, rtol=1e-12)
            assert (formula <= replayed * (1 + 1e-12)).all()


def test_a_slice_is_free_up_to_the_overlappable_time() -> None:
    costs = random_costs(2_000, 8)
    free, alone = overlappable(costs, EVERY), closed_form(costs, EVERY)
    assert (free > -1e-12).all()
    np.testing.assert_allclose(closed_form(costs, EVERY, free), alone, rtol=1e-12)
    np.testing.assert_allclose(closed_form(costs, EVERY, free + 1e-3), alone + 1e-3, rtol=1e-9)


def test_scan_takes_the_least_of_the_case_times() -> None:
    costs, slices = random_costs(2_000, 9), random_slices(2_000, 10)
    degree, time_s = scan_degree(costs, slices)
    every = closed_form(costs, EVERY, slices)
    np.testing.assert_allclose(time_s, every.min(axis=0), rtol=1e-12)
    np.testing.assert_allclose(closed_form(costs, degree, slices), time_s, rtol=1e-12)
    assert set(degree) == set(DEGREES)


@pytest.mark.parametrize("testbed", [pytest.param("fsmoe-a", marks=pytest.mark.long), "fsmoe-b"])
def test_scan_and_slsqp_agree_on_the_grid(testbed: str) -> None:
    forward, _, reduce_s = grid(testbed)
    backward = forward.backward()
    seen = set()
    for index in np.random.default_rng(11).choice(len(reduce_s), 8, replace=False):
        for costs, t_gar in ((forward[index], 0.0), (backward[index], float(reduce_s[index]))):
            degree, time_s = scan_degree(costs, t_gar)
            slsqp, slsqp_s = slsqp_degree(costs, t_gar)
            assert slsqp == degree or slsqp_s == pytest.approx(float(time_s), rel=1e-9)
            seen.add(int(degree))
    assert len(seen) > 1


def test_one_stream_costs_both_messages_one_after_the_other() -> None:
    """PipeMoE's lane: dispatches with their gathers, then combines with their scatters, beside the experts."""
    costs = random_costs(2_000, 12, equal_intra=True)
    for degree in DEGREES:
        t = chunk_times(costs, degree)
        merged = Chunk(t.a2a + (t.ag + t.rs) / 2, 0, 0, t.exp)
        np.testing.assert_allclose(
            closed_form(costs.folded(), degree), on_lanes(merged, degree, np.zeros(2_000)), rtol=1e-12
        )
    assert costs.folded().ag is NOTHING
