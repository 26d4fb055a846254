"""``moebench``: one command per thing that one does with the instrument.

Results go to stdout (``--json``: one JSON value and nothing else), progress and errors to stderr. Exit codes: 0 done,
1 something was checked and found wrong, 2 bad input. Heavy imports happen inside the commands, so that ``--help``
answers at once.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import __version__, console
from harness.errors import UserError, bad
from harness.specs import DTYPE_BYTES

if TYPE_CHECKING:
    from harness.routing.record import Summary

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
STATUS_COLOURS = {"refused": "yellow", "nonconforming": "bold red", "failed": "bold red", "hung": "bold red"}
RUNS = Path("results/runs")
SIMULATED = Path("results/simulated")
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

    ```
    moebench doctor
    moebench doctor --json
    ```
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

    With --json everything about each: shapes, constants, options, sources and interpretations.

    ```
    moebench list systems
    moebench list clusters --json
    ```
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


@app.command()
def check(
    systems: Annotated[list[str] | None, typer.Argument(help="Names of systems (moebench list systems).")] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every system.")] = False,
    ranks: Annotated[
        int | None, typer.Option(help="Local ranks over loopback (default 4); 16 experts must divide over them.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="A local or emulated cluster preset, instead of --ranks.")] = "",
    dtype: Annotated[list[str] | None, typer.Option(help="Only these number formats; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Conformance: every system against the dense float64 oracle, forward and backward.

    Ragged tokens, ranks and experts without tokens, k = 1, k = E, drops, every gate. What a system cannot do is
    refused with its reason; exit status 1 if anything is wrong, or if nothing at all could be checked.

    ```
    moebench check flat hiermoe-hd2 --ranks 4
    moebench check --all --ranks 8 --json
    moebench check hiermoe-hd2 --cluster emulated-2x4
    ```
    """
    from harness import checks, presets, registry

    if every == bool(systems):
        raise bad("systems", systems or [], "name at least one, or give --all (moebench list systems)")
    _check_words("--dtype", dtype or [], DTYPE_BYTES)
    names = list(registry.systems()) if every else [registry.system(name).name for name in systems or []]
    where = presets.cluster(cluster) if cluster else checks.local_cluster(4 if ranks is None else ranks)
    if ranks not in (None, where.num_ranks):
        shape = " x ".join(map(str, where.shape))
        raise bad(
            "--ranks", ranks, f"but the levels of {cluster}, {shape}, multiply to {where.num_ranks}; leave it out"
        )
    with console.progress("check") as bar:
        payload = {"dtypes": dtype} if dtype else {}
        rows = checks.check_systems(names, where, payload, lambda text: console.say(bar, text))
    if as_json:
        console.print_json(rows)
    else:
        console.show(checks.summary(rows), f"largest relative errors over all trials and {where.num_ranks} ranks")
        if notes := checks.setbacks(rows):
            console.show(notes, "not ok", STATUS_COLOURS)
    statuses = {row["status"] for row in rows}
    if "ok" not in statuses or statuses - {"ok", "refused"}:
        raise typer.Exit(1)


