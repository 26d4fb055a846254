"""Expert parallelism inside data parallelism, on ranks: every system in groups smaller than the job."""

from __future__ import annotations

import pytest

from harness import registry
from harness.specs import SERVING, Experiment, Model, Workload

MODEL = Model(name="small", num_layers=2, hidden=32, ffn=32, num_experts=8, top_k=2, num_heads=4, seq=8, vocab=64)
INSIDE, ACROSS = {"expert_parallel": 2}, {"expert_parallel": 2, "expert_placement_order": "across_nodes"}
NAMES = [name for name, each in registry.systems().items() if each.missing() is None]


def experiment(session, system: str, phase: str, layout: dict, **fields) -> dict:
    return Experiment(
        model=MODEL,
        cluster=session("local-4").cluster,
        workload=Workload(name="small", tokens_per_rank=16, generator="uniform"),
        system=system,
        phase=phase,
        dtype=fields.pop("dtype", "float64"),
        backward=phase not in SERVING,
        layout=layout,
        **fields,
    ).model_dump(mode="json")


@pytest.mark.parametrize("layout", [INSIDE, ACROSS], ids=["inside", "across"])
def test_every_system_agrees_with_the_oracle_in_groups(session, layout):
    payload = {"systems": NAMES, "trials": ["ragged"], "dtypes": ["float32"], "layout": layout}
    for rows in session("local-4").call("tests.bench.groups_on_ranks:checked", payload, timeout_s=120):
        assert {row["system"] for row in rows} == set(NAMES)
        assert [row for row in rows if row["status"] not in ("ok", "refused")] == []


@pytest.mark.parametrize(
    ("system", "layout", "options"),
    [
        ("flat", INSIDE, {}),
        ("flat", ACROSS, {}),
        ("hiermoe-hd2", ACROSS, {}),
        ("fsmoe", INSIDE, {}),
        ("fastermoe", INSIDE, {"shadows": 2}),
        ("smartmoe", INSIDE, {"place_every": 2}),
        ("flat", {"expert_parallel": 1}, {}),
    ],
)
def test_a_training_in_groups_is_that_of_the_oracle(session, system, layout, options):
    payload = {"experiment": experiment(session, system, "train_step", layout, options=options)}
    for row in session("local-4").call("tests.bench.groups_on_ranks:trained", payload, timeout_s=120):
        assert (row["status"], row["reason"]) == ("ok", "")


def test_gradients_that_are_not_summed_over_replicas_are_found(session):
    payload = {"experiment": experiment(session, "flat", "train_step", INSIDE), "fault": True}
    for row in session("local-4").call("tests.bench.groups_on_ranks:trained", payload, timeout_s=120):
        assert row["status"] == "nonconforming"


@pytest.mark.parametrize("phase", ["exchange", "layer", "train_step", "prefill"])
def test_layouts_race_each_other(session, phase):
    systems = ("flat", "hiermoe-hd2")
    cells = [experiment(session, each, phase, layout) for layout in ({}, INSIDE, ACROSS) for each in systems]
    payload = {"experiments": cells, "repeats": 1, "warmup": 1}
    for answer in session("local-4").call("harness.bench.race:run_race", payload, timeout_s=120):
        outcomes = list(answer["cells"].values())
        assert len(outcomes) == 6
        assert [(each["status"], each["reason"]) for each in outcomes] == [("ok", "")] * 6


def test_copies_that_train_are_placed_alike_in_all_groups(session):
    payload = {"systems": ["eplb", "flexmoe"], "layout": ACROSS}
    for rows in session("local-4").call("tests.bench.groups_on_ranks:varied", payload, timeout_s=120):
        assert [(row["status"], row["reason"]) for row in rows] == [("ok", "")] * 2
