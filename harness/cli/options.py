"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RUNS = Path("results/runs")
Results = Annotated[Path, typer.Option(help="Folder of the runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script instead of a table.")]
ScaleDown = Annotated[
    bool,
    typer.Option("--scale-down", help="Models small enough for two cores: their gate and order of layers, 64 experts."),
]
