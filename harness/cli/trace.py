"""Routing of one's own: brought in, looked at, given out."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harness import console
from harness.cli.options import Json
from harness.errors import bad

trace = typer.Typer(help="Routing of your own: import it, look at it, export it.", no_args_is_help=True)
commands = typer.Typer()
commands.add_typer(trace, name="trace")


@trace.command(name="import")
def import_(
    source: Annotated[
        list[Path], typer.Argument(help="The routing: a file, or a file for each rank, or their folder.")
    ],
    out: Annotated[Path, typer.Option(help="The trace to write (.parquet).")],
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts of a token; needed for counts.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="How many there are; needed for ids.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="tokens or counts, where neither names nor file names say it.")
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="By default the suffix's; vllm: tokens come first; loads: in any unit."),
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Share each layer's tokens equally among so many.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="With --format loads: tokens of each row.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the tokens that are drawn from counts.")] = 0,
    model: Annotated[str, typer.Option(help="What the routing is of; by default the name of the file.")] = "",
    corpus: Annotated[str, typer.Option(help="What text it is of.")] = "imported",
    as_json: Json = False,
) -> None:
    """Make a trace of token ids or counts: .npz, .npy, .parquet, .jsonl, .csv, .pt, and what servers dump.

    Ids are [steps, layers, tokens, k], or without steps or layers; counts [steps, layers, experts] or [steps, ranks,
    layers, experts]. Tables have columns step, layer, rank, and ids or counts. Counts stay counts: tokens are drawn
    from them when they are read, and each rank's counts are kept exactly. docs/traces.md has every format.

    ```
    moebench trace import counts.npz --top-k 8 --out t.parquet
    moebench trace import ids.npy --experts 128 --ranks 16 --out t.parquet
    moebench trace import expert_distribution_recorder_1.pt --top-k 8 --out t.parquet
    moebench trace import megatron-traces/ --experts 64 --out t.parquet
    moebench trace import load.npy --format loads --tokens 4096 --top-k 8 --out t.parquet
    ```
    """
    from harness.routing.importing import Wanted, import_trace

    if kind not in (None, "tokens", "counts"):
        raise bad("--kind", kind, "must be tokens or counts")
    wanted = Wanted(top_k, experts, kind, format_, ranks, tokens, seed, model, corpus)  # type: ignore[arg-type]
    with console.progress("import") as bar:

        def heard(text: str) -> None:
            if bar.console.is_terminal:
                console.say(bar, text)

        made = import_trace(source, out, wanted, shlex.join(["moebench", *sys.argv[1:]]), heard)
    if as_json:
        return console.print_json(dataclasses.asdict(made))
    typer.echo(
        f"{made.path}: {made.steps} steps, {made.layers} layers, {made.experts} experts, k = {made.top_k}, "
        f"{made.tokens} tokens, {made.kind}, {made.num_bytes / 1e6:.2f} MB"
    )
    typer.echo(f"look: moebench trace show {shlex.quote(made.path)}")


@trace.command()
def show(
    path: Annotated[Path, typer.Argument(help="A trace, by its path or the name of a shipped one.")],
    as_json: Json = False,
) -> None:
    """What a trace holds: steps, layers, experts, tokens; skew, and drift from step to step.

    Skew is max/mean load over experts; drift the total-variation distance of the loads, 0 to 1.

    ```
    moebench trace show record-e64k8.parquet
    moebench trace show t.parquet --json
    ```
    """
    from harness.routing.looking import look, table
    from harness.routing.trace import find_trace, read_trace

    found = look(read_trace(find_trace(str(path))))
    if as_json:
        return console.print_json(found)
    steps = found["steps"]
    of = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0]) if steps else "none"
    shown: dict[str, Any] = {"model": found["model"], "kind": found["kind"], "steps": f"{len(steps)} ({of})"}
    shown |= {"layers": found["num_layers"], "experts": found["num_experts"], "k": found["top_k"]}
    console.show([shown | {"ranks": found["ranks"] or "not told", "text": found["corpus"][:60]}], found["path"])
    console.show(table(found), "max/mean load over experts, and how far loads move from a step to the next")
    if found["rule"]:
        typer.echo(f"- {found['rule']}")
    if found["source"]:
        typer.echo(f"- imported from {', '.join(f'{name} {value}' for name, value in found['source'].items())}")


@trace.command()
def export(
    path: Annotated[Path, typer.Argument(help="A trace, by its path or the name of a shipped one.")],
    out: Annotated[Path, typer.Option(help="Where to: .npz, .npy, .parquet, .jsonl, .csv or .pt.")],
    weights: Annotated[bool, typer.Option(help="With gate weights, where there are any.")] = True,
    as_json: Json = False,
) -> None:
    """Write a trace as arrays or as a table that other programs read. Importing it again gives the same routing.

    ```
    moebench trace export t.parquet --out t.npz
    moebench trace export record-e64k8.parquet --out ids.csv --no-weights
    ```
    """
    from harness.routing.exporting import export_trace
    from harness.routing.trace import find_trace, read_trace

    size = export_trace(read_trace(find_trace(str(path))), out, weights=weights)
    if as_json:
        return console.print_json({"path": str(out), "num_bytes": size})
    typer.echo(f"{out}: {size / 1e6:.2f} MB")
