"""A rank dies while experts change places: both placements are on disk, and the training goes on as if nothing was."""

from __future__ import annotations

import itertools
import json
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
    assert [path.name for path in (tmp_path / "cut").glob("step-*")] == ["step-6"]
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
    began = json.loads((tmp_path / "cut" / "latest.json").read_text())["step"]
    assert 3 <= began <= moving["step"]
    rest = run(tmp_path / "cut", session, "hecate")
    assert rest[0]["began"] == began
    assert rest[0]["losses"] == {step: whole["losses"][step] for step in range(began, 10)}
    assert rest[0]["owners"] == whole["owners"]


def test_what_is_no_checkpoint_is_said_and_not_begun_with(tmp_path, session):
    run(tmp_path, session, num_steps=3)
    whole = (tmp_path / "latest.json").read_text()
    for text, why in (
        (whole[:20], "is no whole checkpoint; remove its folder"),
        (whole.replace('"num_ranks": 4', '"num_ranks": 8'), "is of 8 ranks and 3 layers, not 4 and 3"),
    ):
        (tmp_path / "latest.json").write_text(text)
        with pytest.raises(UserError, match=why):
            run(tmp_path, session)
    (tmp_path / "latest.json").write_text(whole)
    (tmp_path / "step-3" / "rank-2.pt").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"rank-2.pt.*is no whole checkpoint"):
        run(tmp_path, session)
