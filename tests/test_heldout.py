"""The ledger of errors: what is fitted has no part in it, what cores decided is counted, and tau is over pairs that are
really different. The run is a few rows and traces; what is simulated is real."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness import heldout, ledger, presets
from harness.bench.store import BLANK, SCHEMA_VERSION, Store, identity
from harness.errors import UserError
from harness.plan.host import LINKS
from harness.simulation import Simulation, simulate
from harness.specs import Experiment
from tests.test_ledger import calibration

#: how much slower than its simulation without host time a cell ran
SLOWER = {("flat", 1): 1.5, ("flat", 2): 1.4, ("fsdp-experts", 1): 1.3, ("fsdp-experts", 2): 1.45, ("eplb", 1): 1.2}


def experiment(system: str, seed: int) -> Experiment:
    workload = {"name": f"w{seed}", "tokens_per_rank": 64, "generator": "zipf", "params": {"target": 1.5}, "seed": seed}
    fields = {"model": presets.model("gpt-tiny-moe"), "cluster": presets.cluster("emulated-2x4"), "workload": workload}
    return Experiment.model_validate(fields | {"system": system, "phase": "exchange", "dtype": "float32"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with a calibration of the cluster."""
    made = tmp_path_factory.mktemp("ledger")
    ledger.record(calibration("emulated-2x4"), made)
    return made


@functools.cache
def plain(system: str, seed: int, folder: Path) -> Simulation:
    cell = experiment(system, seed)
    return simulate(cell, heldout.machine_of(cell, folder))


def stored(
    path: Path,
    folder: Path,
    bound: tuple[tuple[str, int], ...] = (),
    slower: dict[tuple[str, int], float] = SLOWER,
    launch: int = 0,
) -> Path:
    """A run of those cells, ``bound`` ones ``cpu_bound``; traces of all but eplb's."""
    store = Store(path)
    store.prepare()
    rows: list[dict[str, Any]] = []
    for (system, seed), factor in slower.items():
        cell, found = experiment(system, seed), plain(system, seed, folder)
        status = "cpu_bound" if (system, seed) in bound else "ok"
        base = BLANK | identity(cell) | {"run": path.name, "launch": launch, "cell": cell.digest, "metric": "time_s"}
        base |= {"evidence": "emulated", "network": "shaped", "unit": "s", "status": status, "rank": -1}
        base |= {"direction": "total", "time_utc": "2026-01-01T00:00:00", "schema_version": SCHEMA_VERSION}
        time_s = factor * heldout._total(found.samples)
        rows += [base | {"rep": rep, "value": time_s * (1 + 0.001 * (rep - 1))} for rep in range(3)]
        if system != "eplb":
            longer = {
                name: dataclasses.replace(line, start_s=factor * line.start_s, end_s=factor * line.end_s)
                for name, line in found.timelines.items()
            }
            store.write_trace(cell.digest, longer)
    store.append(pd.DataFrame(rows))
    cells = [experiment(*each) for each in slower]
    record = {"evidence": "emulated", "experiments": {cell.digest: cell.model_dump(mode="json") for cell in cells}}
    store.write_record(str(launch), record)
    return path


def test_what_is_fitted_is_not_tested_and_what_cores_decided_is_counted(tmp_path: Path, folder: Path) -> None:
    (_, fit), (_, left) = sorted((experiment("flat", seed).digest, seed) for seed in (1, 2))  # which digest is first
    (_, own), (_, busy) = sorted((experiment("fsdp-experts", seed).digest, seed) for seed in (1, 2))
    run = stored(tmp_path / "one", folder, bound=(("fsdp-experts", busy),))
    rows = heldout.take_in(run, folder).set_index(["system", "workload"])
    assert rows["role"].to_dict() == {
        ("flat", f"w{fit}"): "fitted",
        ("flat", f"w{left}"): "tested",
        ("fsdp-experts", f"w{own}"): "fitted",
        ("fsdp-experts", f"w{busy}"): "tested",
        ("eplb", "w1"): "tested",  # of one routing alone: by flat's host time
    }
    error = rows["predicted_s"] / rows["measured_s"] - 1
    assert error[("flat", f"w{fit}")] == pytest.approx(0, abs=0.02)
    assert error[("flat", f"w{left}")] == pytest.approx(SLOWER["flat", fit] / SLOWER["flat", left] - 1, abs=0.05)
    table = heldout.summary(heldout.read(folder)).set_index(["phase", "system"])
    of_all = table.loc[("all", "all")]
    assert (of_all["tested"], of_all["cpu_bound"]) == (2, 1)
    tested = error[[("flat", f"w{left}"), ("eplb", "w1")]]
    assert of_all["mean"] == pytest.approx(tested.abs().mean(), rel=1e-3)
    assert of_all["largest"] == pytest.approx(tested.abs().max(), rel=1e-3)
    assert of_all["bias"] == pytest.approx(tested.mean(), rel=1e-3)
    of_busy = table.loc[("exchange", "fsdp-experts")]
    assert (of_busy["tested"], of_busy["cpu_bound"]) == (0, 1)
    assert pd.isna(of_busy["mean"])

    cell = experiment("flat", fit)
    machine, known = heldout.known(cell, heldout.machine_of(cell, folder), folder)
    assert known == pytest.approx(abs(error[("flat", f"w{left}")]), rel=1e-3)
    assert machine.basis.endswith("; host time of one")
    measured = rows["measured_s"][("flat", f"w{fit}")]
    assert heldout._total(simulate(cell, machine).samples) == pytest.approx(measured, rel=0.02)
    other = cell.model_copy(update={"dtype": "bfloat16"})
    assert "extrapolated" in heldout.known(other, heldout.machine_of(other, folder), folder)[0].basis


