"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.errors import bad

RUNS = Path("results/runs")
Results = Annotated[Path, typer.Option(help="Folder of the runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script instead of a table.")]
ScaleDown = Annotated[
    bool,
    typer.Option("--scale-down", help="Models small enough for two cores: their gate and order of layers, 64 experts."),
]
Layout = Annotated[
    str,
    typer.Option(metavar="FIELD=VALUE,...", help="Fields of layouts instead of the file's, as expert_parallel=4."),
]


def fields_of(layout: str) -> dict[str, int | str]:
    """``expert_parallel=4,zero=1`` -> fields of a layout; none of nothing."""
    found: dict[str, int | str] = {}
    for part in layout.split(",") if layout else ():
        name, _, value = (each.strip() for each in part.partition("="))
        if not name or not value:
            raise bad("--layout", layout, "write FIELD=VALUE,FIELD=VALUE, as expert_parallel=4,zero=1")
        found[name] = int(value) if value.isdigit() else value
    return found
