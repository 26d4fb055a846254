"""The smoke itself: all of it on the emulated device, and what it says of steps that fail, hang, die and lack."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.steps import STEPS

ROOT = Path(__file__).parents[2]
NOT_EMULATED = {"session", "sanitizer"}  # what the emulated device cannot show at all


def smoke(*words: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, lines, what stderr says."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.smoke", *words], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_every_step_passes_on_the_emulated_device_or_is_skipped_by_name(tmp_path):
    out = tmp_path / "smoke.jsonl"
    status, lines, err = smoke("--emulated", "--out", str(out))
    assert [line["step"] for line in lines] == [step.number for step in STEPS]
    assert {line["name"]: line["reason"] for line in lines if line["status"] == "failed"} == {}
    assert status == 0
    skipped = {line["name"]: line["reason"] for line in lines if line["status"] == "skipped"}
    assert set(skipped) <= NOT_EMULATED | ({"real packages"} if not importlib.util.find_spec("megatron") else set())
    assert all(skipped.values())
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines
    assert err.endswith(f"{len(STEPS) - len(skipped)} ok, 0 failed, {len(skipped)} skipped\n")


def test_what_fails_hangs_or_dies_is_told_and_stops_no_other_step():
    status, lines, _ = smoke("--steps", "tests.gpu.planted")
    told = {line["step"]: (line["name"], line["status"], line["reason"]) for line in lines}
    assert status == 1
    assert told == {
        0: ("works", "ok", ""),
        1: ("fails", "failed", told[1][2]),
        2: ("works", "ok", ""),
        3: ("hangs", "failed", "it took longer than 0.5 s and was ended"),
        4: ("dies", "failed", "its process ended (killed by SIGABRT)"),
        5: ("lacks", "skipped", "no such thing here"),
        6: ("lacks a package", "skipped", "package a_package_that_nobody_has is not installed"),
        7: ("works", "ok", ""),
    }
    assert told[1][2].startswith("ZeroDivisionError: by nothing (tests/gpu/planted.py:")
    assert lines[3]["seconds"] < 5
    assert lines[0]["process"] != lines[2]["process"]  # a failure ends its process


def test_the_budget_holds_for_all_steps_together():
    status, lines, _ = smoke("--steps", "tests.gpu.planted", "--only", "3,7", "--budget", "0.3")
    assert [line["status"] for line in lines] == ["failed", "skipped"]
    assert lines[1]["reason"] == "the 0.3 s of all steps are spent"
    assert status == 1


def test_without_a_gpu_steps_are_skipped_by_name():
    status, lines, _ = smoke("--only", "5")
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert (status, lines[0]["status"]) == (0, "skipped")
    assert lines[0]["reason"].startswith("no CUDA device: torch ")


def test_help_shows_examples_and_a_strange_step_is_one_line():
    assert (
        "python -m tests.gpu.smoke --only 3,4,10"
        in subprocess.run(
            [sys.executable, "-m", "tests.gpu.smoke", "--help"], cwd=ROOT, capture_output=True, text=True
        ).stdout
    )
    status, lines, err = smoke("--only", "77")
    assert (status, lines) == (2, [])
    assert err.splitlines()[-1].endswith(
        "--only: '77': no such step; known: " + ", ".join(str(s.number) for s in STEPS)
    )
