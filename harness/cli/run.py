"""Experiments, and pages over them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness import caches, console
from harness.cli.options import RUNS, Json, Layout, Results, ScaleDown, fields_of
from harness.errors import UserError, bad

if TYPE_CHECKING:
    from harness.bench.suite import Suite

commands = typer.Typer()


@commands.command()
def run(
    experiments: Annotated[Path | None, typer.Argument(help="A YAML file of experiments.")] = None,
    suite: Annotated[
        str, typer.Option(help="A suite that comes with moebench, instead of a file; auto: what fits this machine.")
    ] = "",
    name: Annotated[str, typer.Option(help="Name of the run; by default that of the suite or file.")] = "",
    launches: Annotated[int | None, typer.Option(min=1, help="How often to start anew, instead of the file's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; do not resume after finished cells.")] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Training steps between checkpoints where experts change places; 0: none.")
    ] = 10,
    scale_down: ScaleDown = False,
    layout: Layout = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and what refuses them.")] = False,
    gpus: Annotated[int | None, typer.Option(min=0, help="With --dry-run: as if so many GPUs were here.")] = None,
    results: Results = RUNS,
    as_json: Json = False,
) -> None:
    """Run experiments: every system checked first, then timed, interleaved with the others of its race.

    Rows go to results/runs/NAME; a second call resumes after the finished cells, and a training whose
    experts change places from its last checkpoint. Inputs are read before anything starts: a cell with a bad one is a
    row with its reason, and the others run. What is refused or fails is a row with its reason, told at the end with the
    command for the page. --suite auto takes gpu-node where this machine has 2 GPUs or more, gpu where it has one, else
    quick.

    Exit status: 0, every cell was timed or refused; 1, a cell failed, hung, ran out of memory, did not conform, was
    unphysical or had a bad input, or none is ok (the others keep their rows, and a second call runs again what failed);
    2, bad input, nothing ran; 130, interrupted.

    ```
    moebench run --suite quick
    moebench run --suite auto --dry-run
    moebench run --suite gpu-node --dry-run --gpus 8
    moebench run my-experiments.yaml --name mine --launches 5
    ```
    """
    if (experiments is None) == (not suite):
        raise bad("experiments", str(experiments or suite), "give one YAML file, or --suite NAME, and not both")
    from harness.bench import inputs
    from harness.bench import run as bench
    from harness.bench import suite as suites
    from harness.presets import this_machine

    if "SLURM_JOB_ID" in os.environ:
        caches.use_scratch(everything=True)  # a node's home may be read-only, and is shared
    if gpus is not None and not dry_run:
        raise bad("--gpus", gpus, "is what a dry run assumes; add --dry-run, or leave it out")
    with contextlib.nullcontext() if gpus is None else this_machine.assuming(gpus):
        if suite == "auto":
            suite = fitting()
        chosen = suites.load(suite or str(experiments), strict=False, small=scale_down, layout=fields_of(layout))
    if dry_run:
        return _show_plan(chosen, launches, as_json, here=gpus is None)
    run_dir = results / suites.checked_name("--name", name or chosen.name[:74] + ("-small" if scale_down else ""))
    chosen = inputs.sift(chosen)
    for each in chosen.bad:
        typer.echo(f"cannot run: {each.reason}", err=True)
    counts = bench.run_suite(chosen, run_dir, launches=launches, resume=not fresh, checkpoint_every=checkpoint_every)
    from harness.report import ending

    cells = [*chosen.experiments, *(each.experiment for each in chosen.bad)]
    not_ok = ending.not_ok(run_dir, [experiment.digest for experiment in cells])
    page = ending.page_command(run_dir, RUNS)
    if as_json:
        console.print_json({"run": str(run_dir), "cells": counts, "not_ok": not_ok, "page": page})
    else:
        typer.echo(f"{run_dir}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
        for row in not_ok:
            typer.echo("{status}: {systems}, {where}, {workloads}, launch {launches}: {why}".format(**row))
        typer.echo(f"the page: {page}")
    if status := ending.status(counts):
        raise typer.Exit(status)


def fitting() -> str:
    """The suite for the GPUs that are here and that torch can use; said on stderr. ``UserError`` where the mask names
    none of them."""
    from harness import devices, mask
    from harness.launch import gpus
    from harness.presets import this_machine

    why = None
    if not this_machine.assumed():
        driver = devices.ask()
        mask.check(driver)
        why = gpus.unusable(driver)
    num_gpus = 0 if why else this_machine.num_gpus()
    chosen = "gpu-node" if num_gpus > 1 else "gpu" if num_gpus else "quick"
    here = "; ".join(filter(None, why)) if why else f"{num_gpus} {'GPU is' if num_gpus == 1 else 'GPUs are'} here"
    typer.echo(f"suite {chosen}: {here}", err=True)
    return chosen


def _show_plan(chosen: Suite, launches: int | None, as_json: bool, here: bool) -> None:
    from harness import options
    from harness.bench import dry

    rows = list(dry.rows(chosen, launches, here))
    if as_json:
        return console.print_json({"suite": chosen.name, "cells": rows})
    taken = [row for row in rows if not row["refused"]]
    minutes = sum(row["estimate_s"] for row in taken) / 60
    about = f"{len(taken)} of {len(rows)} cells would run, in about {max(1, round(minutes))} min"
    for row in rows:
        row["system"] = options.label(row["system"], row.pop("options"), row.pop("capacity_factor"), row.pop("layout"))
    shown = [{**row, "estimate_s": round(row["estimate_s"]), "refused": _start(row["refused"])} for row in rows]
    console.show(shown, f"{chosen.name}: {about}")


def _start(reason: str | None) -> str:
    return (reason or "").split(";")[0]


@commands.command()
def report(
    name: Annotated[str, typer.Argument(help="A notebook (summary), or the name of a run.")] = "summary",
    run: Annotated[str, typer.Option(help="Run to report on; by default the latest, or a paper's own.")] = "",
    param: Annotated[list[str] | None, typer.Option("-p", "--param", help="KEY=VALUE for the notebook.")] = None,
    results: Results = RUNS,
) -> None:
    """Render a run, or a paper's experiments, as one self-contained HTML page, and print its path.

    Ratios refer to a baseline that ran (megatron, else flat, else what has most times) or to -p baseline=SYSTEM.
    The tables lie beside it as CSV and LaTeX, and the executed notebook with them; index.html lists all pages, in the
    folder above that of the runs (results).
    A paper's page needs no run: what a run would add to it says which command makes that run. A sweep need not be over.

    ```
    moebench report quick
    moebench report summary --run quick -p baseline=flat
    moebench report fsmoe
    moebench report compare --run new -p other=old
    ```
    """
    from harness.report import render, suite

    parameters = dict(_key_value(each) for each in param or [])
    notebook, run_dir = _notebook_and_run(name, run, results)
    out = results.parent / "report" if suite(notebook) else None
    with console.progress(f"report {notebook}{f' on {run_dir.name}' if run_dir else ''}") as bar:
        page = render(notebook, run_dir, out=out, parameters=parameters, progress=lambda text: console.say(bar, text))
    from harness.report import index

    typer.echo(page)
    try:
        typer.echo(f"all reports: {index.write(results.parent)}", err=True)
    except UserError as error:  # the page is there all the same
        typer.echo(f"not listed: {error}", err=True)


def _notebook_and_run(name: str, run: str, results: Path) -> tuple[str, Path | None]:
    """``name`` may be a notebook, or (without --run) a run, which the summary then shows."""
    from harness.report import notebooks, suite

    runs = {path.name: path for path in results.glob("*/") if path.is_dir()}
    if not run and name in runs:
        return "summary", runs[name]
    if name not in notebooks():
        known = f"notebooks are {', '.join(notebooks())}; runs in {results} are {', '.join(sorted(runs)) or 'none yet'}"
        raise bad("report", name, f"unknown; {known}")
    if not run and (own := suite(name)):
        return name, runs.get(own)
    if not run and not runs:
        raise bad("run", str(results), "holds no run yet; make one with moebench run --suite quick")
    return name, results / run if run else max(runs.values(), key=lambda path: path.stat().st_mtime)


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise bad("--param", text, "write KEY=VALUE")
    return key, value
