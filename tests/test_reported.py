"""The papers' numbers are tidy: one value a row, each with where it is printed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

#: public-steps has a column for each part of a layout (tests/baselines/test_public_steps.py)
FOLDER = Path(__file__).parents[1] / "results" / "reported"
FILES = sorted(path for path in FOLDER.glob("*.csv") if path.stem != "public-steps")
COLUMNS = ["paper", "item", "testbed", "model", "system", "quantity", "value", "unit", "evidence", "source"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_row_has_a_value_and_a_source(path: Path) -> None:
    table = pd.read_csv(path, keep_default_na=False, dtype={column: str for column in COLUMNS if column != "value"})
    assert list(table.columns) == COLUMNS
    assert pd.api.types.is_numeric_dtype(table.value)
    assert table.value.notna().all()
    assert set(table.evidence) == {"reported"}
    for column in ("paper", "item", "quantity", "unit", "source"):
        assert table[column].str.strip().ne("").all(), column
    assert not table.duplicated(subset=COLUMNS[:6]).any()


def test_fsmoe_breakdown_adds_up() -> None:
    """A share that was copied wrong would show: those of a row of Table 2 make 100 percent."""
    table = pd.read_csv(next(path for path in FILES if path.stem == "fsmoe"))
    shares = table[table.quantity.str.endswith(".share")]
    phase = shares.quantity.str.split(".").str[0]
    sums = shares.groupby(["testbed", "model", phase]).value.sum()
    assert len(sums) == 6
    assert ((sums - 100).abs() < 0.05).all()