def test_the_ledger_is_tried_before_anything_is_simulated(tmp_path: Path, folder: Path, monkeypatch) -> None:
    run = stored(tmp_path / "one", folder, slower={("flat", 1): 1.5})
    own = tmp_path / "ledger"
    shutil.copytree(folder, own)
    (own / heldout.HOSTS).unlink(missing_ok=True)
    (own / heldout.HOSTS).mkdir()
    monkeypatch.setattr(heldout, "compared", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match=heldout.HOSTS):
        heldout.take_in(run, own)


def test_rows_of_a_run_that_comes_again_replace_its_old_ones(tmp_path: Path, folder: Path) -> None:
    own = tmp_path / "ledger"
    shutil.copytree(folder, own)
    (own / heldout.ERRORS).unlink(missing_ok=True)
    few = {cell: factor for cell, factor in SLOWER.items() if cell[0] == "flat"}
    heldout.take_in(stored(tmp_path / "one", folder, slower=few), own)
    heldout.take_in(stored(tmp_path / "two", folder, slower=few), own)
    before = heldout.read(own)
    assert list(before["run"]) == ["one", "one", "two", "two"]
    shutil.rmtree(tmp_path / "one")
    heldout.take_in(stored(tmp_path / "one", folder, slower={cell: 2 * factor for cell, factor in few.items()}), own)
    after = heldout.read(own)
    assert list(after["run"]) == ["two", "two", "one", "one"]
    assert list(after["measured_s"][2:]) == pytest.approx(list(2 * before["measured_s"][:2]), rel=1e-4)
    assert {each["run"] for each in heldout.read_hosts(own).values()} == {"one"}


def test_the_steps_that_were_timed_are_simulated(tmp_path: Path, folder: Path) -> None:
    """A training's copies are known from its first step on, which is not among them, nor a layer's first pass."""
    fields = {"system": "hecate", "cluster": presets.cluster("emulated-2x4-balanced"), "compute": "stand-in"}
    model = {"name": "m", "num_layers": 1, "hidden": 64, "ffn": 64, "num_experts": 16, "top_k": 2, "seq": 64}
    changes = fields | {"model": {**model, "num_heads": 4, "vocab": 64}, "dtype": "bfloat16"}
    training, layer = (
        Experiment.model_validate(experiment("flat", 1).model_dump() | changes | {"phase": phase})
        for phase in ("train_step", "layer")
    )
    store = Store(tmp_path / "run")
    store.prepare()
    base = BLANK | identity(training) | {"run": "run", "launch": 0, "cell": training.digest, "metric": "time_s"}
    base |= {"evidence": "emulated", "network": "shaped", "unit": "s", "status": "ok", "rank": -1, "value": 1.0}
    base |= {"direction": "total", "time_utc": "2026-01-01T00:00:00", "schema_version": SCHEMA_VERSION}
    store.append(pd.DataFrame([base | {"rep": rep} for rep in range(3)]))
    experiments = {training.digest: training.model_dump(mode="json")}
    store.write_record("0", {"evidence": "emulated", "experiments": experiments, "warmup": {training.race: 2}})
    (cell,) = heldout.cells_of(tmp_path / "run")
    assert (cell.warm, cell.steps) == (2, 3)
    machine = heldout.machine_of(training, ledger.LEDGER)
    (timeline,) = cell.simulated(machine).timelines.values()
    assert len(cell.simulated(machine).samples["total"]) == 3
    (first,) = simulate(training, machine).timelines.values()
    copies = [{task.kind for task in each.plan.tasks} & {"gather", "regather"} for each in (first, timeline)]
    assert copies[0] == set()
    assert copies[1]
    assert any(task.kind == "gather" for task in simulate(layer, machine).timelines["forward"].plan.tasks)


