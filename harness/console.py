"""How the command line shows things: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

WIDTH_IN_A_FILE = 160


def show(rows: Sequence[Mapping[str, Any]], title: str, colours: Mapping[str, str] | None = None) -> None:
    """One table with a column per key of the first row; ``colours``: styles of cells by their text."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_IN_A_FILE
    if not rows:
        console.print(f"{title}: none")
        return
    console.print(escape(title), style="italic", soft_wrap=True)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column), colours or {}) for column in rows[0]))
    console.print(table)
    console.print()


def print_json(value: Any) -> None:
    """``value`` as JSON on stdout; numbers of numpy become plain, what is not finite becomes null."""
    sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A spinner with one line on stderr, which ``say`` changes."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(escape(title), total=None)
        yield bar


def say(bar: Progress, text: str) -> None:
    """Change the line of ``bar``; where stderr is no terminal, print the line, so that logs show progress too."""
    if bar.console.is_terminal:
        bar.update(bar.task_ids[0], description=escape(text))
    else:
        bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _cell(value: Any, colours: Mapping[str, str]) -> str:
    if value is None:
        return ""
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"[{colours[text]}]{escape(text)}[/]" if text in colours else escape(text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
