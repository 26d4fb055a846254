"""``moebench place``: its file, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from harness import cli, placing, presets
from harness.errors import UserError
from harness.placing import PlacementFile

TRACE = "record-l32e8k2.parquet"


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["moebench", "place", *words])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_placement_is_written_with_all_that_is_known_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "placement.json"
    words = ["--model", "mixtral-8x7b", "--trace", TRACE, "--cluster", "moetuner-multi", "--tensor-parallel", "4"]
    assert command(monkeypatch, *words, "--method", "two-stage", "--out", str(out), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    made = placing.read(out)
    assert shown["slots"] == json.loads(out.read_text())["slots"]
    assert {"objective", "bound", "gap", "ended", "ilp1", "ilp2"} <= set(made.objective)
    assert set(made.scores) == {"profile", "held-out", "random"}
    assert made.provenance["tokens_profiled"] + made.provenance["tokens_held_out"] == 16384
    assert "--method two-stage" in made.provenance["command"]
    assert made.time_s > 0
    placements = made.fit(presets.model("mixtral-8x7b"), 4, "options.placement")
    assert len(placements) == 32
    assert all(placement.hosts.sum() == 8 for placement in placements)
    assert np.array_equal(placements[0].local(0), made.slots[0][0])


@pytest.mark.parametrize(
    "owner",
    [np.zeros((1, 8), int), np.zeros((32, 7), int), np.full((32, 8), 4), np.full((32, 8), -1), np.zeros((32, 8)), None],
)
def test_what_a_placer_answers_is_a_placement_or_an_error(monkeypatch, tmp_path, capsys, owner) -> None:
    found = owner if owner is None else placing.Placed(owner, {}, {})
    monkeypatch.setattr(placing, "placers", lambda: {"odd": placing.Placer("odd", lambda request: found)})
    words = ["--model", "mixtral-8x7b", "--trace", TRACE, "--cluster", "moetuner-multi", "--tensor-parallel", "4"]
    assert command(monkeypatch, *words, "--method", "odd", "--out", str(tmp_path / "p.json")) == 1
    assert "the placer odd m" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"--model": "record-e64k8"}, "num_layers: 4: the trace record-l32e8k2.parquet has 32"),
        ({"--model": "mixtral-8x22b"}, "num_layers: 56"),
        ({"--cluster": "moetuner-multi"}, "8 experts, one for each rank"),
        ({"--cluster": "moetuner-multi", "--tensor-parallel": "3"}, "must divide the 8 ranks"),
        ({"--cluster": "fsmoe-b", "--tensor-parallel": "4", "--model": "mixtral-8x7b"}, ""),
        ({"--method": "jiont"}, "did you mean 'joint'"),
        ({"--step": "7"}, "has steps 40, 200"),
        ({"--held-out": "1.5"}, "must lie between 0 and 1"),
        ({"--trace": "nowhere.parquet"}, "cannot be read"),
        ({"--bandwidths": "nowhere.csv"}, "cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, str],
    said: str,
) -> None:
    words = {"--model": "record-l32e8k2", "--trace": TRACE, "--cluster": "local-4", "--method": "greedy"}
    words |= {"--out": str(tmp_path / "p.json"), **changed}
    code = command(monkeypatch, *(word for pair in words.items() for word in pair))
    assert code == (2 if said else 0)
    assert said in capsys.readouterr().err


def test_experts_that_do_not_fit_are_refused() -> None:
    model, cluster = presets.model("mixtral-8x7b"), presets.cluster("hecate-a")
    with pytest.raises(UserError, match="90 GB of experts on each, and 32 GB of memory; use at least 3"):
        placing.check_memory(model, cluster, 1, 1)
    placing.check_memory(model, cluster, 1, 4)


def test_a_file_that_is_damaged_or_of_another_model_is_named(tmp_path: Path) -> None:
    good = {"model": "m", "num_experts": 2, "num_ranks": 2, "cluster": "c", "method": "x", "slots": [[[0], [1]]]}
    path = tmp_path / "p.json"

    def saved(**changed: object) -> Path:
        path.write_text(json.dumps(good | changed))
        return path

    assert placing.read(saved()).slots == (((0,), (1,)),)
    for changed, said in (
        ({"slots": [[[0], [0]]]}, "each of the 2 experts once"),
        ({"slots": [[[0, 1]]]}, "has 1 ranks"),
        ({"schema_version": 99}, "newer than this moebench reads"),
        ({"num_ranks": 0}, "num_ranks"),
    ):
        with pytest.raises(UserError, match=said):
            placing.read(saved(**changed))
    path.write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        placing.read(path)
    two = PlacementFile.model_validate(good)
    for model, ranks, said in (("mixtral-8x7b", 2, "1 layers"), ("moe-tiny", 2, "2 experts")):
        with pytest.raises(UserError, match=said):
            two.fit(presets.model(model), ranks, "options.placement")
