"""Tables beside a page: as CSV for a program, as LaTeX for a paper."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness import outputs

MAX_LATEX_ROWS = 500  # more is data, not a table
#: whether an HTML file is a page of moebench, whichever wrote it
PAGE = outputs.starts_with(b'name="generator" content="moebench"', b"<title>moebench")


def keep(folder: Path, name: str, frame: pd.DataFrame) -> None:
    """Write ``frame`` as ``folder``/NAME.csv and, where it could be printed, NAME.tex (booktabs). ``UserError`` where
    one of these is there and somebody else's."""
    _write(folder / f"{name}.csv", frame.to_csv(index=False))
    if 0 < len(frame) <= MAX_LATEX_ROWS:
        shown = frame.rename(columns=_latex).map(lambda value: _latex(value) if isinstance(value, str) else value)
        _write(folder / f"{name}.tex", shown.to_latex(index=False, float_format="{:.4g}".format))


def _write(path: Path, text: str) -> None:
    outputs.check(path, "table", lambda table: beside_a_page(table.parent))
    outputs.write(path, text, "table", list_it=True)


def beside_a_page(tables: Path) -> bool:
    """Whether the folder is of tables of a page, which an older moebench may have written without a list."""
    pages = (page for folder in list(tables.parents)[:2] for page in folder.glob("*.html"))
    return any(PAGE(page) for page in pages if page.name != "index.html")


def _latex(text: object) -> str:
    """With LaTeX's own characters escaped."""
    words = str(text).replace("\\", r"\textbackslash ")
    for character in "&%$#_{}":
        words = words.replace(character, f"\\{character}")
    return words.replace("~", r"\textasciitilde ").replace("^", r"\textasciicircum ")
