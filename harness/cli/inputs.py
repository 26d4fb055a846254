"""What runs and simulations start from: recorded routing, placements, calibrations."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness import console
from harness.cli.options import Json
from harness.errors import bad

if TYPE_CHECKING:
    from harness.routing.record import Summary

commands = typer.Typer()
PROFILES = Path("results/profiles")


@commands.command(name="record")
def record_(
    out: Annotated[Path, typer.Option(help="The trace to write (.parquet).")],
    model: Annotated[
        str, typer.Option(help="Model to train: a preset (moebench list models) or a YAML file.")
    ] = "record-e16k2",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 600,
    at: Annotated[
        list[str] | None, typer.Option(help="Record after this many steps, or each of a span (20-83); may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to record at each step.")] = 16384,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and batches.")] = 0,
    balance: Annotated[float | None, typer.Option(min=0, help="Weight of the load-balancing loss (0.003).")] = None,
    gate_weights: Annotated[bool, typer.Option(help="Keep the weight of each choice: over half of the file.")] = True,
    weights: Annotated[Path | None, typer.Option(help="Keep the trained model too, for serving (.npz).")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a Hugging Face MoE model to record from.")] = None,
    text: Annotated[Path | None, typer.Option(help="Of a checkpoint: text to run it over (UTF-8).")] = None,
    token_ids: Annotated[Path | None, typer.Option(help="Of a checkpoint: ids to run it over (.npy or text).")] = None,
    seq: Annotated[int | None, typer.Option(min=2, help="Of a checkpoint: tokens of a sequence.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Of a checkpoint: sequences that run together.")] = None,
    passes: Annotated[int | None, typer.Option(min=1, help="Of a checkpoint: recorded steps of --tokens each.")] = None,
    by_layer: Annotated[
        bool | None, typer.Option(help="Of a checkpoint: hold one layer at a time; by default if it is too large.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Record real routing: train a small MoE language model on the text that ships with Python.

    The routing of every layer is kept early, midway and late in training, or where --at says. With --checkpoint
    nothing is trained: what the given model's own routers send to its experts is kept, over that text, --text or
    --token-ids. On a GPU where there is one.

    ```
    moebench record --model record-e64k8 --out my-trace.parquet
    moebench record --model record-e64k2 --at 20-83 --no-gate-weights --out drifts.parquet
    moebench record --checkpoint ~/models/OLMoE-1B-7B --out olmoe.parquet
    moebench record --checkpoint ~/models/Qwen3-30B-A3B --text mine.txt --seq 2048 --passes 8 --out qwen.parquet
    ```
    """
    from harness import presets
    from harness.routing import huggingface, record

    command = shlex.join(["moebench", *sys.argv[1:]])
    of_checkpoint: dict[str, Any] = {"text": text, "token_ids": token_ids, "seq": seq, "batch": batch, "passes": passes}
    of_training: dict[str, Any] = {"at": at, "balance": balance, "weights": weights}
    for name, value in (of_training if checkpoint else of_checkpoint | {"by_layer": by_layer}).items():
        if value is not None and value != []:
            where = "is for a training, without --checkpoint" if checkpoint else "is for --checkpoint"
            raise bad(f"--{name.replace('_', '-')}", str(value) if isinstance(value, Path) else value, where)
    if text and token_ids:
        raise bad("--text", str(text), "is given beside --token-ids; give one of them")
    with console.progress("reading the text that ships with Python") as bar:

        def heard(now: record.Progress) -> None:
            if bar.console.is_terminal or now.step % max(1, now.num_steps // 20) == 0:
                console.say(bar, f"step {now.step} of {now.num_steps}, loss {now.loss:.3f}")

        common: dict[str, Any] = {"num_tokens": tokens, "gate_weights": gate_weights}
        common |= {"command": command, "progress": heard}
        if checkpoint:
            given: dict[str, Any] = {name: value for name, value in of_checkpoint.items() if value is not None}
            made = huggingface.record_checkpoint(checkpoint, out, **given, layerwise=by_layer, **common)
        else:
            given = {} if balance is None else {"balance": balance}
            given |= {"steps": record.steps_of(at, steps) if at else None, "seed": seed, "weights": weights}
            made = record.record(presets.model(model), out, num_steps=steps, **given, **common)
    _show_recording(made, as_json)


@commands.command()
def place(
    model: Annotated[
        str, typer.Option(help="Model whose experts are placed: a preset (moebench list models) or a YAML file.")
    ],
    trace: Annotated[Path, typer.Option(help="Recorded routing of that model (moebench record).")],
    cluster: Annotated[str, typer.Option(help="A preset (moebench list clusters) or a YAML file.")],
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
    moebench place --model my-model.yaml --trace my-trace.parquet --cluster my-cluster.yaml --out placement.json
    ```
    """
    from harness import placing

    placing.check_out(out)
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


@commands.command()
def profile(
    cluster: Annotated[
        str, typer.Argument(help="A preset or a YAML file; with --on slurm a Slurm cluster file, or its name.")
    ],
    on: Annotated[str, typer.Option("--on", help="local: ranks of this machine; slurm: a job's tasks.")] = "local",
    nodes: Annotated[int | None, typer.Option(help="Nodes of a Slurm cluster; by default all of its file's.")] = None,
    system: Annotated[list[str] | None, typer.Option(help="Fit this system's layer too; may be repeated.")] = None,
    model: Annotated[
        str, typer.Option(help="Preset or YAML file of the model whose layer that is.")
    ] = "local-m512-e16k2",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script that sbatch would get.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the profiles that Slurm runs.")] = PROFILES,
    as_json: Json = False,
) -> None:
    """Fit what a simulator needs to know of a cluster, and add it to the ledger in results/ledger.

    Start-up time and time per byte of every collective on every link level (n bytes are one rank's buffer; all groups
    of a level work at once) and of matrix products, each with its error at sizes that were held out; how much busy
    lanes slow each other down; with --system, a whole layer over its tokens.

    With --on slurm the ranks are the tasks of one job, submitted as a sweep's are: this command returns, and
    moebench status, resume and cancel take the folder that it prints.

    ```
    moebench profile emulated-2x4
    moebench profile emulated-2x4 --system megatron --system flat
    moebench profile local-4 --json
    moebench profile my-cluster.yaml
    moebench profile my-cluster.yaml --on slurm --nodes 4 --system flat
    ```
    """
    from harness import presets, profiling

    if on == "slurm":
        return _profile_on_slurm(cluster, nodes, system or [], model, results, dry_run, as_json)
    if on != "local":
        raise bad("--on", on, "must be local or slurm")
    if nodes is not None or dry_run:
        raise bad("--nodes" if nodes else "--dry-run", nodes or dry_run, "is for --on slurm")
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


def _profile_on_slurm(
    cluster: str, nodes: int | None, systems: list[str], model: str, results: Path, dry_run: bool, as_json: bool
) -> None:
    from harness import ledger
    from harness.sweep import profile, script, spec, submit
    from harness.sweep.folder import SweepFolder

    slurm = spec.load_cluster(cluster)
    job = profile.job(slurm, nodes, systems, model, ledger.LEDGER)
    run_dir = (results / profile.run_name(slurm)).resolve()
    if dry_run:
        typer.echo("\n".join(script.texts(SweepFolder(run_dir), slurm.cluster, [submit.shape_of(job)])))
        return
    submit.submit_profile(slurm, run_dir, job)
    path = ledger.LEDGER / f"{job['cluster']['name']}.json"
    if as_json:
        return console.print_json({"run": str(run_dir), "ledger": str(path.resolve()), "cells": len(job["tasks"])})
    typer.echo(
        f"{run_dir}: {len(job['tasks'])} parts in 1 job; moebench status {run_dir}; the calibration goes to {path}"
    )


def _show_recording(made: Summary, as_json: bool) -> None:
    """What a recording holds: for each step its loss and every layer's max/mean load over experts."""
    if as_json:
        return console.print_json(dataclasses.asdict(made))
    rows = [
        {"step": step, "loss": made.loss[step]} | {f"max/mean layer {i}": skew for i, skew in enumerate(skews)}
        for step, skews in made.max_over_mean.items()
    ]
    console.show(rows, f"{made.path}: {made.num_tokens} tokens, {made.num_bytes / 1e6:.2f} MB, {made.time_s:.0f} s")
