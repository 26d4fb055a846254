"""What is computed and not run: papers' studies, and any experiment."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from harness import console, outputs
from harness.cli.options import RUNS, Json, Layout, Results, ScaleDown, fields_of
from harness.errors import bad

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
    if not isinstance(found, studies.Findings):
        raise TypeError(f"study {name} found no Findings but {type(found).__name__}")
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


@commands.command()
def simulate(
    experiments: Annotated[
        Path | None, typer.Argument(help="A YAML file of experiments, as moebench run takes.")
    ] = None,
    suite: Annotated[str, typer.Option(help="A suite that comes with moebench, instead of a file.")] = "",
    name: Annotated[str, typer.Option(help="Name of the run; by default the file's with -sim behind it.")] = "",
    machine: Annotated[
        str,
        typer.Option(help="auto, profiled, published or data-sheet: what seconds rest on; auto: the first there is."),
    ] = "auto",
    efficiency: Annotated[
        float | None,
        typer.Option(help="Of a data sheet: the share of the device's peak; by default, by rows per expert."),
    ] = None,
    links: Annotated[
        str | None, typer.Option(help="Of a data sheet: ports (the default; ranks meet) or shared-ports.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to simulate.")] = 1,
    warm: Annotated[
        int | None, typer.Option(min=0, help="Steps before these, which planners see; by default the file's warmup.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; do not keep finished cells.")] = False,
    scale_down: ScaleDown = False,
    layout: Layout = "",
    results: Results = RUNS,
    as_json: Json = False,
) -> None:
    """Simulate experiments: what every system would take, on any cluster, your own included. Nothing is run.

    Takes the file that moebench run takes. Rows go to results/runs/NAME with evidence simulated and what they rest on,
    and every report reads them. auto: what moebench profile found on the cluster, else costs that were published with
    it, else rates of its data sheet. A folder holds what was run, or what was simulated, never both.

    Exit status: 0, every cell was simulated or refused; 1, one failed, or none is ok; 2, bad input; 130, interrupted.

    ```
    moebench simulate my-experiments.yaml --name mine-sim
    moebench simulate --suite quick
    moebench simulate my-experiments.yaml --machine data-sheet --efficiency 0.4 --links shared-ports --steps 30
    moebench report compare --run mine -p other=mine-sim
    ```
    """
    if (experiments is None) == (not suite):
        raise bad("experiments", str(experiments or suite), "give one YAML file, or --suite NAME, and not both")
    from harness.bench import suite as suites
    from harness.plan.choice import Wanted

    wanted = Wanted(machine, efficiency, links)
    wanted.check()
    how: dict[str, Any] = {"small": scale_down, "layout": fields_of(layout)}
    chosen = suites.load(suite or str(experiments), physical=True, strict=False, **how)
    run_dir = results / suites.checked_name("--name", name or f"{chosen.name[:70]}{'-small' * scale_down}-sim")
    from harness import simulating

    counts = simulating.simulate_suite(chosen, run_dir, wanted, steps=steps, warm=warm, fresh=fresh)
    from harness.options import label_of
    from harness.report import ending

    cells = [*chosen.experiments, *(each.experiment for each in chosen.bad)]
    digests = [experiment.digest for experiment in cells]
    found, not_ok = simulating.times(run_dir, digests), ending.not_ok(run_dir, digests)
    page = ending.page_command(run_dir, RUNS)
    if as_json:
        console.print_json({"run": str(run_dir), "cells": counts, "times": found, "not_ok": not_ok, "page": page})
    else:
        labels = {each.digest: label_of(each) for each in cells}
        for title, rows in _by_race(found, labels):
            console.show(rows, title)
        typer.echo(f"{run_dir}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
        for row in not_ok:
            typer.echo("{status}: {systems}, {where}, {workloads}: {why}".format(**row))
        typer.echo(f"the page: {page}")
    if status := ending.status(counts):
        raise typer.Exit(status)


def _by_race(found: list[dict[str, Any]], labels: Mapping[str, str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Title and table of every race; ``labels``: by cell."""
    from harness.report.page import significant

    for _, group in itertools.groupby(found, key=lambda row: row["race"]):
        rows = list(group)
        first = rows[0]
        sent = "".join(first["dtype"].partition(", ")[1:])  # the format of rows, where it is another
        title = "{phase} of {model}, {workload}, on {cluster}{sent}: simulated, {basis}".format(**first, sent=sent)
        yield (
            title,
            [
                {
                    "system": labels[row["cell"]],
                    "simulated, ms": significant(row["time_s"] * 1e3, 4),
                    "of the shortest": f"{row['time_s'] / first['time_s']:.2f}",
                    "held-out error": "unknown" if row["heldout_error"] is None else f"{row['heldout_error']:.0%}",
                }
                for row in rows
            ],
        )
