"""``moebench``: one command per thing that one does with the instrument.

Results go to stdout (``--json``: one JSON value and nothing else), progress and errors to stderr. Exit codes: 0 done,
1 something was checked and found wrong, 2 bad input. Heavy imports happen inside the commands, so that ``--help``
answers at once.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import typer

from harness import __version__, console
from harness.errors import UserError, bad

app = typer.Typer(
    name="moebench",
    help="Mixture-of-experts training systems side by side: same weights, same tokens, same routing, same oracle.",
    epilog="Begin with [bold]moebench doctor[/bold], then [bold]moebench run --suite quick[/bold].",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script instead of a table.")]


def main() -> None:
    """Run the command line; a ``UserError`` becomes one line on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        sys.stderr.write(f"moebench: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("moebench: interrupted; finished cells are kept\n")
        sys.exit(130)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, what is missing, and the command that brings it.

    Exit status 1 if something required is broken; something optional that is missing is no failure.

        moebench doctor
        moebench doctor --json
    """
    from harness.doctor import examine

    findings = examine()
    rows = [dataclasses.asdict(finding) for finding in findings]
    if as_json:
        console.print_json(rows)
    else:
        console.show(rows, "this machine", {"ok": "green", "missing": "yellow", "broken": "bold red"})
    if any(f.state == "broken" for f in findings):
        raise typer.Exit(1)


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(help="systems, models, clusters or workloads; all of them if left out.")] = "",
    as_json: Json = False,
) -> None:
    """Systems, models, clusters and workloads by name.

    moebench list systems
    moebench list clusters --json
    """
    from harness.listing import KINDS, full, listing

    if kind and kind not in KINDS:
        raise bad("kind", kind, f"unknown; name one of {', '.join(KINDS)}")
    kinds = [kind] if kind else list(KINDS)
    if as_json:
        found = {each: full(each) for each in kinds}
        return console.print_json(found[kind] if kind else found)
    for each in kinds:
        console.show(listing(each), each)