def test_what_no_trace_has_is_a_share_of_what_goes_over_links(tmp_path: Path, folder: Path) -> None:
    """Of a cell that ran 40 ms longer, of which its gate took 10: seconds of the gate, and for the rest a share."""
    cell = experiment("flat", 1)
    machine, found = heldout.machine_of(cell, folder), plain("flat", 1, folder)
    lines = {name: dataclasses.replace(line, end_s=line.end_s.copy()) for name, line in found.timelines.items()}
    lines["forward"].end_s[lines["forward"].plan.index["forward.gate"]] += 0.01
    took = heldout._total(found.samples)
    estimate = heldout.stats.Estimate(took + 0.04, took, took, 0, 1)
    host = heldout.fitted(heldout.Cell(cell, "ok", estimate, lines), folder)
    assert host.pop("forward.gate") == pytest.approx(0.01)
    assert host.pop(LINKS) == pytest.approx(0.03 / took, rel=0.01)
    assert not host
    slower = dataclasses.replace(machine, host={LINKS: 0.5})
    assert heldout._total(simulate(cell, slower).samples) == pytest.approx(1.5 * took)
    package = experiment("deepspeed", 1)
    took = heldout._total(simulate(package, machine).samples)
    estimate = heldout.stats.Estimate(1.2 * took, took, took, 0, 1)
    assert heldout.fitted(heldout.Cell(package, "ok", estimate, {}), folder) == {LINKS: pytest.approx(0.2, rel=0.01)}


def test_both_files_are_read_once(tmp_path: Path, folder: Path, monkeypatch) -> None:
    own = tmp_path / "ledger"
    shutil.copytree(folder, own)
    heldout.take_in(stored(tmp_path / "one", folder, slower={("flat", 1): 1.5, ("flat", 2): 1.4}), own)
    cell, reads = experiment("flat", 1), []
    monkeypatch.setattr(heldout.pd, "read_csv", lambda *a, read=pd.read_csv, **b: reads.append(a) or read(*a, **b))
    found = [heldout.known(cell, heldout.machine_of(cell, own), own)[1] for _ in range(3)]
    assert len(reads) == 1
    assert found[0] == found[2]
    text = (own / heldout.ERRORS).read_text()
    (own / heldout.ERRORS).write_text(text.replace("tested,", "fitted,"))  # nothing is tested now
    assert heldout.known(cell, heldout.machine_of(cell, own), own)[1] is None


def test_planners_are_told_of_the_machine_that_is_simulated(tmp_path: Path, folder: Path) -> None:
    cell = experiment("hiermoe", 1)
    given = calibration("emulated-2x4", fits={})
    assert ledger.told(cell.cluster) == ledger.latest(cell.cluster)
    with ledger.telling(given):
        assert ledger.told(cell.cluster) is given
        assert ledger.told(presets.cluster("emulated-4x2")) == ledger.latest(presets.cluster("emulated-4x2"))
    assert ledger.told(cell.cluster) == ledger.latest(cell.cluster)
    # stages inside nodes as good as free and flat ones dear: HierMoE takes two stages, and one the other way round
    taken = []
    for slow in ("flat", "node"):
        own = tmp_path / slow
        fits = {
            key: fit.model_copy(update={"beta_s_per_byte": 1e-3 if slow in key else 1e-12})
            for key, fit in calibration().fits.items()
        }
        ledger.record(calibration(fits=fits), own)
        plan = simulate(cell, heldout.machine_of(cell, own)).timelines["forward"].plan
        taken.append({task.lane for task in plan.tasks if task.kind == "dispatch" and task.cost is not None})
    assert taken == [{"inter", "intra"}, {"inter"}]


def test_tau_is_over_pairs_that_are_really_different() -> None:
    def cell(race: str, measured: float, width: float, predicted: float) -> dict[str, Any]:
        low, high = measured - width, measured + width
        return {"race": race, "measured_s": measured, "low_s": low, "high_s": high, "predicted_s": predicted}

    race = [cell("a", 1.0, 0.1, 2.0), cell("a", 2.0, 0.1, 3.0), cell("a", 2.1, 0.1, 1.0)]  # the last two overlap
    assert heldout.ordered(pd.DataFrame(race)) == (0.0, 2)  # one pair as it ran, one the other way round
    race += [cell("b", 9.0, 0.1, 1.0)]  # of another race: no pair
    assert heldout.ordered(pd.DataFrame(race)) == (0.0, 2)
    race += [cell("b", 8.0, 0.1, 0.5)]
    assert heldout.ordered(pd.DataFrame(race)) == (pytest.approx(1 / 3), 3)
    tau, pairs = heldout.ordered(pd.DataFrame(race[1:3]))
    assert (pairs, tau != tau) == (0, True)


