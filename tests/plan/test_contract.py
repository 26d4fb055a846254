"""What is priced is what runs: names, lanes and waits of every system's tasks in every phase, at 8 and 64 ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import registry
from harness.plan.copied import CopiedSystem
from harness.plan.replicated import ReplicatedSystem
from tests.plan import contract

ROOT = Path(__file__).resolve().parents[2]
COPIES = {"gather", "late", "regather", "reduce", "spread"}  # kinds of task that bring or sum copies


INSIDE = {"expert_parallel": 4}
ACROSS = {**INSIDE, "expert_placement_order": "across_nodes"}


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (8, {}),
        pytest.param(8, ACROSS, marks=pytest.mark.long),
        pytest.param(8, INSIDE, marks=pytest.mark.long),
        pytest.param(64, {}, marks=pytest.mark.long),
    ],
)
def test_every_step_is_priced_as_it_runs(num_ranks: int, layout: dict, tmp_path: Path) -> None:
    rows = rows_of(num_ranks, layout, tmp_path / "rows.json")
    differing = [f"{row['system']} {row['phase']} {row['options']}: {row['differs']}" for row in rows if row["differs"]]
    assert not differing, "\n".join(differing)
    tried = {(row["system"], row["phase"]) for row in rows}
    assert tried == {(name, phase) for name in (each.name for each in contract.tried()) for phase in contract.PHASES}
    for row in rows:
        if not row["refused"]:
            of_one_node = layout == INSIDE and row["system"] in ("per-node", "ppmoe")  # which copies between nodes
            assert of_one_node or not decides_nothing(row), row
            if row["dense"]:
                shared = {"shared"} if registry.system(row["system"]).kind == "native" else set()
                assert {"ffn", *shared} <= set(row["kinds"])


def decides_nothing(row: dict) -> str:
    """What should have been in the plan of a system that decides something; empty if it was."""
    system = registry.system(row["system"])
    kinds, trains = set(row["kinds"]), row["phase"] == "train_step"
    copies = row["phase"] in ("layer", "train_step") and issubclass(system, CopiedSystem | ReplicatedSystem)
    if copies and not kinds & COPIES:
        return "copies"
    if system.name.startswith("fsmoe") and dict(system.chunked).items() <= row["options"].items():
        return "" if row["chunks"] else "chunks"
    if trains and system.after_step.__func__ is not registry.system("flat").after_step.__func__:  # type: ignore[attr-defined]
        return "" if "after-step" in kinds else "what moves after a step"
    return ""


def rows_of(num_ranks: int, layout: dict, out: Path) -> list[dict]:
    """In a process of its own, whose process group is a fake one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan.contract", str(num_ranks), str(out), json.dumps(layout)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict] = json.loads(out.read_text())
    return found
