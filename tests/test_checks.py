"""What ``moebench check`` makes of the ranks' answers, and of ranks that give none."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from harness import checks
from harness.errors import UserError


def row(system="flat", trial="k1", dtype="float32", status="ok", reason="", **errors):
    return {
        **{"system": system, "trial": trial, "dtype": dtype, "status": status, "reason": reason},
        **{"errors": errors, "tolerance": 1e-5 if errors else None},
    }


@pytest.mark.parametrize(("num_ranks", "shape"), [(1, (1, 1)), (4, (2, 2)), (3, (1, 3)), (6, (2, 3))])
def test_local_ranks_make_two_nodes_where_they_divide(num_ranks, shape):
    cluster = checks.local_cluster(num_ranks)
    assert (cluster.shape, cluster.kind) == (shape, "local")


def test_no_ranks_is_an_error():
    with pytest.raises(UserError, match="--ranks: 0: must be at least 1"):
        checks.local_cluster(0)


def test_the_summary_keeps_the_worst_error_of_every_kind():
    (line,) = checks.summary([row(output=1e-7, input_grad=2e-6), row(trial="kE", output=3e-7), row(status="refused")])
    assert (line["ok"], line["refused"], line["wrong"]) == (2, 1, 0)
    assert (line["output"], line["input_grad"], line["allowed"]) == (3e-7, 2e-6, 1e-5)


def test_whatever_is_neither_ok_nor_refused_is_wrong():
    lines = checks.summary([row(status=status) for status in ("nonconforming", "failed", "hung")])
    assert lines[0]["wrong"] == 3


def test_setbacks_of_one_reason_stand_together():
    rows = [row(trial=trial, dtype=dtype, status="refused", reason="no gate") for trial in "ab" for dtype in "xy"]
    (line,) = checks.setbacks([*rows, row()])
    facts = {"num_rows": 4, "trials": "a, b", "dtypes": "x, y", "reason": "no gate"}
    assert line == {"system": "flat", "status": "refused"} | facts


def test_errors_of_the_same_tensors_stand_together_with_the_worst():
    rows = [
        row(trial=f"t{i}", status="nonconforming", reason=f"output off by {i}e-5 at token {i}", output=i * 1e-5)
        for i in range(2, 57)
    ]
    other = row(trial="k1", status="nonconforming", reason="weight_grad off", weight_grad=1e-3, output=1e-7)
    line, second = checks.setbacks([*rows, other])
    assert (line["num_rows"], second["num_rows"]) == (55, 1)
    assert line["reason"] == "worst in t56 float32: output off by 56e-5 at token 56"
    assert line["trials"] == "t2, t3, t4, t5, t6, t7 and 49 more"


def test_a_system_that_ends_its_ranks_is_a_row_and_the_next_one_gets_new_ranks():
    said: list[str] = []
    rows = checks.check_systems(
        ["flat", "hiermoe-hd2"], checks.local_cluster(1), {"trials": ["no such trial"]}, said.append
    )
    assert [(each["system"], each["status"]) for each in rows] == [("flat", "failed"), ("hiermoe-hd2", "failed")]
    assert "rank 0 raised" in rows[0]["reason"]
    assert "KeyError: 'no such trial', at harness/bench/conformance.py:" in rows[0]["reason"]
    log = re.search(r"\(log: (.*)\); its trials", rows[0]["reason"])
    assert log
    assert "no such trial" in Path(log[1]).read_text()  # it stays
    assert said[-1] == f"logs of the ranks: {Path(log[1]).parents[1]}"
    shutil.rmtree(Path(log[1]).parents[1])
    assert said.count("starting the ranks of local-1") == 2
