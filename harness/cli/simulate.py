"""What is computed and not run: papers' studies, and any experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness import console, outputs
from harness.cli.options import Json

commands = typer.Typer()
SIMULATED = Path("results/simulated")


@commands.command()
def study(
    name: Annotated[str, typer.Argument(help="A study; without one, they are listed.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the tables; each study gets one of its own in it.")] = SIMULATED,
    as_json: Json = False,
) -> None:
    """Run a simulated study: a paper's experiments computed from published or profiled constants.

    Every row says what evidence it is: simulated, or reported where the paper prints the same quantity. Tables are
    kept as CSV, what they were made from as Parquet.

    ```
    moebench study
    moebench study fsmoe-grid
    moebench study fsmoe-models --json --out my-results
    ```
    """
    from harness import studies

    if not name:
        rows = [{"name": name, "title": each.title} for name, each in studies.studies().items()]
        return console.print_json(rows) if as_json else console.show(rows, "studies")
    chosen = studies.study(name)
    outputs.check_folder(out / name, (".csv", ".parquet"))
    with console.progress(name) as bar:
        found = chosen.run(lambda text: console.say(bar, text))
    paths = found.write(out / name)
    tables = {title: found.rows(title) for title in found.tables}
    if as_json:
        return console.print_json(
            {"study": name, "tables": tables, "notes": list(found.notes), "files": [str(path) for path in paths]}
        )
    for title, rows in tables.items():
        console.show(rows, title)
    for note in found.notes:
        typer.echo(f"- {note}")
    typer.echo(f"{out / name}: {', '.join(path.name for path in paths)}")
