"""The commands around sweeps: submit, look, go on, end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import console
from harness.cli.options import RUNS, Json, Results
from harness.errors import bad

if TYPE_CHECKING:
    from harness.sweep.states import Sweep

commands = typer.Typer()
Name = Annotated[str, typer.Argument(help="A sweep in results/runs, or its folder.")]
COLOURS = {"ok": "green", "failed": "bold red", "oom": "bold red", "crashed": "bold red", "timed out": "bold red"}


@commands.command()
def sweep(
    file: Annotated[str, typer.Argument(help="A sweep file, or the name of one in slurm/sweeps.")],
    on: Annotated[str, typer.Option("--on", help="local: here, one job after another; slurm: arrays of jobs.")],
    cluster: Annotated[str, typer.Option(help="A cluster file (or its name in slurm/clusters), not the file's.")] = "",
    name: Annotated[str, typer.Option(help="Name of the run; by default the file's.")] = "",
    launches: Annotated[int | None, typer.Option(min=1, help="How often to start anew, instead of the file's.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the scripts that sbatch would get; with --on local the jobs.")
    ] = False,
    results: Results = RUNS,
) -> None:
    """Submit a sweep and return: what was submitted goes on without this process.

    The code is copied first, so that later changes do not reach the jobs. Rows go to results/runs/NAME as of any run.
    Look with moebench status, go on with moebench resume, read with moebench report.

    ```
    moebench sweep smoke --on local
    moebench sweep slurm/sweeps/hiermoe.yaml --on slurm --dry-run
    moebench sweep hiermoe --on slurm --cluster my-cluster.yaml
    ```
    """
    from harness.bench.suite import checked_name
    from harness.sweep import spec, submit

    if on not in ("local", "slurm"):
        raise bad("--on", on, "must be local or slurm")
    loaded = spec.load(file, cluster)
    run_dir = (results / checked_name("--name", name or loaded.name)).resolve()
    if dry_run and on == "local":
        return console.show(submit.listed(loaded, run_dir, launches), f"jobs of {loaded.name}, one after another")
    if dry_run:
        typer.echo("\n\n".join(submit.scripts(loaded, run_dir, launches)))
        return
    made = submit.submit(loaded, run_dir, on=on, launches=launches)  # type: ignore[arg-type]
    num_jobs = len(made.folder.tasks())
    typer.echo(f"{run_dir}: {len(made.facts['cells'])} cells in {num_jobs} jobs; moebench status {made.name}")


@commands.command()
def status(
    name: Name,
    cells: Annotated[bool, typer.Option("--cells", help="Every cell, not only how many.")] = False,
    only_failed: Annotated[bool, typer.Option("--only-failed", help="Every cell that failed, with its log.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again until nothing is open.")] = False,
    results: Results = RUNS,
    as_json: Json = False,
) -> None:
    """Cells of a sweep by state, with the time that remains: from any login, whether or not the submitter lives.

    Exit status 1 if a cell has failed.

    ```
    moebench status hiermoe-emulated
    moebench status hiermoe-emulated --only-failed
    moebench status hiermoe-emulated --watch
    ```
    """
    from harness.sweep.states import FAILED, OPEN

    found = attach(name, results)
    while True:
        table = found.cells()
        counts = found.counts(table)
        if not watch or not any(state in OPEN for state in counts):
            break
        eta = found.eta_s(table)
        typer.echo(f"{', '.join(f'{n} {state}' for state, n in counts.items())}; {_left(eta)}", err=True)
        time.sleep(5)
    shown = table[table["state"].isin(FAILED)] if only_failed else table
    rows: list[dict[str, Any]] = [{str(k): v for k, v in row.items()} for row in shown.to_dict("records")]
    if as_json:
        listed = rows if cells or only_failed else None
        console.print_json({"sweep": found.name, "states": counts, "eta_s": found.eta_s(table), "cells": listed})
    else:
        console.show(
            _by_state(table, counts), f"{found.name}: {len(table)} cells; {_left(found.eta_s(table))}", COLOURS
        )
        if cells or only_failed:
            keys = ("system", "phase", "workload", "cluster", "launch", "state", "reason", "log")
            console.show([{key: row[key] for key in keys} for row in rows], "cells", COLOURS)
    if any(state in FAILED for state in counts):
        raise typer.Exit(1)


@commands.command()
def resume(
    name: Name,
    only_failed: Annotated[bool, typer.Option("--only-failed", help="Not what was cancelled or never queued.")] = False,
    results: Results = RUNS,
) -> None:
    """Submit again what has no result and no live job, with the code as it was frozen.

    ```
    moebench resume hiermoe-emulated
    moebench resume hiermoe-emulated --only-failed
    ```
    """
    from harness.sweep import submit

    found = attach(name, results)
    num_jobs = submit.resume(found, only_failed=only_failed)
    typer.echo(f"{found.name}: {num_jobs} jobs submitted" if num_jobs else f"{found.name}: nothing to submit")


@commands.command()
def cancel(name: Name, results: Results = RUNS) -> None:
    """End every job of a sweep; finished cells keep their rows, and resume goes on with the others.

    ```
    moebench cancel hiermoe-emulated
    ```
    """
    from harness.sweep import submit

    found = attach(name, results)
    submit.cancel(found)
    typer.echo(f"{found.name}: cancelled")


def attach(name: str, results: Path) -> Sweep:
    """By its name in ``results``, or by its folder."""
    from harness.sweep.states import Sweep

    return Sweep.attach(Path(name) if "/" in name else results / name)


def _by_state(table: Any, counts: dict[str, int]) -> list[dict[str, Any]]:
    """One row a state, with its most frequent reason."""
    rows = []
    for state, count in counts.items():
        reasons = [reason for reason in table[table["state"] == state]["reason"].value_counts().index if reason]
        more = f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""
        rows.append({"state": state, "cells": count, "why": (reasons[0] + more) if reasons else ""})
    return rows


def _left(seconds: float | None) -> str:
    if seconds is None:
        return "no race is finished yet, so nobody knows how long"
    return f"about {max(1, round(seconds / 60))} min left" if seconds else "nothing is open"
