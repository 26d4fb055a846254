"""Published training steps: the table, how a row is priced, and that no prediction knows its own row."""

from __future__ import annotations

import dataclasses

import pytest

from baselines.public_steps import studies
from baselines.public_steps.price import Parts, Row, parts, tokens_per_s
from harness.errors import UserError
from harness.studies import reported, study


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [Row.of(fields) for fields in reported("public-steps").to_dict("records")]


@pytest.fixture(scope="module")
def found() -> dict:
    return dict(study("public-steps").run(lambda line: None).tables)


def _row(rows: list[Row], **wanted: object) -> Row:
    return next(row for row in rows if all(getattr(row, name) == value for name, value in wanted.items()))


def test_the_table_is_whole(rows: list[Row]) -> None:
    table = reported("public-steps")
    assert len(table) == 77
    assert set(table["evidence"]) == {"reported"}
    assert table["source"].str.strip().ne("").all()
    assert not table.duplicated(["release", "model", "cluster", "precision"]).any()
    flops = table["model_tflops_per_gpu"] / table["tokens_per_s_per_gpu"]  # a number that was copied wrong would show
    assert flops.groupby(table["model"]).apply(lambda part: part.max() / part.min()).max() < 1.25


def test_bounds_are_reached(found: dict) -> None:
    summary = found["summary"].set_index("test")
    both = summary.loc["both"]
    assert both["share_within_20_percent"] >= 0.8
    assert both["kendall_tau"] >= 0.8
    assert both["rows"] == summary.loc["tested", "rows"] + summary.loc["left out", "rows"]


def test_nothing_is_fitted_to_what_it_predicts(rows: list[Row]) -> None:
    """Reported values of the tested models, and of a model left out, change no prediction of them."""
    newest = studies._newest(rows)
    wrong = [
        dataclasses.replace(row, tokens_per_s_per_gpu=3 * row.tokens_per_s_per_gpu)
        if row.model in studies.TESTED
        else row
        for row in newest
    ]
    simulated = [studies._tested(each)["tokens_per_s_simulated"].tolist() for each in (newest, wrong)]
    assert simulated[0] == simulated[1]
    of = "gpt-oss-120b"
    wrong = [dataclasses.replace(row, tokens_per_s_per_gpu=1.0) if row.model == of else row for row in newest]
    own = [
        part[part["model"] == of]["tokens_per_s_simulated"].tolist() for part in map(studies._left_out, (newest, wrong))
    ]
    assert own[0] == own[1]
    other = [
        part[part["model"] != of]["tokens_per_s_simulated"].tolist() for part in map(studies._left_out, (newest, wrong))
    ]
    assert other[0] != other[1]


def test_a_pipeline_waits_for_its_first_and_last_stage() -> None:
    one = Parts(1.0, 0.0, 0.0, 0.0, rounds=8.0, overlaps=False)
    assert one.step_s(0.5) == 16.0
    assert dataclasses.replace(one, rounds=8 + 3 / 1).step_s(0.5) == 22.0  # 4 stages: 3 micro-batches more


def test_layout_and_recipe_tell(rows: list[Row]) -> None:
    row = _row(rows, release="26.08", model="qwen3-235b-a22b", cluster="gb200-nvl72")
    alone = dataclasses.replace(row, overlap="no")
    assert tokens_per_s(alone, 0.5) < tokens_per_s(row, 0.5)
    assert tokens_per_s(dataclasses.replace(row, graph="none"), 0.5) < tokens_per_s(row, 0.5)
    assert parts(dataclasses.replace(row, dispatcher="alltoall")).exchange_s > parts(row).exchange_s
    assert tokens_per_s(dataclasses.replace(row, vp=1), 0.5) < tokens_per_s(row, 0.5)
    assert parts(dataclasses.replace(row, precision="BF16")).products_s > 1.5 * parts(row).products_s
    assert parts(dataclasses.replace(row, recompute="activation")).memory_s > parts(row).memory_s


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("dispatcher", "telepathy", "must be one of alltoall"),
        ("precision", "INT4", "must be one of BF16"),
        ("tp", 2, "is not priced"),
        ("gpus", 63, "do not divide"),
    ],
)
def test_a_row_that_cannot_be_is_one_line(rows: list[Row], field: str, value: object, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        Row.of({**dataclasses.asdict(rows[0]), field: value})
    assert "\n" not in str(error.value)
    assert str(value) in str(error.value)
