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
from typing import Annotated, Any

import typer

from harness import __version__, caches
from harness.cli import inputs, look, regress, run, simulate, sweep, trace
from harness.errors import Failure, UserError, of_a_method, told

DEBUG_VARIABLE = "MOEBENCH_DEBUG"  # set: what nobody foresaw ends in Python's traceback
INTERRUPTED = 130  # exit status of Ctrl-C, typer's too, which takes KeyboardInterrupt for itself
Misused: type[Exception] = typer.BadParameter.__mro__[2]  # any wrong word on the command line; click's or typer's own

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
    """Run the command line; a ``UserError`` or a wrong word becomes one line on stderr and exit status 2, a ``Failure``
    (of a rank, say) and any other exception one line and exit status 1. The line ends with the log that has the
    traceback."""
    try:
        caches.use_scratch()
        status = app(prog_name="moebench", standalone_mode=False)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(status)
    except Misused as error:
        sys.stderr.write(_misuse(error))
        sys.exit(2)
    except UserError as error:
        sys.stderr.write(f"moebench: {error}\n")
        sys.exit(2)
    except Failure as failure:
        sys.stderr.write(f"moebench: {failure}\n")
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("moebench: interrupted; finished cells are kept\n")
        sys.exit(INTERRUPTED)
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not of_a_method(error):  # the command's own
            raise
        if os.environ.get(DEBUG_VARIABLE):
            raise
        sys.stderr.write(f"moebench: {told(error)}{_logged(error)}\n")
        sys.exit(1)
    finally:
        if registry := sys.modules.get("harness.registry"):  # which imports torch
            for fault in registry.faults():
                sys.stderr.write(f"moebench: left out: {fault}\n")


def _misuse(error: Any) -> str:
    """A wrong word on the command line, told on one line; nothing where the help itself was the answer."""
    said = " ".join(error.format_message().split()).rstrip(".")
    if hasattr(error.__cause__, "errors"):  # pydantic's, which holds the value
        said += f", not {error.__cause__.errors()[0]['input']!r}"
    command = error.ctx.command_path if getattr(error, "ctx", None) else "moebench"
    return f"moebench: {said} ({command} --help)\n" if said else ""


def _logged(error: BaseException) -> str:
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
