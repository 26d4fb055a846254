"""``moebench``: one command per thing that one does with the instrument, in one room per kind of thing.

Results go to stdout (``--json``: one JSON value and nothing else), progress and errors to stderr. Exit codes: 0 done,
1 something was checked or run and went wrong, 2 bad input, 130 interrupted. An error is one line: its words, and where
the rest is. Heavy imports happen inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from typing import Annotated

import typer

from harness import __version__, caches
from harness.cli import inputs, look, regress, run, simulate, sweep, trace
from harness.errors import Failure, UserError, told

DEBUG_VARIABLE = "MOEBENCH_DEBUG"  # set: what nobody foresaw ends in Python's traceback

app = typer.Typer(
    name="moebench",
    help="Mixture-of-experts training systems side by side: same weights, same tokens, same routing, same oracle.",
    epilog="Begin with **moebench doctor**, then **moebench run --suite quick**.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for room in (look, inputs, trace, run, simulate, sweep, regress):
    app.add_typer(room.commands)


def main() -> None:
    """Run the command line; a ``UserError`` becomes one line on stderr and exit status 2, a ``Failure`` (of a rank,
    say) and any other exception one line and exit status 1. The line ends with the log that has the traceback."""
    try:
        caches.use_scratch()
        app()
    except UserError as error:
        sys.stderr.write(f"moebench: {error}\n")
        sys.exit(2)
    except Failure as failure:
        sys.stderr.write(f"moebench: {failure}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("moebench: interrupted; finished cells are kept\n")
        sys.exit(130)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        sys.stderr.write(f"moebench: {told(error)}{_logged(error)}\n")
        sys.exit(1)
    finally:
        if registry := sys.modules.get("harness.registry"):  # which imports torch
            for fault in registry.faults():
                sys.stderr.write(f"moebench: left out: {fault}\n")


def _logged(error: Exception) -> str:
    """Write the traceback to a log, and say where it is; without a place for one, to stderr."""
    from harness.launch import scratch

    text = f"{shlex.join(sys.argv)}\n{''.join(traceback.format_exception(error))}"
    try:
        with scratch.logs("error") as logs:
            logs.keep()
            path = logs.path / "moebench.log"
            path.write_text(text, encoding="utf-8")
    except OSError:
        sys.stderr.write(text)
        return ""
    return f" (log: {path})"


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
