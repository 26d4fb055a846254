"""Serving: logits do not depend on where experts are, real text through a trained model, and what a run stores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from harness import placing, presets
from harness.bench import serve, suite
from harness.bench.run import run_suite
from harness.bench.store import Store
from harness.case import placements, profile_of
from harness.errors import UserError
from harness.layer import stored
from harness.layer.gpt import GPT
from harness.routing.record import LocalMoE, record
from harness.specs import Experiment

ON_RANKS = "tests.methods.moetuner_on_ranks"
MODEL = presets.model("gpt-tiny-moe").model_copy(update={"hidden": 32, "ffn": 16, "seq": 16, "num_layers": 3})


def experiment(cluster: str, phase: str = "prefill", **changed: Any) -> dict[str, Any]:
    tokens = {"prefill": 64, "decode": 5}[phase]
    fields: dict[str, Any] = {
        "model": MODEL,
        "cluster": presets.cluster(cluster),
        "workload": {"name": "w", "tokens_per_rank": tokens, "generator": "natural"},
        "system": "moetuner",
        "phase": phase,
        "dtype": "float64",
        "backward": False,
    }
    return Experiment.parse(fields | changed, "test").model_dump(mode="json")  # type: ignore[no-any-return]


def scattered(num_ranks: int, seed: int) -> list[list[list[int]]]:
    rng, found = np.random.default_rng(seed), []
    for _ in range(MODEL.num_layers):
        cuts = np.sort(rng.choice(np.arange(1, 8), num_ranks - 1, replace=False))
        found.append([part.tolist() for part in np.split(rng.permutation(8), cuts)])
    return found


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("generator", ["natural", "uniform"])
def test_on_one_rank_logits_are_equal_to_the_last_bit(session, phase: str, generator: str) -> None:
    workload = {"name": "w", "tokens_per_rank": 64, "generator": generator}
    model = MODEL.model_copy(update={"top_k": 4})  # a sum of two does not depend on its order
    payload = {
        "experiment": experiment("local-1", phase, workload=workload, model=model),
        "placements": [[[[*range(8)]]] * 3, *(scattered(1, seed) for seed in range(4))],
    }
    (found,) = session("local-1").call(f"{ON_RANKS}:logits", payload)
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_over_ranks_logits_are_equal_with_any_placement(session, phase: str) -> None:
    given = experiment("local-4", phase)
    even = [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 3
    payload = {"experiment": given, "placements": [even, None, *(scattered(4, seed) for seed in range(3))]}
    for found in session("local-4").call(f"{ON_RANKS}:logits", payload):
        assert np.abs(found[0]).max() > 0.1
        for other in found[1:]:
            assert np.abs(other - found[0]).max() <= 1e-10 * np.abs(found[0]).max()


@pytest.mark.parametrize("name", ["flat", "moetuner", "megatron", "hiermoe-hd2"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("generator", ["natural", "uniform"])
def test_logits_are_the_oracles(session, name: str, phase: str, generator: str) -> None:
    workload = {"name": "w", "tokens_per_rank": 64, "generator": generator}
    payload = {"experiment": experiment("local-4", phase, system=name, workload=workload), "broken": False}
    for row in session("local-4").call(f"{ON_RANKS}:gate", payload, timeout_s=200):
        assert row["status"] == "ok", row
        assert row["errors"]["logits"] <= {"megatron": 4e-6}.get(name, 2e-10)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("generator", ["natural", "uniform"])
def test_logits_do_not_depend_on_where_the_heads_are(session, phase: str, generator: str) -> None:
    """Experts over all ranks and heads over those of a node, against the oracle and against replicated attention."""
    workload = {"name": "w", "tokens_per_rank": 64, "generator": generator}
    shared = experiment("local-4", phase, workload=workload, model_parallel=True)
    for row in session("local-4").call(f"{ON_RANKS}:gate", {"experiment": shared, "broken": False}, timeout_s=200):
        assert row["status"] == "ok", row
        assert row["errors"]["logits"] <= 2e-10
    if phase == "decode" and generator == "uniform":
        return  # keys and values are drawn, by each rank for its heads
    whole = shared | {"model_parallel": False}
    found = [
        session("local-4").call(f"{ON_RANKS}:logits", {"experiment": each, "placements": [scattered(4, 0)]})
        for each in (shared, whole)
    ]
    for (own,), (other,) in zip(*found, strict=True):
        assert np.abs(own - other).max() <= 1e-10 * np.abs(other).max()


def test_experts_that_are_fetched_ahead_are_the_oracles(session) -> None:
    """Copies are gathered beside the attention before them."""
    given = experiment("local-4", system="hecate", options={"t": 4, "m": 4})
    for row in session("local-4").call(f"{ON_RANKS}:gate", {"experiment": given, "broken": False}):
        assert row["status"] == "ok", row
        assert row["errors"]["logits"] <= 2e-10


def test_experts_with_the_weights_of_others_are_found(session) -> None:
    payload = {"experiment": experiment("local-4"), "broken": True}
    rows = session("local-4").call(f"{ON_RANKS}:gate", payload)
    assert {row["status"] for row in rows} == {"nonconforming"}
    assert "logits in float64 off by" in rows[0]["reason"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    record(MODEL, folder / "t.parquet", num_steps=6, steps=[6], num_tokens=64, batch=2, weights=folder / "w.npz")
    return folder / "w.npz"


def test_a_trained_model_serves_as_it_was_trained(session, trained: Path, request: pytest.FixtureRequest) -> None:
    """Prefill of the trained model is what the trained model itself says; decoding gives its last token's logits."""
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    arrays = stored.load(trained, MODEL)
    gpt = GPT(MODEL, lambda layer: LocalMoE(MODEL, layer, 0))
    gpt.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    with torch.no_grad():
        for phase, tokens in (("prefill", 32), ("decode", 2)):
            natural = {"generator": "natural", "params": {"weights": str(trained)}}
            given = experiment("local-2", phase, workload={"name": "w", "tokens_per_rank": tokens, **natural})
            answers = session("local-2").call(f"{ON_RANKS}:logits", {"experiment": given, "placements": [None]})
            own = np.concatenate([answer[0] for answer in answers])
            said = gpt.double()(serve.text(Experiment.model_validate(given), [0, 1]))
            wanted = (said if phase == "prefill" else said[:, -1:]).flatten(0, 1).numpy()
            assert np.abs(own - wanted).max() <= 1e-10 * np.abs(wanted).max()


