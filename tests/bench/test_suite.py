from __future__ import annotations

from pathlib import Path

import pytest

from harness.bench import suite
from harness.errors import UserError
from harness.presets import this_machine

GOOD = """
name: demo
defaults: {dtype: float32, repeats: 2}
experiments:
  - model: moe-tiny
    cluster: [local-1, local-2]
    workload: [balanced-512, {name: own, tokens_per_rank: 8, generator: uniform}]
    system: [flat, {name: hiermoe-hd2, options: {chunks: 2}}]
    phase: [exchange, layer]
"""


def test_lists_expand_as_a_grid_and_races_gather_systems() -> None:
    found = suite.parse(GOOD, "demo.yaml")
    assert len(found.races) == 2 * 2 * 2
    assert all([e.system for e in race.experiments] == ["flat", "hiermoe-hd2"] for race in found.races)
    assert found.races[0].experiments[1].options == {"chunks": 2}
    assert {e.dtype for e in found.experiments} == {"float32"}
    assert {(race.repeats, race.warmup, race.launches) for race in found.races} == {(2, 1, 3)}


def test_a_gate_that_takes_no_prescribed_routing_races_layers_and_not_exchanges() -> None:
    text = GOOD.replace("balanced-512, ", "").replace("generator: uniform", "generator: natural")
    text = text.replace(
        "model: moe-tiny", "model: {num_layers: 1, hidden: 8, ffn: 8, num_experts: 4, top_k: 2, gate: softmoe}"
    )
    assert len(suite.parse(text.replace("[exchange, layer]", "layer"), "demo.yaml").races) == 2
    with pytest.raises(UserError, match="has no prescribed routing; phase exchange needs one"):
        suite.parse(text, "demo.yaml")
    with pytest.raises(UserError, match="takes no prescribed routing; use a natural workload"):
        suite.parse(text.replace("generator: natural", "generator: uniform"), "demo.yaml")


def test_the_most_demanding_entry_decides_and_a_cell_stands_once() -> None:
    again = GOOD + (
        "  - {model: moe-tiny, cluster: local-1, workload: balanced-512, system: [flat, megatron],"
        " phase: layer, repeats: 7}\n"
    )
    races = suite.parse(again, "demo.yaml").races
    assert len(races) == 8
    (race,) = [race for race in races if race.repeats == 7]
    assert [e.system for e in race.experiments] == ["flat", "hiermoe-hd2", "megatron"]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("phase: [exchange, layer]", "phase: exchnge", "experiments[0].phase: 'exchnge'"),
        ("    phase: [exchange, layer]", "", "has no phase"),
        ("phase: [exchange, layer]", "phase: train_step\n    backward: false", "phase train_step goes backward too"),
        ("phase:", "fase: 1\n    phase:", "experiments[0].fase: 1: unknown key; did you mean 'phase'?"),
        ("model: moe-tiny", "model: moe-tyni", "did you mean 'moe-tiny'?"),
        ("model: moe-tiny", "model: {name: x, num_layers: 1, hidden: 8, ffn: 8, num_experts: 2, top_k: 4}", "top_k"),
        ("model: moe-tiny", "model: moe-tiny\n    model: moe-tiny", "written twice"),
        (
            "model: moe-tiny",
            "model: {num_layers: 1, hidden: 8, ffn: 8, num_experts: 5, top_k: 2}",
            "model.num_experts: 5: is not divisible by the 2 groups of link level",
        ),
        ("system: [flat", "system: [flatt", "did you mean 'flat'?"),
        ("chunks: 2", "chunkz: 2", "did you mean 'chunks'?"),
        ("cluster: [local-1, local-2]", "cluster: fsmoe-a", "is of kind physical"),
        ("repeats: 2", "repeats: 0", "defaults.repeats"),
        ("repeats: 2", "repeats: [2]", "defaults.repeats"),
        ("dtype: float32", "dtype: fp32", "dtype"),
        ("dtype: float32", "dtype: float32, loss_scale: 1024", "loss_scale = 1024 belongs to train_step in float16"),
        ("dtype: float32", "dtype: float16, loss_scale: 1000", "loss_scale = 1000 is neither a power of two"),
        ("dtype: float32", "dtype: float32, loss_scale: static", "loss_scale = static is neither"),
        ("dtype: float32", "dtype: float64, exchange_dtype: float8_e4m3", "dtype is float64 for exact checks;"),
        ("dtype: float32", "dtype: bfloat16, exchange_dtype: bfloat16", "dtype is bfloat16 and so are its rows; leave"),
        ("dtype: float32", "dtype: float32, exchange_dtype: fp8", "exchange_dtype: 'fp8': Input should be"),
        ("generator: uniform", "generator: unifrom", "did you mean 'uniform'?"),
        ("generator: uniform", "generator: natural", "has no prescribed routing"),
        ("tokens_per_rank: 8", "tokens_per_rank: [8, 8]", "lists 2 ranks"),
        ("[flat,", "[flat, ,", "line "),
        ("name: demo", "name: ../demo", "name: '../demo'"),
        ("name: demo", "nam: demo", "unknown key; did you mean 'name'?"),
    ],
)
def test_bad_files_are_one_line_that_names_file_and_field(old: str, new: str, expected: str) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(UserError) as caught:
        suite.parse(text, "demo.yaml")
    message = str(caught.value)
    assert expected in message
    assert "demo.yaml" in message
    assert "\n" not in message


def test_unknown_suites_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'quick'"):
        suite.load("quik")
    with pytest.raises(UserError, match="cannot be read"):
        suite.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", suite.names())
def test_the_suites_that_come_along_load(name: str) -> None:
    with this_machine.assuming(8):
        assert suite.load(name).name == name