HEAD = "run,machine,role,status,phase,system,race,measured_s,low_s,high_s,predicted_s"
LINE = "one,here,tested,ok,layer,flat,a,1.0,0.9,1.1,1.2"


def test_the_least_that_a_ledger_holds(tmp_path: Path) -> None:
    (tmp_path / heldout.ERRORS).write_text(f"{HEAD}\n{LINE}\n")
    assert heldout.summary(heldout.read(tmp_path))["bias"][0] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (heldout.ERRORS, ""),
        (heldout.ERRORS, "run,machine\n1,2\n"),
        (heldout.ERRORS, 'run,"machine\n'),
        (heldout.ERRORS, b"\xff\xfe\x00"),
        (heldout.ERRORS, f"{HEAD}\n{LINE.replace('1.0', 'soon')}\n"),
        (heldout.ERRORS, f"{HEAD}\n{LINE.replace('1.0', 'nan')}\n"),
        (heldout.ERRORS, f"{HEAD}\n{LINE.replace('1.0', '')}\n"),
        (heldout.ERRORS, f"{HEAD}\n{LINE.replace('1.0', '-1.0')}\n"),
        (heldout.HOSTS, "{"),
        (heldout.HOSTS, "[]"),
        (heldout.HOSTS, '{"a": {"seconds": 1}}'),
        (heldout.HOSTS, '{"a": {"run": "x", "seconds": {"t": "long"}}}'),
        (heldout.HOSTS, '{"a": {"run": "x", "seconds": {"t": -1.0}}}'),
        (heldout.HOSTS, '{"a": {"run": "x", "seconds": {"t": NaN}}}'),
        (heldout.HOSTS, '{"a": {"seconds": {"t": 1.0}}}'),
        (heldout.HOSTS, b"\xff\xfe"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, folder: Path, name: str, text: str | bytes) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"{name}'?: is damaged \(.*restore it or move it away") as raised:
        heldout.read(tmp_path) if name == heldout.ERRORS else heldout.read_hosts(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_run_without_cells_that_can_be_compared(tmp_path: Path, folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Store(tmp_path / "empty").prepare()
    with pytest.raises(UserError, match="has no timed cell on a profiled cluster"):
        heldout.take_in(tmp_path / "empty", folder)
    assert heldout.main(["empty"]) == 2
    assert capsys.readouterr().err.startswith("heldout: run: 'empty': has no timed cell")
    monkeypatch.setattr(ledger, "SHIPPED", tmp_path / "nothing")
    assert heldout.main([]) == 2
    assert capsys.readouterr().err.startswith("heldout: ledger of errors: empty")
    assert heldout.main(["never-made"]) == 2
    assert "run: 'never-made': no such folder" in capsys.readouterr().err
    assert heldout.main(["--help"]) == 0
    assert "take a run in first" in capsys.readouterr().out


def test_a_part_of_a_run_that_comes_again_replaces_its_own_cells_alone(tmp_path: Path, folder: Path) -> None:
    mine = tmp_path / "ledger"
    shutil.copytree(folder, mine)
    first = heldout.take_in(stored(tmp_path / "one" / "part", folder), mine)
    again = {("flat", 1): 1.6, ("flat", 2): 1.5}
    heldout.take_in(stored(tmp_path / "two" / "part", folder, slower=again), mine)
    rows = heldout.read(mine).query("run == 'part'").set_index(["system", "workload"])["measured_s"]
    before = first.set_index(["system", "workload"])["measured_s"]
    assert len(rows) == len(before)
    assert rows["eplb", "w1"] == pytest.approx(before["eplb", "w1"], rel=1e-4)
    assert rows["flat", "w1"] == pytest.approx(before["flat", "w1"] * 1.6 / 1.5, rel=0.01)


def test_what_ships_stands_behind_what_ran_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped, hosts = heldout.read(ledger.SHIPPED), heldout.read_hosts(ledger.SHIPPED)
    rows, known = heldout.read_all()
    assert (len(rows), known) == (len(shipped), hosts)
    own = shipped.iloc[:1].assign(measured_s=1.0)
    Path("results/ledger").mkdir(parents=True)
    own.to_csv("results/ledger/_errors.csv", index=False)
    rows, known = heldout.read_all()
    assert (len(rows), known) == (len(shipped), hosts)
    assert (rows["measured_s"] == 1.0).sum() == 1
