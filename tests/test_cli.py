"""The command line: JSON alone on stdout, one line and status 2 for bad input, status 1 for a failed check."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import cli, presets, profiling
from harness.bench import layer_cost
from harness.registry import systems
from tests.bench import systems as bad_systems


def test_help_answers_fast_and_without_torch():
    script = "import sys, harness.cli; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL).returncode == 0


def test_python_m_harness_is_the_same_thing():
    done = subprocess.run(
        [sys.executable, "-m", "harness", "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stdout) == (0, "0.1.0\n")


@pytest.mark.parametrize(
    "command",
    ["doctor", "list", "check", "record", "profile", "run", "report", "sweep", "status", "resume", "cancel", "regress"],
)
def test_every_help_teaches_by_example(moebench, command):
    status, out, _ = moebench(command, "--help")
    assert status == 0
    assert f"moebench {command} " in out or f"moebench {command}\n" in out


@pytest.mark.parametrize("kind", ["models", "clusters", "workloads"])
def test_list_presets_as_json(moebench, kind):
    status, out, err = moebench("list", kind, "--json")
    rows = json.loads(out)
    assert status == 0
    assert err == ""
    assert [row["name"] for row in rows] == presets.names(kind)
    assert all(len(row["digest"]) == 16 for row in rows)


def test_list_systems_as_json_names_real_and_native_ones(moebench):
    status, out, err = moebench("list", "systems", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0
    assert err == ""
    assert set(rows) == set(systems())
    assert {"megatron", "deepspeed", "tutel", "flat", "hiermoe-hd2"} <= set(rows)
    assert rows["megatron"]["kind"] == "package"
    assert rows["flat"]["kind"] == "native"


def test_list_everything_as_tables(moebench):
    status, out, _ = moebench("list")
    assert status == 0
    assert all(name in out for name in ("hiermoe-hd2", "qwen3-30b-a3b", "emulated-2x2x2", "zipf-8"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["list", "nonsense"],
            "kind: 'nonsense': unknown; known kinds are systems, slots, models, clusters, workloads, suites",
        ),
        (["check", "fla"], "system: 'fla': unknown; did you mean 'flat'?"),
        (["check"], "name systems, or give --all"),
        (["check", "flat", "--all"], "name systems, or give --all, and not both"),
        (["check", "flat", "--ranks", "0"], "--ranks: 0: must be at least 1"),
        (
            ["check", "flat", "--dtype", "float8"],
            "--dtype: 'float8': must be one of float64, float32, bfloat16, float16",
        ),
        (["check", "flat", "--exchange-dtype", "fp8"], "--exchange-dtype: 'fp8': must be one of float8_e4m3, bfloat16"),
        (
            ["check", "flat", "--exchange-dtype", "float8_e4m3", "--dtype", "float64"],
            "--dtype: 'float64': its rows do not travel as float8_e4m3; leave one out",
        ),
        (["check", "flat", "--cluster", "emulated-2x5"], "did you mean 'emulated-2x4'?"),
        (["check", "flat", "--cluster", "fsmoe-a"], "fsmoe-a"),
        (["record", "--out", "x.parquet", "--model", "record-e16k3"], "did you mean 'record-e16k2'?"),
        (["record", "--out", "x.parquet", "--tokens", "7"], "--tokens: 7: "),
        (["record", "--out", "x.parquet", "--text", "t.txt"], "--text: 't.txt': is for --checkpoint"),
        (["record", "--out", "x.parquet", "--no-by-layer"], "--by-layer: False: is for --checkpoint"),
        (["record", "--out", "x.parquet", "--checkpoint", "c", "--at", "3"], "--at: ['3']: is for a training"),
        (
            ["record", "--out", "x.parquet", "--steps", "9", "--at", "2-10"],
            "--at: '2-10': must be a step of 0 to 9, or a span",
        ),
        (["record", "--out", "x.parquet", "--at", "3-"], "--at: '3-': must be a step of 0 to 600"),
        (["run"], "give one YAML file, or --suite NAME"),
        (["run", "--suite", "quik"], "did you mean 'quick'?"),
        (["run", "absent.yaml"], "absent.yaml"),
        (["run", "--suite", "quick", "--name", "../mine"], "--name: '../mine': must be a word"),
        (["sweep", "smoke", "--on", "local", "--name", "../mine"], "--name: '../mine': must be a word"),
        (["report", "summary", "--run", "never-made"], "never-made"),
        (["report", "summary", "-p", "baseline"], "--param: 'baseline': write KEY=VALUE"),
        (["profile", "emulated-2x5"], "did you mean 'emulated-2x4'?"),
        (["profile", "emulated-2x4", "--nodes", "2"], "--nodes: 2: is for --on slurm"),
        (["profile", "example-gpu", "--on", "lsf"], "--on: 'lsf': must be local or slurm"),
        (["profile", "example-gpu", "--on", "slurm", "--nodes", "99"], "--nodes: 99: must be 1 to 16"),
        (["sweep", "smok", "--on", "local"], "sweep: 'smok': unknown; did you mean 'smoke'?"),
        (["sweep", "smoke", "--on", "lsf"], "--on: 'lsf': must be local or slurm"),
        (["status", "never-made"], "there is none; known sweeps are none yet"),
        (["regress", "--base", "no-such-revision"], "is neither a folder nor a revision"),
        (["regress", "--suite", "quik"], "did you mean 'quick'?"),
        (["rnu"], "'rnu'. Did you mean 'run'? (moebench --help)"),
        (["run", "--siute", "quick"], "No such option: --siute"),
        (["run", "--suite", "quick", "--launches", "0"], "'--launches'"),
        (["run", "--suite", "quick", "mine.yaml"], "give one YAML file, or --suite NAME, and not both"),
        (["record"], "Missing option '--out' (moebench record --help)"),
        (["doctor", "--json", "true"], "extra argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(moebench, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = moebench(*words)
    assert status == 2
    assert out == ""
    *progress, last = err.strip().splitlines()
    assert last.startswith("moebench: ")
    assert message in last
    assert not any("Traceback" in line for line in progress)
    assert not list(tmp_path.glob("*.parquet"))


def test_a_bad_experiment_names_the_file_and_the_field(moebench, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nexperiments:\n- {cluster: local-2, workload: balanced-512, system: flat, phase: layer,\n"
        "   model: {num_layers: 1, hidden: 8, ffn: 8, num_experts: 4, top_k: 5}}\n"
    )
    status, _, err = moebench("run", file)
    assert status == 2
    assert str(file) in err
    assert "top_k = 5 is larger than num_experts = 4" in err


def test_an_interrupt_is_one_line_and_status_130(moebench, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.doctor.examine", interrupted)
    status, out, err = moebench("doctor")
    assert (status, out, err) == (130, "", "moebench: interrupted; finished cells are kept\n")


def bad_day(*_: object, **__: object) -> object:
    raise RuntimeError("bad day")


PLACE = ["place", "--model", "record-e16k2", "--trace", "t.parquet", "--cluster", "local-4", "--out", "p.json"]


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["doctor"], "harness.doctor.examine"),
        (["list", "models"], "harness.presets.names"),
        (["check", "flat"], "harness.checks.check_systems"),
        (["record", "--out", "t.parquet"], "harness.routing.record.record"),
        (PLACE, "harness.placing.place"),
        (["profile", "local-4"], "harness.profiling.profile"),
        (["study", "fsmoe-grid"], "harness.studies.study"),
        (["simulate", "--suite", "quick"], "harness.simulating.simulate_suite"),
        (["run", "--suite", "quick"], "harness.bench.run.run_suite"),
        (["report"], "harness.report.notebooks"),
        (["sweep", "smoke", "--on", "local"], "harness.sweep.submit.submit"),
        *(([each, "mine"], "harness.sweep.states.Sweep.attach") for each in ("status", "resume", "cancel")),
        (["regress"], "harness.regress.run.check_suite"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_error_that_nobody_foresaw_is_a_line_and_a_log(moebench, monkeypatch, tmp_path, words, where):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(where, bad_day)
    status, out, err = moebench(*words)
    assert (status, out) == (1, "")
    assert "Traceback" not in err
    said = rf"moebench: RuntimeError: bad day, at tests/test_cli.py:{bad_day.__code__.co_firstlineno + 1} in bad_day"
    log = re.fullmatch(rf"{said} \(log: (.*)\)", err.splitlines()[-1])
    assert log
    text = Path(log[1]).read_text()
    assert text.startswith(f"moebench {words[0]}")
    assert text.endswith("RuntimeError: bad day\n")
    assert "in main" in text
    shutil.rmtree(Path(log[1]).parent)


def test_a_bad_day_of_one_rank_is_the_last_line_of_a_profile(moebench, monkeypatch, tmp_path):
    """As in a race; there are no rows here."""
    monkeypatch.setitem(systems(), bad_systems.BadDay.name, bad_systems.BadDay)
    monkeypatch.setattr(layer_cost, "TOKENS", (64,))
    parts = profiling.parts

    def layer_alone(*args):
        return [dataclasses.replace(parts(*args)[-1], target="tests.bench.systems:layer_cost_of")]

    monkeypatch.setattr(profiling, "parts", layer_alone)
    status, out, err = moebench("profile", "local-4", "--system", "badday", "--model", "moe-tiny")
    assert (status, out) == (1, "")
    log = re.fullmatch(
        r"moebench: rank 2 raised in phase 'badday layer: repetition 2 \[[0-9a-f]{16}\]': RuntimeError: bad day, "
        r"at tests/bench/systems.py:\d+ in run \(log: (.*)\)",
        err.splitlines()[-1],
    )
    assert log, err
    assert "RuntimeError: bad day" in Path(log[1]).read_text()
    assert time.time() - Path(log[1]).stat().st_mtime < 10  # all ranks have ended
    shutil.rmtree(Path(log[1]).parent)


def test_an_error_that_nobody_foresaw_shows_where_there_is_no_place_for_a_log(moebench, monkeypatch):
    monkeypatch.setattr(presets, "names", bad_day)
    monkeypatch.setattr("harness.launch.scratch.place", lambda: "/proc")
    status, _, err = moebench("list", "models")
    assert status == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("moebench: RuntimeError: bad day, at tests/test_cli.py:")


def test_an_error_that_nobody_foresaw_can_be_debugged(monkeypatch):
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    monkeypatch.setattr(sys, "argv", ["moebench", "list", "models"])
    monkeypatch.setattr(presets, "names", bad_day)
    with pytest.raises(RuntimeError, match="bad day"):
        cli.main()


def test_check_runs_real_ranks_and_prints_json_alone(moebench):
    status, out, err = moebench("check", "flat", "--ranks", 2, "--dtype", "float64", "--json")
    rows = json.loads(out)
    assert status == 0
    assert {row["status"] for row in rows} == {"ok"}
    assert all(error <= 1e-10 for row in rows for error in row["errors"].values())
    assert "checking flat on 2 ranks" in err


@pytest.mark.parametrize("words", [("check", "flat"), ("profile", "local-2")])
def test_ranks_that_do_not_start_are_one_line_and_status_1(moebench, monkeypatch, words):
    monkeypatch.setenv("MOEBENCH_START_TIMEOUT_S", "0.01")
    status, out, err = moebench(*words)
    assert (status, out) == (1, "")
    last = re.fullmatch(
        r"moebench: rank -1 hung in phase 'start': no start within 0.01 s \(log: (.*)\)", err.splitlines()[-1]
    )
    assert last
    log = Path(last[1])
    assert log.exists()
    shutil.rmtree(log.parents[words[0] == "check"])


def test_check_says_what_levels_multiply_to(moebench):
    status, _, err = moebench("check", "hiermoe", "--ranks", 6, "--cluster", "emulated-2x2x2")
    assert status == 2
    assert "--ranks: 6: but the levels of emulated-2x2x2, 2 x 2 x 2, multiply to 8" in err


def test_check_fails_where_nothing_could_be_checked(moebench):
    status, out, _ = moebench("check", "flat", "--ranks", 3, "--dtype", "float64")
    assert status == 1
    assert "not divisible by 3 ranks" in out


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        ("expert_parallel=3", "layout.expert_parallel: 3: 3 (expert) x 1 (pipeline) x 1 (data) are not the 4 ranks"),
        ("expert_parallel", "--layout: 'expert_parallel': write FIELD=VALUE"),
        ("zero=1", "layout.zero = 1 is not built"),
        ("experts=2", "--layout.experts: 2: unknown field"),
    ],
)
def test_a_layout_is_checked_before_any_rank_starts(moebench, layout, line):
    status, out, err = moebench("check", "flat", "--ranks", 4, "--layout", layout)
    assert (status, out) == (2, "")
    assert line in err
    assert err.count("\n") == 1
