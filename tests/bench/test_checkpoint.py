"""A rank dies while experts change places: both placements are on disk, and the training goes on as if nothing was."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.launch.session import RankFailure
from tests.methods.test_fsmoe_training import training
from tests.methods.test_hiermoe import cluster
from tests.ranks import start

SHAPE = (2, 2)
TRAINED = "tests.bench.checkpoint_on_ranks:trained"


def run(folder: Path, session: Any, system: str = "hiermoe", **changes: Any) -> list[dict[str, Any]]:
    options = {"reshard_every": 2, "t": 2} if system == "hecate" else {}
    payload = training(system, cluster(SHAPE), options=options)
    payload |= {"folder": str(folder), "every": 3, "num_steps": 10, "dies_at": 0}
    return session(cluster(SHAPE)).call(TRAINED, payload | changes, timeout_s=100)


@pytest.mark.long
def test_a_death_in_the_middle_of_a_swap_loses_no_whole_step(tmp_path, session):
    whole = run(tmp_path / "whole", session)[0]
    assert whole["began"] == 0
    assert not (tmp_path / "whole" / "moving.json").exists()
    started = start(cluster(SHAPE), tmp_path / "log")
    with started as dying, pytest.raises(RankFailure, match="rank 1 died"):
        run(tmp_path / "cut", lambda _: dying, dies_at=8)
    moving = json.loads((tmp_path / "cut" / "moving.json").read_text())
    assert moving["step"] == 7
    for move in moving["moves"]:
        assert all(sorted(itertools.chain(*move[when])) == list(range(8)) for when in ("before", "after"))
        assert move["before"] != move["after"]
    assert {path.name for path in (tmp_path / "cut").glob("step-*")} == {"step-3", "step-6"}
    rest = run(tmp_path / "cut", session)
    assert rest[0]["began"] == 6
    assert all(each["losses"] == {step: whole["losses"][step] for step in range(6, 10)} for each in rest)
    assert rest[0]["owners"] == whole["owners"]
    assert not (tmp_path / "cut" / "moving.json").exists()


@pytest.mark.long
def test_a_death_in_the_middle_of_a_resharding_loses_no_whole_step(tmp_path, session):
    """Ranks own other numbers of experts by then. What the loads were is remembered."""
    whole = run(tmp_path / "whole", session, "hecate")[0]
    started = start(cluster(SHAPE), tmp_path / "log")
    with started as dying, pytest.raises(RankFailure, match="rank 1 died"):
        run(tmp_path / "cut", lambda _: dying, "hecate", dies_at=3)
    moving = json.loads((tmp_path / "cut" / "moving.json").read_text())
    rest = run(tmp_path / "cut", session, "hecate")
    began = rest[0]["began"]
    assert 3 <= began <= moving["step"] < began + 3
    assert rest[0]["losses"] == {step: whole["losses"][step] for step in range(began, 10)}
    assert rest[0]["owners"] == whole["owners"]


def test_a_part_that_is_damaged_is_named_and_the_step_before_is_taken(tmp_path, session):
    whole = tmp_path / "whole"
    assert run(whole, session, num_steps=6)[0]["began"] == 0
    assert {path.name for path in whole.glob("step-*")} == {"step-3", "step-6"}

    def damaged(*names: str, change: Callable[[Path], object]) -> dict[str, Any]:
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        for name in names:
            change(folder / name)
        return run(folder, session, num_steps=0)[0]

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    for name, change, said in [
        ("step-6/rank-2.pt", flip, "step-6/rank-2.pt: damaged (its checksum is another)"),
        ("step-6/rank-3.pt", Path.unlink, "step-6/rank-3.pt: cannot be read (No such file or directory)"),
        ("step-6/rank-0.sum", Path.unlink, "step-6/rank-0.pt: cannot be read (No such file or directory)"),
        ("step-6/whole.json", flip, "step-6/whole.json: damaged ("),
    ]:
        found = damaged(name, change=change)
        assert found["began"] == 3
        (note,) = found["notes"]
        assert str(tmp_path / "damaged" / said) in note
    assert damaged("step-6/whole.json", "step-6/rank-1.pt", change=Path.unlink) | {"owners": 0} == {
        **{"began": 3, "notes": [], "losses": {}, "owners": 0}  # the ranks died before it was whole: that is no damage
    }
    found = damaged("step-6/rank-2.pt", "step-3/rank-1.pt", change=flip)
    assert (found["began"], len(found["notes"])) == (0, 2)


def test_a_checkpoint_of_another_training_is_put_aside(tmp_path, session):
    run(tmp_path, session, num_steps=3)
    other = training("hiermoe", cluster(SHAPE))
    other["experiment"]["model"]["num_layers"] = 2
    with pytest.raises(UserError, match=r"^checkpoint: '.*step-3/rank-0.pt': is of another training \(ValueError"):
        run(tmp_path, session, **other)
    assert run(tmp_path, session, num_steps=0)[0]["began"] == 0


def test_a_race_that_was_killed_goes_on_with_all_systems_at_one_step(tmp_path, session):
    """Only one of them has checkpoints."""
    experiments = [training(system, cluster(SHAPE))["experiment"] for system in ("flat", "hiermoe")]
    payload = {"experiments": experiments, "warmup": 1, "repeats": 8, "ends_at": -1}

    def race(folder: str, **changes: Any) -> dict[str, Any]:
        given = payload | {"checkpoints": (str(tmp_path / folder), 3)} | changes
        ranks = session(cluster(SHAPE))
        return ranks.call("tests.bench.checkpoint_on_ranks:raced", given, timeout_s=100, on_progress=said.append)[0]

    said: list[dict[str, Any]] = []
    whole = race("whole")
    assert whole["resumed"] == {""}
    assert race("cut", ends_at=6) == {}
    shutil.copytree(tmp_path / "cut", tmp_path / "damaged")
    rest = race("cut", repeats=2)
    assert rest["resumed"] == {"all systems go on after step 6"}
    (part,) = (tmp_path / "damaged").glob("*/step-6/rank-2.pt")
    part.write_bytes(b"cut")
    said.clear()
    damaged = race("damaged", repeats=2)
    words = f"all systems go on after step 3; {part}: damaged (its checksum is another)"
    assert damaged["resumed"] == {words}
    assert {"did": "note", "text": words} in said
    for found, steps in ((rest, slice(6, 8)), (damaged, slice(3, 5))):  # a step was not timed
        for system in range(2):
            assert found["losses"][system] == pytest.approx(whole["losses"][system][steps], rel=1e-12)
        assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-9)