def test_weights_of_another_model_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"w.npz: token.weight.*must be \[256, 64\]"):
        stored.load(trained, MODEL.model_copy(update={"hidden": 64}))
    with pytest.raises(UserError, match="more layers"):
        stored.load(trained, MODEL.model_copy(update={"num_layers": 2}))
    for content in (b"", b"not an archive", b"PK\x03\x04"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            stored.load(tmp_path / "bad.npz", MODEL)


def test_plans_come_from_tokens_that_are_not_served() -> None:
    trace = {"name": "w", "generator": "trace", "params": {"path": "record-e64k8.parquet", "step": 60}}
    model = presets.model("record-e64k8")

    def given(tokens: int) -> Experiment:
        workload = {**trace, "tokens_per_rank": tokens}
        return Experiment.model_validate(experiment("local-4", workload=workload, model=model))

    from harness.routing import make_routing
    from harness.topology import Topology

    topology = Topology((2, 2))
    profile = profile_of(given(1024))
    assert profile is not None
    assert [len(routing.ids) for routing in profile] == [16384 - 4096] * 4
    whole = make_routing(given(4096).workload, model, topology, layer=2)
    assert whole is not None
    assert np.array_equal(profile[2].ids, whole.ids[4096:])
    with pytest.raises(UserError, match="none is left to plan by"):
        placements(given(4096))


def test_a_placement_file_is_followed_and_checked(session, tmp_path: Path) -> None:
    slots = scattered(4, 9)
    path = tmp_path / "p.json"
    made = {"model": "m", "num_experts": 8, "num_ranks": 4, "cluster": "c", "method": "x", "slots": slots}
    path.write_text(json.dumps(made))
    workload = {"name": "w", "tokens_per_rank": 64, "generator": "zipf", "params": {"target": 2.0}}
    given = experiment("local-4", options={"placement": str(path)}, workload=workload)
    for answer in session("local-4").call(f"{ON_RANKS}:parts", {"experiment": given}):
        assert answer["placed"] == slots
        assert set(answer["parts"]) == {"attention", "experts", "all_to_all", "moe"}
        assert all(len(times) == 3 and min(times) > 0 for times in answer["parts"].values())
        assert answer["tasks"].count("layer1.forward.dispatch") == 1
    text = f"""
name: bad
experiments:
  - {{model: moe-tiny, cluster: local-4, phase: prefill, dtype: float32, backward: false,
      workload: {{tokens_per_rank: 64}}, system: {{name: moetuner, options: {{placement: {path}}}}}}}
"""
    with pytest.raises(UserError, match=r"options.placement: '3 layers': the experiment has 1"):
        suite.parse(text, "bad.yaml")
    assert placing.read(path).slots[0] == tuple(tuple(rank) for rank in slots[0])


RUN = """
name: served
defaults: {cluster: local-2, dtype: float32, repeats: 2, launches: 1}
experiments:
  - model: {num_layers: 2, hidden: 32, ffn: 32, num_experts: 8, top_k: 2, num_heads: 4, seq: 16, vocab: 256}
    workload: {tokens_per_rank: 32, generator: zipf, params: {target: 3.0}}
    system: [megatron, flat, {name: moetuner, options: {method: greedy}}]
    phase: [prefill, decode]
"""


@pytest.mark.long
def test_a_run_keeps_times_of_parts_and_load(tmp_path: Path) -> None:
    counts = run_suite(suite.parse(RUN, "run.yaml"), tmp_path / "served", show_progress=False)
    assert counts == {"ok": 6}
    rows = Store(tmp_path / "served").read()
    timed = rows[rows["metric"] == "time_s"]
    assert set(timed["direction"]) == {"total"}
    assert len(timed) == 6 * 2
    native = rows[(rows["system"] == "moetuner") & (rows["metric"] == "experts_s")]
    assert len(native) == 2 * 2 * 2 * 2  # phases, repetitions, layers, ranks
    assert set(rows[rows["metric"] == "moe_s"]["system"]) == {"megatron", "flat", "moetuner"}
    assert set(rows[rows["metric"] == "all_to_all_s"]["system"]) == {"flat", "moetuner"}
    assert (rows[rows["metric"] == "error_logits"]["value"] < 1e-5).all()
    load = rows[rows["metric"] == "placed_max_over_mean"].groupby("system")["value"].mean()
    assert load["moetuner"] < load["flat"] == pytest.approx(load["megatron"])
    speed = rows[rows["metric"] == "tokens_per_s"].merge(timed, on=["cell", "rep"], suffixes=("", "_t"))
    assert np.allclose(speed["value"] * speed["value_t"], 64)
    assert isinstance(rows, pd.DataFrame)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("gate: softmoe", "each token chooses its experts by itself"),
        ("capacity_factor: 1.0", "nothing is dropped"),
    ],
)
def test_what_cannot_be_served_is_named(changed: str, said: str) -> None:
    text = RUN.replace("vocab: 256", f"vocab: 256, {changed}")
    with pytest.raises(UserError, match=said):
        suite.parse(text, "run.yaml")
    shared = RUN.replace("cluster: local-2, dtype: float32", "cluster: local-4, dtype: float32, model_parallel: true")
    suite.parse(shared, "run.yaml")
    for old, new, named in (
        ("num_heads: 4", "num_heads: 1", "model.num_heads: 1: does not divide over the 2 ranks of a node"),
        ("num_heads: 4", "num_heads: 4, num_kv_heads: 1", "model.num_kv_heads: 1"),
        ("tokens_per_rank: 32", "tokens_per_rank: [32, 16, 32, 32]", "must be the same on all ranks of a node"),
    ):
        with pytest.raises(UserError, match=named):
            suite.parse(shared.replace(old, new), "run.yaml")
