"""Every system on the emulated device: conformance, every phase, and no races, no memory handed out too early.

One process forks four ranks that go through everything; the tests read what they found."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import registry
from tests.cuda import cases
from tests.cuda.ranks import TIMEOUT_S, WORLD, Found

#: a file that was not there before: a system that gives work to a stream of its own and tells the allocator nothing
DROPPED = """
import torch

from baselines.flat import Flat


class Forgetful(Flat):
    name = "forgetful"

    @classmethod
    def build(cls, case, job, weights):
        layer = super().build(case, job, weights)
        passage, side = layer.passage, torch.cuda.Stream()

        def looked_at(gated=None):
            way = passage(gated)
            out = way.forward_out

            def out_and_look(hop, chunk):
                copy = way.there.parts[chunk] * 1
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    copy.sum()
                del copy
                out(hop, chunk)

            way.forward_out = out_and_look
            return way

        layer.passage = looked_at
        return layer
"""
#: cells that real packages refuse, with words of the reason; no native system refuses any
REFUSED = {
    "megatron check rank-without-tokens float64": "without tokens",
    "deepspeed-drop check uniform bfloat16": "the model has none",
    "deepspeed-drop check experts-without-tokens float64": "the model has none",
    "deepspeed-drop check rank-without-tokens float64": "the model has none",
}


Answers = dict[str, list[Found]]  # by cell, what every rank found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return driven(tmp_path_factory.mktemp("emulated-cuda"), "first")


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return driven(tmp_path_factory.mktemp("emulated-cuda-rest"), "rest")


def driven(folder: Path, which: str) -> Answers:
    (folder / "dropped").mkdir()
    (folder / "dropped" / "__init__.py").touch()
    (folder / "dropped" / "file.py").write_text(DROPPED)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tests.cuda.ranks", str(folder), which], check=True, timeout=TIMEOUT_S + 60)
    answers: Answers = {}
    for rank in range(WORLD):
        path = folder / f"rank-{rank}.json"
        for line in path.read_text().splitlines() if path.exists() else ():
            each = Found(**json.loads(line))
            answers.setdefault(each.cell, []).append(each)
    print(f"emulated CUDA: {len(answers)} cells in {time.perf_counter() - start:.0f} s")
    assert answers, f"no rank came to its first cell: {_tail(folder)}"
    return answers


def _tail(folder: Path) -> str:
    return "".join((folder / "rank-0.log").read_text().splitlines(keepends=True)[-30:])


def what_is_wrong(found: dict[str, list[Found]], cells: list[cases.Cell]) -> list[str]:
    """One line each: what was used where by which task, or what became of a cell."""
    lines = []
    for cell in cells:
        ranks = found.get(cell.name, [])
        if len(ranks) < WORLD:
            lines.append(f"{cell.name}: {WORLD - len(ranks)} ranks did not come to its end")
        for each in ranks:
            if each.status not in ("ok", "refused"):
                lines.append(f"{cell.name}, rank {each.rank}: {each.status}: {each.reason}")
            for kind, texts in (("race", each.races), ("reuse", each.reuses)):
                lines += [f"{cell.name}, rank {each.rank}: {kind}, {count}x: {text}" for text, count in texts.items()]
    return lines


def check(system: str, found: Answers, first: bool) -> None:
    if (reason := cases.not_here(system)) is not None:
        pytest.skip(reason)
    cells = [cell for cell in cases.cells_of(system) if cell.first == first]
    assert what_is_wrong(found, cells) == []
    for cell in cells:
        (one, *_) = found[cell.name]
        assert one.status == ("refused" if cell.name in REFUSED else "ok")
        assert REFUSED.get(cell.name, "") in one.reason


def check_dropped(found: Answers, at_least: int) -> None:
    dropped = {cell: ranks for cell, ranks in found.items() if ranks[0].system == "forgetful"}
    assert len(dropped) >= at_least
    for cell, ranks in dropped.items():
        assert [each.status for each in ranks] == ["ok"] * WORLD
        assert any("dispatch] may still use on stream" in text for each in ranks for text in each.reuses), cell


@pytest.mark.timeout(TIMEOUT_S + 90)  # the first one waits for all of them
@pytest.mark.parametrize("system", registry.systems())
def test_no_races_and_no_memory_handed_out_too_early(found, system):
    check(system, found, first=True)


@pytest.mark.long
@pytest.mark.minutes
@pytest.mark.timeout(TIMEOUT_S + 90)
@pytest.mark.parametrize("system", registry.systems())
def test_nor_in_the_other_trials_phases_and_variants(rest, system):
    check(system, rest, first=False)


def test_a_dropped_in_system_is_driven_without_being_named_and_its_fault_is_seen(found):
    check_dropped(found, len(cases.FIRST))


@pytest.mark.long
@pytest.mark.minutes
def test_its_fault_is_seen_in_the_other_phases(rest):
    check_dropped(rest, len(cases.TRIALS) + len(cases.PHASES) - len(cases.FIRST))


@pytest.mark.parametrize("cell", cases.PLANTED, ids=lambda cell: f"{cell.system}-{cell.planted}".replace(" ", "-"))
def test_a_fault_in_the_harness_is_seen(found, cell):
    ranks = found[cell.name]
    kinds = {
        "nothing recorded": lambda each: each.reuses and not each.races,
        "nothing waited for": lambda each: each.races,
        "summed on the host": lambda each: "No backend type associated with device type cpu" in each.reason,
    }
    assert any(kinds[cell.planted](each) for each in ranks), ranks
