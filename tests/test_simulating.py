"""moebench simulate: which machine prices a cell, what the store gets, what is refused; on any cluster, in a line."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import yaml

from harness import ledger, presets, simulating
from harness.bench import run, suite, told
from harness.bench.store import Store
from harness.errors import UserError
from harness.plan.choice import Wanted, fingerprint
from harness.plan.links import Ports, SharedPorts
from harness.registry import systems
from tests.report.synthetic_run import experiment
from tests.report.test_simulated import said

CLUSTER = {
    "name": "own",
    "kind": "physical",
    "levels": [
        {"name": "node", "size": 2, "bandwidth_bytes_per_s": 25e9},
        {"name": "gpu", "size": 4, "bandwidth_bytes_per_s": 200e9},
    ],
    "device": "H100",
    "device_flops_per_s": 989e12,
}
ENTRY = {
    "model": {"num_layers": 2, "hidden": 64, "ffn": 64, "num_experts": 16, "top_k": 2, "seq": 64},
    "cluster": CLUSTER,
    "workload": {"tokens_per_rank": 64, "generator": "zipf", "params": {"target": 2.0}},
    "system": ["flat", "hiermoe-hd2"],
    "phase": "exchange",
}


def changed(**fields):
    return {"name": "mine", "experiments": [ENTRY | fields]}


@pytest.fixture
def simulate(moebench, tmp_path):
    """An experiments file as data and words of a command line -> exit status, stdout, stderr."""

    def call(data, *words):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
        return moebench("simulate", tmp_path / "mine.yaml", "--results", tmp_path / "runs", *words)

    return call


# --------------------------------------------------------------------------------------------------------- machines


def on(cluster, **fields):
    return experiment("flat").model_copy(update={"cluster": cluster, **fields})


def test_auto_takes_the_profile_then_what_was_published_then_the_data_sheet(tmp_path):
    assert Wanted().machine(on(presets.cluster("emulated-2x4"))).basis.startswith("profile of emulated-2x4, 20")
    assert Wanted().machine(on(presets.cluster("hiermoe"))).basis == "costs of hiermoe"
    sheet = Wanted().machine(on(presets.cluster("hecate-b")))
    assert sheet.basis == "data sheet of hecate-b, computation by rows per expert, ports"
    assert type(sheet.links) is Ports
    with pytest.raises(UserError, match="moebench profile emulated-2x4"):  # another ledger, in which it is not
        Wanted().machine(on(presets.cluster("emulated-2x4")), tmp_path)


def test_costs_without_a_product_price_exchanges_only():
    assert Wanted().machine(on(presets.cluster("fsmoe-a"), phase="layer")).basis == "costs of fsmoe-a"
    no_gemm = presets.cluster("fsmoe-a").model_copy(update={"gemm": None})
    assert Wanted().machine(on(no_gemm)).basis == "costs of fsmoe-a"
    assert Wanted().machine(on(no_gemm, phase="layer")).basis.startswith("data sheet of fsmoe-a")


def test_a_machine_is_what_was_asked_for():
    cluster = presets.cluster("hecate-b")
    machine = Wanted("data-sheet", 0.4, "shared-ports").machine(on(cluster))
    assert machine.basis == "data sheet of hecate-b, computation 40% of the peak, shared ports"
    assert type(machine.links) is SharedPorts
    assert fingerprint(machine) == fingerprint(Wanted("data-sheet", 0.4, "shared-ports").machine(on(cluster)))
    assert fingerprint(machine) != fingerprint(Wanted("data-sheet", 0.5, "shared-ports").machine(on(cluster)))
    faster = on(cluster.resized(8))
    assert fingerprint(machine) != fingerprint(Wanted("data-sheet", 0.4, "shared-ports").machine(faster))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--machine", "profilled"],
            "--machine: 'profilled': unknown; did you mean 'profiled'? known machines are auto",
        ),
        (["--links", "share-ports"], "--links: 'share-ports': unknown; did you mean 'shared-ports'?"),
        (["--efficiency", "40"], "--efficiency: 40.0: must be a share of the device's peak"),
        (["--efficiency", "nan"], "--efficiency: nan: must be a share"),
        (["--machine", "published", "--efficiency", "0.4"], "--efficiency: 0.4: is of a data sheet; add --machine"),
        (["--machine", "published"], "cluster own.collectives: {}: none is stated"),
        (
            ["--machine", "profiled"],
            "cluster: 'own': was never profiled; moebench profile CLUSTER.yaml, a file of this cluster",
        ),
        (["--name", "../x"], "--name: '../x': must be a word"),
    ],
)
def test_an_unknown_basis_or_one_that_the_cluster_lacks(simulate, tmp_path, words, message):
    status, out, err = simulate(changed(), *words)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "runs").exists()


def without(**fields):
    """The cluster with levels or fields changed; None: left out."""
    levels = [level | fields.pop(level["name"], {}) for level in CLUSTER["levels"]]
    found = CLUSTER | {"levels": [{k: v for k, v in level.items() if v is not None} for level in levels]} | fields
    return {k: v for k, v in found.items() if v is not None}


TRACE = {"generator": "trace", "params": {"path": "record-e64k8.parquet"}, "tokens_per_rank": 10**6}
RECORDED = ENTRY["model"] | {"num_experts": 64, "top_k": 8}


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"cluster": without(device_flops_per_s=None)}, ["cluster own.device_flops_per_s", "state its peak"]),
        (
            {"cluster": without(node={"bandwidth_bytes_per_s": None})},
            ["cluster own.levels.0.bandwidth_bytes_per_s", "level node has no rate; state that of one port"],
        ),
        ({"cluster": without(gpu={"bandwidth_bytes_per_s": None})}, ["cluster own.levels.1.bandwidth_bytes_per_s"]),
        (
            {"cluster": without(node={"size": 250_000})},
            [
                "cluster own.levels: '250000 x 4'",
                "1,000,000 ranks, and a plan holds 4,096 at most; make a level smaller",
            ],
        ),
        (
            {"cluster": without(node={"size": 3})},
            ["model.num_experts: 16", "not divisible by the 3 groups of link level 'node'; change one of the two"],
        ),
        (
            {"workload": TRACE, "model": RECORDED},
            [
                "workload own-trace-pathrecord-e64k8.parquet-1000000-",
                ".tokens_per_rank: 1000000",
                "the trace record-e64k8.parquet has",
                "or record more",
            ],
        ),
        (
            {"workload": {"tokens_per_rank": 10**12}},
            [
                "workload.tokens_per_rank: 1000000000000",
                "expert choices in a layer, and at most 268,435,456 are planned",
            ],
        ),
        ({"model": ENTRY["model"] | {"num_layers": 10**9}}, ["model.num_layers: 1000000000", "layers of a step"]),
        ({"model": ENTRY["model"] | {"num_experts": 1 << 30}}, ["model.num_experts: 1073741824", "ranks by experts"]),
        ({"cluster": "emulated-2x5"}, ["did you mean 'emulated-2x4'?"]),
        ({"cluster": "own.yaml"}, ["own.yaml': cannot be read (no such file)"]),
        ({"workload": "zipf-44"}, ["did you mean 'zipf-4'?"]),
    ],
)
def test_bad_input_is_one_line_within_seconds(simulate, tmp_path, fields, messages):
    began = time.monotonic()
    status, out, err = simulate(changed(**fields))
    assert time.monotonic() - began < 10
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert all(each in err for each in messages), err
    assert not (tmp_path / "runs").exists()


def test_a_million_ranks_are_too_many_everywhere(tmp_path):
    from harness import checks, placing, profiling

    many = presets.cluster("local-8").resized(250_000)
    for refuse in (
        lambda: placing.bandwidths(many),
        lambda: profiling.parts(many),
        lambda: checks.check_systems(["flat"], many, {}, print),
        lambda: suite.from_data(changed(cluster=many.model_dump(mode="json")), "mine.yaml"),
    ):
        with pytest.raises(UserError, match=r"1,000,000 ranks, and a plan holds 4,096 at most"):
            refuse()


@pytest.mark.parametrize("phase", ["layer", "train_step", "prefill"])
def test_what_no_rank_can_hold_is_refused_with_the_arithmetic(phase):
    small = CLUSTER | {"device_memory_bytes": 10_000}
    data = changed(phase=phase, cluster=small, system=["flat", "megatron"])
    for each in suite.from_data(data, "mine.yaml", physical=True).experiments:
        said = simulating.refusal(each)
        assert said is not None
        assert "GB" in said
        assert "use at least" in said or "take more ranks or a smaller model" in said


def test_what_fits_nowhere_is_told_once(simulate):
    tiny = CLUSTER | {"device_memory_bytes": 10_000}
    status, out, err = simulate(changed(phase="train_step", cluster=tiny, system=["flat", "hiermoe-hd2"]))
    assert status == 1  # none is ok
    (line,) = [line for line in (out + err).splitlines() if "GB" in line]
    assert line.startswith("refused: flat, hiermoe-hd2, train_step of own-m64-h64-e16k2-l2-")


# ------------------------------------------------------------------------------------------------------- the store


@pytest.fixture
def judge(monkeypatch):
    """The answers of a judge that is not asked here; counts the questions."""
    asked = []

    def answer(experiment, machine, steps, warm, progress):
        asked.append(experiment.system)
        return dataclasses.replace(said(1.0, steps), basis=machine.basis)

    monkeypatch.setattr(simulating, "judged", answer)
    return asked


@pytest.fixture
def mine(tmp_path):
    return suite.from_data(changed(), "mine.yaml", physical=True), tmp_path / "mine-sim"


def test_rows_are_as_of_any_run_and_say_what_they_rest_on(mine, judge):
    chosen, folder = mine
    counts = simulating.simulate_suite(chosen, folder, Wanted(), steps=3, show_progress=False)
    assert counts == {"ok": 2}
    rows = Store(folder).read(damaged="raise")
    assert set(rows["evidence"]) == {"simulated"}
    assert set(rows["network"]) == {"modelled"}
    assert set(rows["basis"]) == {"data sheet of own, computation by rows per expert, ports"}
    assert rows["heldout_error"].isna().all()
    times = rows[rows["metric"] == "time_s"]
    assert set(times["direction"]) == {"forward", "backward", "total"}
    assert sorted(times[times["direction"] == "total"]["rep"]) == [0, 0, 1, 1, 2, 2]
    assert {"max_over_mean", "bytes_planned", "speed_of_light_s", "note"} <= set(rows["metric"])
    (record,) = Store(folder).records().values()
    assert record["evidence"] == "simulated"
    assert set(record["experiments"]) == {each.digest for each in chosen.experiments}
    assert simulating.times(folder, list(record["experiments"]))[0]["time_s"] == pytest.approx(1.1)


def test_a_second_call_keeps_what_is_finished_and_another_machine_is_another_run(mine, judge):
    chosen, folder = mine
    simulating.simulate_suite(chosen, folder, Wanted(), show_progress=False)
    simulating.simulate_suite(chosen, folder, Wanted(), show_progress=False)
    assert judge == ["flat", "hiermoe-hd2"]
    for other in ({"steps": 2}, {"warm": 2}, {"wanted": Wanted("data-sheet", 0.4)}):
        with pytest.raises(UserError, match=r"another machine or of other steps .*; take another --name, or --fresh"):
            simulating.simulate_suite(chosen, folder, show_progress=False, **{"wanted": Wanted(), **other})
    simulating.simulate_suite(chosen, folder, Wanted(), steps=2, fresh=True, show_progress=False)
    assert len(judge) == 4
    assert len(list(folder.parent.glob("mine-sim*"))) == 2


def test_planners_see_the_warm_up_that_a_run_of_the_file_has(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(simulating, "judged", lambda each, machine, steps, warm, say: seen.append(warm) or said(1.0))
    chosen = suite.from_data(changed(warmup=5), "mine.yaml", physical=True)
    simulating.simulate_suite(chosen, tmp_path / "a-sim", Wanted(), show_progress=False)
    simulating.simulate_suite(chosen, tmp_path / "b-sim", Wanted(), warm=0, show_progress=False)
    assert seen == [5, 5, 0, 0]


def test_a_name_is_of_a_run_or_of_a_simulation(mine, judge):
    chosen, folder = mine
    executed = folder.with_name("mine")
    store = Store(executed)
    store.prepare()
    store.write_record("launch-0", {"evidence": "emulated"})
    with pytest.raises(UserError, match=r"run: 'mine': holds a run that was executed, .* take another --name"):
        simulating.simulate_suite(chosen, executed, Wanted(), show_progress=False)
    simulating.simulate_suite(chosen, folder, Wanted(), show_progress=False)
    local = suite.from_data(changed(cluster="local-2"), "mine.yaml")
    with pytest.raises(UserError, match=r"run: 'mine-sim': holds a simulation, .* take another --name"):
        run.run_suite(local, folder, show_progress=False)


def test_a_cell_without_a_machine_is_a_row_and_the_others_are_priced(mine, judge):
    _, folder = mine
    data = changed(cluster=[CLUSTER, without(name="bare", device_flops_per_s=None)])
    chosen = suite.from_data(data, "mine.yaml", physical=True)
    assert simulating.simulate_suite(chosen, folder, Wanted(), show_progress=False) == {"ok": 2, "failed": 2}
    rows = Store(folder).read()
    (reason,) = set(rows[rows["status"] == "failed"]["reason"])
    assert reason.startswith("cluster bare.device_flops_per_s: None: the device has no rate")
    assert set(rows[rows["status"] == "failed"]["evidence"]) == {"simulated"}


def test_the_command_prints_json_alone_and_the_shortest_first(simulate, tmp_path, monkeypatch):
    def answer(experiment, machine, steps, warm, progress):
        return said({"flat": 2.0, "hiermoe-hd2": 1.0}[experiment.system], steps)

    monkeypatch.setattr(simulating, "judged", answer)
    status, out, _ = simulate(changed(), "--json")
    found = json.loads(out)
    assert status == 0
    assert found["run"] == str(tmp_path / "runs" / "mine-sim")
    assert found["cells"] == {"ok": 2}
    assert [row["system"] for row in found["times"]] == ["hiermoe-hd2", "flat"]
    assert {row["evidence"] for row in found["times"]} == {"simulated"}
    status, out, err = simulate(changed())
    assert status == 0
    assert "exchange of own-m64-h64-e16k2-l2-" in out
    assert ", on own: simulated, profile of emulated-2x4" in out
    assert "unknown" in out
    assert "is simulated already" in err


def test_one_system_with_two_options_has_two_names(simulate, moebench, tmp_path, monkeypatch):
    monkeypatch.setattr(simulating, "judged", lambda experiment, machine, steps, warm, progress: said(12.0, steps))
    many = changed(cluster="emulated-2x4", system=["hiermoe-hd2", {"name": "hiermoe-hd2", "options": {"chunks": 4}}])
    status, out, _ = simulate(many)
    assert status == 0
    assert "12,000" in out
    assert "hiermoe-hd2 (chunks=4)" in out
    _, out, _ = moebench("run", tmp_path / "mine.yaml", "--dry-run")
    assert "hiermoe-hd2 (chunks=4)" in out


def test_the_judge_itself_fills_a_folder(simulate, tmp_path):
    """Of two phases, by a profile; a system whose bytes nobody can plan is refused, one that cannot be priced fails."""
    data = changed(cluster="emulated-2x4", phase=["exchange", "train_step"], system=["flat", "hiermoe-hd2", "megatron"])
    status, out, err = simulate(data, "--json", "--steps", "2", "--warm", "1")
    found = json.loads(out)
    assert status == 0, err
    assert set(found["cells"]) <= {"ok", "refused"}
    times = {(row["phase"], row["system"]): row["time_s"] for row in found["times"]}
    assert 0 < times["exchange", "flat"] < times["train_step", "flat"] < 1
    rows = Store(tmp_path / "runs" / "mine-sim").read()
    steps = rows[(rows["metric"] == "time_s") & (rows["phase"] == "train_step") & (rows["system"] == "flat")]
    assert list(steps["direction"]) == ["total"] * 2
    assert set(rows["basis"].dropna()) == {
        f"profile of emulated-2x4, {_date()}; extrapolated: nothing of this shape has run"
    }
    traces = Store(tmp_path / "runs" / "mine-sim").trace(steps["cell"].iloc[0])
    assert all(each.start_s.shape[1] == 8 for each in traces.values())
    assert traces


def _date():
    return ledger.profiled(presets.cluster("emulated-2x4")).date[:10]


# ------------------------------------------------------------------------------------------------------ the example


def test_the_example_is_every_native_system_on_64_h100():
    folder = Path(__file__).resolve().parents[1] / "examples"
    chosen = suite.load(folder / "qwen3-235b-a22b.yaml", physical=True)
    (race,) = chosen.races
    model, cluster = race.first.model, race.first.cluster
    assert (model.num_layers, model.num_experts, model.top_k) == (94, 128, 8)
    assert (cluster.num_ranks, cluster.device) == (64, "H100 80GB HBM3")
    assert (race.first.phase, race.first.workload.name, race.first.workload.tokens_per_rank) == (
        *("train_step", "zipf-4", 2048),
    )
    known, named = systems(), {each.system for each in race.experiments}
    assert named >= {name for name, each in known.items() if each.kind == "native"}
    assert {name for name in named if known[name].kind == "package"} == {
        *("megatron", "megatron-allgather", "megatron-deepep", "megatron-hybridep", "torchtitan"),
    }
    assert Wanted().machine(race.first).basis == "data sheet of h100-8x8, computation by rows per expert, ports"


def test_the_larger_example_is_five_systems_on_256_h100(monkeypatch):
    monkeypatch.setattr(told, "_draw", lambda *of: None)  # 4 million choices
    folder = Path(__file__).resolve().parents[1] / "examples"
    (race,) = suite.load(folder / "deepseek-v3.yaml", physical=True).races
    model, cluster = race.first.model, race.first.cluster
    assert (model.num_layers, model.num_experts, model.top_k, model.topk_groups) == (61, 256, 8, 4)
    assert (cluster.num_ranks, len(race.experiments)) == (256, 5)
    assert Wanted().machine(race.first).basis == "data sheet of h100-32x8, computation by rows per expert, ports"
