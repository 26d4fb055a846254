"""A trace that is replayed: which recorded step an experiment's step has, whose tokens a rank has, and that what is too
short is refused before any rank starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from harness import presets, simulating
from harness.bench import inputs, suite
from harness.case import cases_of, profile_of
from harness.errors import UserError
from harness.plan.choice import Wanted
from harness.routing import counts_of, make_routing
from harness.routing.importing import Wanted as WantedImport
from harness.routing.importing import import_trace
from harness.routing.looking import look, table
from harness.routing.trace import Header, Recorded, Writer, find_trace, read_trace
from harness.routing.walk import told
from harness.simulation import simulate
from harness.specs import Model, Workload, with_levels
from harness.topology import Topology

NODES, RANKS = Topology((2, 2)), (6, 2, 8, 4)
MODEL = Model(name="m", num_layers=2, hidden=8, ffn=8, num_experts=16, top_k=4)
STEPS = (10, 20, 30, 40)
LEVELS = [{"name": "node", "size": 2, "bandwidth_bytes_per_s": 25e9}]
CLUSTER = with_levels("own", LEVELS, kind="physical", device="H100", device_flops_per_s=989e12)


@pytest.fixture(params=["tokens", "counts"])
def path(tmp_path: Path, request) -> Path:
    """4 steps of 2 layers on 4 ranks, as tokens or as counts."""
    rng = np.random.default_rng(0)
    ids = rng.random((len(STEPS), 2, sum(RANKS), 16)).argsort(-1)[..., :4]
    if request.param == "tokens":
        np.savez(tmp_path / "a.npz", ids=ids, steps=STEPS, rank_tokens=RANKS)
    else:
        starts = np.cumsum(RANKS) - RANKS
        counts = np.add.reduceat((ids[..., None] == np.arange(16)).sum(-2), starts, axis=2)
        np.savez(tmp_path / "a.npz", counts=counts.swapaxes(1, 2), steps=STEPS)
    import_trace([tmp_path / "a.npz"], tmp_path / "t.parquet", WantedImport(num_experts=16, top_k=4))
    return tmp_path / "t.parquet"


def workload(path: Path, tokens: int | tuple[int, ...] = 2, **params) -> Workload:
    given = {"path": str(path), "replay": True} | params
    return Workload(name="w", tokens_per_rank=tokens, generator="trace", params=given)


def test_steps_follow_one_another_and_ranks_keep_their_tokens(path):
    trace = read_trace(path)
    for params, steps in (({}, STEPS), ({"step": 20, "hold": 2}, (20, 20, 30, 30, 40, 40)), ({"step": 40}, (40,))):
        for step, recorded in enumerate(steps):
            found = make_routing(workload(path, **params), MODEL, NODES, step=step, layer=1)
            assert found is not None
            for rank, start in enumerate(np.cumsum(RANKS) - RANKS):
                assert np.array_equal(found.of_rank(rank), trace[recorded, 1].ids[start : start + 2])
        with pytest.raises(UserError, match="is over at step"):
            make_routing(workload(path, **params), MODEL, NODES, step=len(steps))
    still = make_routing(workload(path, replay=False), MODEL, NODES, step=2)
    assert still is not None
    assert np.array_equal(still.of_rank(1), trace[40, 0].ids[6:8])


def test_loads_are_those_of_the_tokens(path):
    for tokens in (RANKS, 2):
        for step in range(4):
            routing = make_routing(workload(path, tokens), MODEL, NODES, step=step)
            assert routing is not None
            assert np.array_equal(counts_of(workload(path, tokens), MODEL, NODES, step=step), routing.counts)


def test_other_ranks_share_the_tokens_out(path):
    found = make_routing(workload(path, 10), MODEL, Topology((2,)), step=1)
    assert found is not None
    assert np.array_equal(found.ids, read_trace(path)[20, 0].ids)


@pytest.mark.parametrize(
    ("tokens", "params", "said"),
    [
        (3, {}, "3 tokens on rank 1, but the trace t.parquet has 2 of it at step 10; give a rank 2 at most"),
        (2, {"hold": 2, "replay": False}, "hold: 2: is for a replay"),
        (2, {"hold": 0}, "hold: 0"),
        (2, {"replay": "often"}, "replay"),
    ],
)
def test_what_does_not_fit(path, tokens, params, said):
    with pytest.raises(UserError, match=said):
        make_routing(workload(path, tokens, **params), MODEL, NODES)


FILE = """
name: replayed
defaults: {{cluster: local-2, dtype: float32, repeats: {repeats}, launches: 1, warmup: 1, backward: {backward}}}
experiments:
  - model: {{num_layers: 2, hidden: 16, ffn: 16, num_experts: 16, top_k: 4, num_heads: 2, seq: 2, vocab: 64}}
    workload: {{tokens_per_rank: 2, generator: trace, params: {{path: {path}, replay: true}}}}
    system: flat
    phase: {phase}
