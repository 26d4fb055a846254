"""``moebench regress``: whether a change made anything slower."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from harness import console
from harness.cli.options import Json
from harness.errors import bad

commands = typer.Typer()


@commands.command()
def regress(
    base: Annotated[str, typer.Option(help="A revision or another checkout; without one, the stored reference.")] = "",
    head: Annotated[str, typer.Option(help="A revision or a checkout; by default this one.")] = "",
    suite: Annotated[str, typer.Option(help="quick, gpu, or a YAML file of experiments.")] = "quick",
    pairs: Annotated[int, typer.Option(min=4, help="Visits of each side to each race.")] = 16,
    threshold: Annotated[float, typer.Option(min=0, help="Slower by less than this share is no alarm.")] = 0.01,
    save_reference: Annotated[bool, typer.Option("--save-reference", help="Keep the head's times.")] = False,
    results: Annotated[Path, typer.Option(help="Each call gets a folder of its own in its folder regress.")] = Path(
        "results"
    ),
    as_json: Json = False,
) -> None:
    """Time base and head in turns in one job, and say what became slower; exit status 1 if anything did.

    Decided by a paired bootstrap per cell with Holm's correction, and a threshold below which nothing matters.

    ```
    moebench regress --base main
    moebench regress --base main --suite gpu --pairs 20
    moebench regress --save-reference
    moebench regress
    ```
    """
    from harness.regress import decide, run

    suite_path, name = run.suite_file(suite), Path(suite).stem
    run.check_suite(suite_path)
    if base and save_reference:
        raise bad("--save-reference", base, "keeps the times of the head alone; leave --base out")
    if save_reference:
        run.check_reference(name)
    against = not base and not save_reference
    if against:
        run.read_reference(name)
    with contextlib.ExitStack() as stack, console.progress("regress") as bar:

        def say(text: str) -> None:
            console.say(bar, text)

        base_dir = head_dir = stack.enter_context(run.checkout(head)) if head else run.ROOT
        if base:
            base_dir = stack.enter_context(run.checkout(base))
        folder = run.own_folder(results.resolve())  # all that was asked for is known to be good by now
        if against:
            found, setbacks = run.against_reference(head_dir, name, suite_path, pairs, folder, say)
        else:
            found, setbacks = run.race_pairs(base_dir, head_dir, suite_path, pairs, folder, say)
    for line in setbacks:
        typer.echo(f"not compared: {line}", err=True)
    if found.empty:
        raise bad("--suite", suite, "nothing could be compared")
    found.to_csv(folder / "pairs.csv", index=False)
    table = decide.decide(found, threshold=threshold)
    table.to_csv(folder / "table.csv", index=False)
    typer.echo(f"tables and logs: {folder}", err=True)
    if save_reference:
        typer.echo(run.write_reference(found, name), err=True)
    rows = [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
    slower = [row for row in rows if row["verdict"] == "slower"]
    if as_json:
        console.print_json({"slower": len(slower), "rows": rows, "not_compared": setbacks})
    else:
        title = f"head over base, {pairs} pairs; slower: p (Holm) < {decide.ALPHA} and above {1 + threshold:.3f}"
        shown = [{key: value for key, value in row.items() if key not in ("p", "num_pairs")} for row in rows]
        console.show(shown, title, {"slower": "bold red", "faster": "green"})
    if slower or (setbacks and base):
        raise typer.Exit(1)
