"""Tables beside a page: as CSV for a program, as LaTeX for a paper."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

MAX_LATEX_ROWS = 500  # more is data, not a table


def keep(folder: Path, name: str, frame: pd.DataFrame) -> None:
    """Write ``frame`` as ``folder``/NAME.csv and, where it could be printed, NAME.tex (booktabs)."""
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / f"{name}.csv", index=False)
    if 0 < len(frame) <= MAX_LATEX_ROWS:
        shown = frame.rename(columns=_latex).map(lambda value: _latex(value) if isinstance(value, str) else value)
        (folder / f"{name}.tex").write_text(shown.to_latex(index=False, float_format="{:.4g}".format), encoding="utf-8")


def _latex(text: object) -> str:
    """With LaTeX's own characters escaped."""
    words = str(text).replace("\\", r"\textbackslash ")
    for character in "&%$#_{}":
        words = words.replace(character, f"\\{character}")
    return words.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