"""


def asked(path: Path, phase: str, repeats: int) -> suite.Suite:
    text = FILE.format(path=path, phase=phase, repeats=repeats, backward=str(phase == "train_step").lower())
    return suite.parse(text, "replayed.yaml", strict=False)


@pytest.mark.parametrize(("phase", "most"), [("train_step", 2), ("prefill", 3), ("decode", 3)])
def test_what_is_over_too_early_is_refused_before_ranks_start(path, phase, most, tmp_path):
    """4 recorded steps: a warm-up, repeats, and of a training one more."""
    assert len(inputs.sift(asked(path, phase, most)).experiments) == 1
    with pytest.raises(
        UserError, match=r"params.step: 10: the replay of t.parquet lasts 4 steps from there, 5 are wanted"
    ):
        inputs.sift(asked(path, phase, most + 1))
    with pytest.raises(UserError, match="4 warm-up, 1 to simulate"):
        simulating.simulate_suite(asked(path, phase, 1), tmp_path / "run", Wanted(), steps=1, warm=4)
    assert not (tmp_path / "run").exists()


def test_what_stands_still_lasts_for_ever(path):
    text = FILE.format(path=path, phase="train_step", repeats=9, backward="true").replace("replay: true", "step: 40")
    assert len(inputs.sift(suite.parse(text, "still.yaml")).experiments) == 1


def test_phases_without_steps_replay_nothing(path):
    with pytest.raises(UserError, match="replay in train_step, prefill or decode"):
        asked(path, "layer", 1)


def test_a_server_goes_on_and_was_placed_by_the_past(path):
    (experiment,) = asked(path, "prefill", 3).experiments
    trace = read_trace(path)
    for step, recorded in enumerate(STEPS):
        found = cases_of(experiment, step)[1].routing
        assert np.array_equal(found.ids[:2], trace[recorded, 1].ids[:2])
    assert not experiment.exactly_planned
    profile = profile_of(experiment)
    assert profile is not None
    assert len(profile[0].ids) == sum(RANKS) - 4  # no step before: what is not served of the first
    later = experiment.model_copy(update={"workload": workload(path, step=20)})
    profile = profile_of(later)
    assert profile is not None
    assert np.array_equal(profile[1].ids, trace[10, 1].ids)


@pytest.mark.parametrize("phase", ["train_step", "decode"])
def test_a_simulation_takes_each_step_as_it_was(path, phase):
    (experiment,) = asked(path, phase, 1).experiments
    experiment = experiment.model_copy(update={"cluster": CLUSTER})
    machine = Wanted("data-sheet").machine(experiment)
    found = simulate(experiment, machine, steps=3, warm=1)
    assert len(found.samples["total"]) == 3


def test_what_a_trace_looks_like(path, tmp_path):
    found = look(read_trace(path))
    assert (found["steps"], found["ranks"], found["num_experts"]) == (list(STEPS), 4, 16)
    for layer in (0, 1):
        loads = [read_trace(path).counts(step, layer).sum(0) for step in STEPS]
        assert found["layers"][layer]["skew"] == [load.max() / load.mean() for load in loads]
        moved = np.abs(loads[1] / 80 - loads[0] / 80).sum() / 2
        assert found["layers"][layer]["drift"][1] == pytest.approx(moved)
    header = Header(model="m", num_experts=4, top_k=1, num_layers=1, corpus="", command="", date="")
    with Writer(tmp_path / "u.parquet", header) as writer:
        for step, ids in enumerate(([0, 1, 2, 3], [0, 0, 0, 0], [1, 1, 1, 1])):
            row = Recorded(step, 0, np.array(ids)[:, None], np.zeros((0, 1)), np.nan)
            writer.add(row)
    (row,) = table(look(read_trace(tmp_path / "u.parquet")))
    assert row["skew, step by step"] == "▁██"
    assert row["drift a step"] == (0.75 + 1.0) / 2


def test_the_page_tells_how_to_write_one(tmp_path, monkeypatch):
    """docs/traces.md: its Python is run, and its experiments take what that wrote."""
    text = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert code.count("\n") <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/traces.md", "exec"), {})
    found = read_trace(tmp_path / "mine.parquet")
    assert (len(found.steps), len(found.layers), found.ranks(9, 2)) == (10, 3, (256,) * 4)
    assert found[9, 2].ids.shape == (1024, 2)
    experiments = text.split("```yaml\n")[1].split("```")[0]
    assert len(inputs.sift(suite.parse(experiments, "mine.yaml")).experiments) == 2


def test_the_shipped_trace_that_drifts():
    """Choices behind many steps in a row, early and late, heavy early on. The tokens are the same ones at every step:
    all drift is of the routers. Presets replay it, and walk as it does."""
    replayed, late = presets.workload("replayed"), presets.workload("replayed-late")
    trace = read_trace(find_trace(str(replayed.params["path"])))
    assert trace.path.stat().st_size <= 5e6
    first = trace.steps.index(late.params["step"])
    assert trace.steps[:first] == list(range(trace.steps[0], trace.steps[0] + first))
    assert trace.steps[first:] == list(range(trace.steps[first], trace.steps[-1] + 1))
    assert min(first, len(trace.steps) - first) >= 64
    for layer in look(trace)["layers"]:
        skew, drift = np.array(layer["skew"]), np.array(layer["drift"])
        assert skew[:first].mean() > 4
        assert drift[1:first].mean() > 2 * drift[first + 1 :].mean() > 0.002
    model, topology = MODEL.model_copy(update={"num_experts": 64, "top_k": 2}), Topology((2, 4))
    found = [make_routing(each, model, topology, step=1) for each in (replayed, late)]
    for routing, at in zip(found, (1, first + 1), strict=True):
        assert routing is not None
        assert np.array_equal(routing.ids, trace[trace.steps[at], 0].ids)
    (walks,) = {each.num_steps for each in told(presets.workload("walk-recorded"))}
    assert walks == len(trace.steps)
