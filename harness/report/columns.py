"""Columns for tidy tables of a paper's page, from their names and dtypes."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from markupsafe import Markup

from harness.report import page
from harness.report.page import Column

EVIDENCE = Column("evidence", "evidence", page.badge)


def columns_of(frame: pd.DataFrame, merge: int = 2) -> list[Column]:
    """Columns for any tidy table, shown by dtype and by the unit at the end of their name; the first ``merge`` text
    columns leave repeated values blank."""
    found = []
    for key in map(str, frame.columns):
        if key == "evidence":
            found.append(EVIDENCE)
        elif pd.api.types.is_bool_dtype(frame[key]):
            found.append(Column(key, words(key), lambda value: "yes" if value else "no"))
        elif pd.api.types.is_integer_dtype(frame[key]):
            found.append(Column(key, words(key), lambda value: "–" if pd.isna(value) else f"{value:,}", "num"))
        elif pd.api.types.is_float_dtype(frame[key]):
            title, show = _unit(key)
            found.append(Column(key, title, show, "num"))
        else:
            merged = sum(column.merge for column in found) < merge and len(found) < merge
            found.append(Column(key, words(key), lambda value: "" if pd.isna(value) else str(value), merge=merged))
    return found


def as_printed(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with the numbers of its reported rows as text: shown as the paper prints them, not rounded further."""
    if "evidence" not in frame:
        return frame
    said = (frame["evidence"] == "reported").to_numpy()
    texts = {}
    for key in map(str, frame.columns):
        if pd.api.types.is_float_dtype(frame[key]) and _unit(key)[1] is _number:
            values = [
                f"{value:.4g}" if here and math.isfinite(value) else value  # no printed number here has more digits
                for value, here in zip(frame[key], said, strict=True)
            ]
            texts[key] = pd.Series(values, index=frame.index, dtype=object)
    return frame.assign(**texts)


def words(name: str) -> str:
    """A column's or table's name as words."""
    return name.replace("_", " ")


def kept(value: Markup) -> Markup:
    """What is HTML already."""
    return value


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else page.significant(value)


def _unit(key: str) -> tuple[str, Any]:
    if key.endswith("_s"):
        return f"{words(key.removesuffix('_s'))}, ms", page.milliseconds
    if key.endswith("_ms"):
        return f"{words(key.removesuffix('_ms'))}, ms", _number
    if key.endswith(("error", "bias")):
        return words(key), "{:.1%}".format
    if key.endswith("_bytes"):
        return f"{words(key.removesuffix('_bytes'))}, MB", page.megabytes
    return words(key), _number