@app.command(name="record")
def record_(
    out: Annotated[Path, typer.Option(help="The trace to write (.parquet).")],
    model: Annotated[str, typer.Option(help="Model preset to train (moebench list models).")] = "record-e16k2",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 600,
    at: Annotated[list[int] | None, typer.Option(help="Record after this many steps; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to record at each step.")] = 16384,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and batches.")] = 0,
    weights: Annotated[Path | None, typer.Option(help="Keep the trained model too, for serving (.npz).")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a Hugging Face MoE model to record from.")] = None,
    as_json: Json = False,
) -> None:
    """Record real routing: train a small MoE language model on the text that ships with Python.

    The routing of every layer is kept early, midway and late in training, or where --at says. With --checkpoint
    nothing is trained: the routing is that of the given model.

    ```
    moebench record --model record-e64k8 --out my-trace.parquet
    moebench record --checkpoint ~/models/OLMoE-1B-7B --out olmoe.parquet
    ```
    """
    from harness import presets
    from harness.routing import huggingface, record

    command = shlex.join(["moebench", *sys.argv[1:]])
    with console.progress("reading the text that ships with Python") as bar:

        def heard(now: record.Progress) -> None:
            if bar.console.is_terminal or now.step % max(1, now.num_steps // 20) == 0:
                console.say(bar, f"step {now.step} of {now.num_steps}, loss {now.loss:.3f}")

        common: dict[str, Any] = {"num_tokens": tokens, "command": command, "progress": heard}
        if checkpoint:
            made = huggingface.record_checkpoint(checkpoint, out, **common)
        else:
            made = record.record(
                presets.model(model), out, num_steps=steps, steps=at or None, seed=seed, weights=weights, **common
            )
    _show_recording(made, as_json)


@app.command()
def place(
    model: Annotated[str, typer.Option(help="Model preset whose experts are placed (moebench list models).")],
    trace: Annotated[Path, typer.Option(help="Recorded routing of that model (moebench record).")],
    cluster: Annotated[str, typer.Option(help="Cluster preset (moebench list clusters).")],
    out: Annotated[Path, typer.Option(help="The placement to write (.json).")],
    method: Annotated[str, typer.Option(help="How to place; an unknown name lists all.")] = "joint",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Neighbouring ranks that share each expert.")] = 1,
    step: Annotated[int | None, typer.Option(help="Recorded training step; by default the last.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of the tokens to judge by and not to plan with.")] = 0.25,
    bandwidths: Annotated[Path | None, typer.Option(help="CSV of rates between ranks, not the cluster's.")] = None,
    gap: Annotated[float, typer.Option(min=0.0, help="Relative gap at which a program counts as solved.")] = 0.025,
    time_limit: Annotated[float, typer.Option(min=0.1, help="Seconds; then the best placement so far is kept.")] = 300,
    as_json: Json = False,
) -> None:
    """Place the experts of all layers by recorded routing, and write a placement that ``moebench run`` serves with.

    Part of the recording is held out: the placement is judged on it, beside random placements (objective 2).

    ```
    moebench place --model record-l32e8k2 --trace record-l32e8k2.parquet --cluster local-4 --out placement.json
    moebench place --model mixtral-8x7b --trace record-l32e8k2.parquet --cluster moetuner-multi --tensor-parallel 4 \
      --method exflow --out exflow.json
    ```
    """
    from harness import placing

    wanted = placing.Wanted(model, trace, cluster, method, tensor_parallel, step, held_out, bandwidths, gap, time_limit)
    with console.progress(f"place {model} by {method}") as bar:
        made = placing.place(wanted, lambda text: console.say(bar, text), shlex.join(["moebench", *sys.argv[1:]]))
    placing.write(out, made)
    if as_json:
        return console.print_json(made.model_dump(mode="json"))
    rows = [{"on": name, **found} for name, found in made.scores.items()]
    console.show(
        rows, f"{out}: {made.method}, {len(made.slots)} layers of {made.num_experts} experts, {made.num_ranks} ranks"
    )
    console.show(
        [{k: v for k, v in made.objective.items() if not isinstance(v, dict)} | {"time_s": made.time_s}], "solved"
    )
    if parts := {k: v for k, v in made.objective.items() if isinstance(v, dict)}:
        console.show([{"program": name, **part} for name, part in parts.items()], "programs")
    for note in made.notes:
        typer.echo(f"- {note}")


@app.command()
def profile(
    cluster: Annotated[str, typer.Argument(help="A local or emulated cluster preset (moebench list clusters).")],
    system: Annotated[list[str] | None, typer.Option(help="Fit this system's layer too; may be repeated.")] = None,
    model: Annotated[str, typer.Option(help="Model preset whose layer that is.")] = "local-m512-e16k2",
    as_json: Json = False,
) -> None:
    """Fit what a simulator needs to know of a cluster, and add it to the ledger in results/ledger.

    Start-up time and time per byte of every collective on every link level (n bytes are one rank's buffer; all groups
    of a level work at once) and of matrix products, each with its error at sizes that were held out; how much busy
    lanes slow each other down; with --system, a whole layer over its tokens.

    ```
    moebench profile emulated-2x4
    moebench profile emulated-2x4 --system megatron --system flat
    moebench profile local-4 --json
    ```
    """
    from harness import presets, profiling

    spec = presets.cluster(cluster)
    with console.progress(f"profiling {spec.name}") as bar:
        made, path = profiling.profile(spec, lambda text: console.say(bar, text), system or [], model)
    if as_json:
        return console.print_json(made.model_dump(mode="json") | {"path": str(path)})
    from harness import ledger

    title = f"{spec.name}, {made.evidence}, {made.network['network']}: {path}"
    if made.foreign_cores > 0.3:
        title += f" (other programs kept {made.foreign_cores:.1f} cores busy: profile again when they do not)"
    console.show(ledger.fit_rows(made), title)
    console.show(ledger.contention_rows(made), "how much longer work on a lane takes while another is busy")


@app.command()
def simulate(
    name: Annotated[str, typer.Argument(help="A study; without one, they are listed.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the tables; each study gets one of its own in it.")] = SIMULATED,
    as_json: Json = False,
) -> None:
    """Run a simulated study: a paper's experiments computed from published or profiled constants.

    Every row says what evidence it is: simulated, or reported where the paper prints the same quantity. Tables are
    kept as CSV, what they were made from as Parquet.

    ```
    moebench simulate
    moebench simulate fsmoe-grid
    moebench simulate fsmoe-models --json --out my-results
    ```
    """
    from harness import studies

    if not name:
        rows = [{"name": name, "title": study.title} for name, study in studies.studies().items()]
        return console.print_json(rows) if as_json else console.show(rows, "studies")
    study = studies.study(name)
    with console.progress(f"simulating {name}") as bar:
        found = study.run(lambda text: console.say(bar, text))
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


@app.command()
def run(
    experiments: Annotated[Path | None, typer.Argument(help="A YAML file of experiments.")] = None,
    suite: Annotated[str, typer.Option(help="A suite that comes with moebench, instead of a file.")] = "",
    name: Annotated[str, typer.Option(help="Name of the run; by default that of the suite or file.")] = "",
    launches: Annotated[int | None, typer.Option(min=1, help="How often to start anew, instead of the file's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again; do not resume after finished cells.")] = False,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Training steps between checkpoints where experts change places; 0: none.")
    ] = 10,
    results: Annotated[Path, typer.Option(help="Folder of the runs.")] = RUNS,
    as_json: Json = False,
) -> None:
    """Run experiments: every system checked first, then timed, interleaved with the others of its race.

    Rows go to results/runs/NAME; a second call resumes after the finished cells, and a training whose
    experts change places from its last checkpoint. What is refused or fails is a row
    with its reason; exit status 1 only if no cell at all has a result.

    ```
    moebench run --suite quick
    moebench run my-experiments.yaml --name mine --launches 5
    ```
    """
    if (experiments is None) == (not suite):
        raise bad("experiments", str(experiments or suite), "give one YAML file, or --suite NAME")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}|", name):
        raise bad("--name", name, "must be a word of letters, digits, '.', '_' and '-'")
    from harness.bench import run as bench
    from harness.bench import suite as suites

    chosen = suites.load(suite or str(experiments))
    run_dir = results / (name or chosen.name)
    counts = bench.run_suite(chosen, run_dir, launches=launches, resume=not fresh, checkpoint_every=checkpoint_every)
    if as_json:
        console.print_json({"run": str(run_dir), "cells": counts})
    else:
        typer.echo(f"{run_dir}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if not counts.get("ok"):
        raise typer.Exit(1)


@app.command()
def report(
    name: Annotated[str, typer.Argument(help="A notebook (summary), or the name of a run.")] = "summary",
    run: Annotated[str, typer.Option(help="Run to report on; by default the latest, or a paper's own.")] = "",
    param: Annotated[list[str] | None, typer.Option("-p", "--param", help="KEY=VALUE for the notebook.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the runs.")] = RUNS,
) -> None:
    """Render a run, or a paper's experiments, as one self-contained HTML page, and print its path.

    The tables lie beside it as CSV, and the executed notebook with them. A paper's page needs no run: what a run
    would add to it says which command makes that run.

    ```
    moebench report quick
    moebench report summary --run quick -p baseline=flat
    moebench report fsmoe
    ```
    """
    from harness.report import render, suite

    parameters = dict(_key_value(each) for each in param or [])
    notebook, run_dir = _notebook_and_run(name, run, results)
    out = results.parent / "report" if suite(notebook) else None
    with console.progress(f"report {notebook}{f' on {run_dir.name}' if run_dir else ''}") as bar:
        page = render(notebook, run_dir, out=out, parameters=parameters, progress=lambda text: console.say(bar, text))
    typer.echo(page)


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


def _check_words(field: str, words: Iterable[str], known: Iterable[str]) -> None:
    for word in words:
        if word not in known:
            raise bad(field, word, f"must be one of {', '.join(known)}")


def _show_recording(made: Summary, as_json: bool) -> None:
    """What a recording holds: for each step its loss and every layer's max/mean load over experts."""
    if as_json:
        return console.print_json(dataclasses.asdict(made))
    rows = [
        {"step": step, "loss": made.loss[step]} | {f"max/mean layer {i}": skew for i, skew in enumerate(skews)}
        for step, skews in made.max_over_mean.items()
    ]
    console.show(rows, f"{made.path}: {made.num_tokens} tokens, {made.num_bytes / 1e6:.2f} MB, {made.time_s:.0f} s")
