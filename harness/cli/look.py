"""What there is: this machine, names, systems that agree with the oracle."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any, get_args

import typer

from harness import console
from harness.cli.options import Json, Layout, fields_of
from harness.errors import bad, unknown
from harness.specs import DTYPE_BYTES, ExchangeDtype

commands = typer.Typer()
STATUS_COLOURS = {"refused": "yellow", "cpu_bound": "yellow"} | dict.fromkeys(
    ("nonconforming", "failed", "hung", "oom", "unphysical"), "bold red"
)


@commands.command()
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


@commands.command(name="list")
def list_(
    kind: Annotated[
        str, typer.Argument(help="systems, slots, models, clusters, workloads or suites; all of them if left out.")
    ] = "",
    names: Annotated[list[str] | None, typer.Argument(help="Only these: names, or YAML files of your own.")] = None,
    as_json: Json = False,
) -> None:
    """Systems, models, clusters, workloads and suites by name, and what a system's slots may hold.

    With --json everything about each: shapes, constants, options, sources and interpretations.

    ```
    moebench list systems
    moebench list slots
    moebench list clusters --json
    moebench list cluster my-cluster.yaml
    ```
    """
    from harness.listing import KINDS, full, listing

    plural = kind if kind.endswith("s") or not kind else f"{kind}s"
    if kind and plural not in KINDS:
        raise unknown("kind", kind, KINDS, "kinds")
    kinds = [plural] if kind else list(KINDS)
    if as_json:
        found = {each: full(each, names or ()) for each in kinds}
        return console.print_json(found[plural] if kind else found)
    for each in kinds:
        console.show(listing(each, names or ()), each)


@commands.command()
def check(
    systems: Annotated[
        list[str] | None, typer.Argument(help="Names of systems, or of recipes (moebench list slots).")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Check every system.")] = False,
    ranks: Annotated[
        int | None, typer.Option(help="Local ranks over loopback (default 4); 16 experts must divide over them.")
    ] = None,
    cluster: Annotated[str, typer.Option(help="A local or emulated cluster, preset or file, instead of --ranks.")] = "",
    dtype: Annotated[list[str] | None, typer.Option(help="Only these number formats; may be repeated.")] = None,
    layout: Layout = "",
    exchange_dtype: Annotated[
        str, typer.Option(help="Rows travel as float8_e4m3 or bfloat16 (float32 and bfloat16 are checked so).")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="Exit status 1 for anything refused, too.")] = False,
    as_json: Json = False,
) -> None:
    """Conformance: every system against the dense float64 oracle, forward and backward.

    Ragged tokens, ranks and experts without tokens, k = 1, k = E, drops, every gate. What a system cannot do is
    refused with its reason. Parts of recipes are joined by +, in any order. Exit status 1 if anything is wrong, or if
    nothing at all could be checked, and with --strict if anything was refused.

    ```
    moebench check flat hiermoe-hd2 --ranks 4
    moebench check --all --ranks 8 --json
    moebench check fsmoe+hiermoe-hd2 hiermoe-hd2+fsmoe+hecate --ranks 8
    moebench check hiermoe-hd2 --cluster emulated-2x4 --strict
    moebench check flat hiermoe-hd2 --ranks 8 --layout expert_parallel=4
    moebench check flat --exchange-dtype float8_e4m3
    ```
    """
    from harness import checks, presets, registry
    from harness import layout as layouts
    from harness.topology import Topology

    if every == bool(systems):
        raise bad("systems", systems or [], "name systems, or give --all, and not both (moebench list systems)")
    _check_words("--dtype", dtype or [], DTYPE_BYTES)
    if exchange_dtype:
        _check_words("--exchange-dtype", [exchange_dtype], get_args(ExchangeDtype))
        dtype = dtype or [each for each in ("float32", "bfloat16") if each != exchange_dtype]
        if exact := {"float64", exchange_dtype} & set(dtype):
            remedy = f"its rows do not travel as {exchange_dtype}; leave one out"
            raise bad("--dtype", exact.pop(), remedy)
    names = list(registry.systems()) if every else [registry.system(name).name for name in systems or []]
    where = presets.cluster(cluster) if cluster else checks.local_cluster(4 if ranks is None else ranks)
    if ranks not in (None, where.num_ranks):
        shape = " x ".join(map(str, where.shape))
        raise bad(
            "--ranks", ranks, f"but the levels of {cluster}, {shape}, multiply to {where.num_ranks}; leave it out"
        )
    checked = layouts.Layout.parse(fields_of(layout), "--layout").on(Topology(where.shape))
    if refused := checked.refused:
        raise bad("--layout", layout, refused)
    with console.progress("check") as bar:
        payload = {"dtypes": dtype, "exchange_dtype": exchange_dtype or None, "layout": checked.model_dump(mode="json")}
        rows = checks.check_systems(names, where, payload, lambda text: console.say(bar, text))
    if as_json:
        console.print_json(rows)
    else:
        console.show(
            [_exactly(line) for line in checks.summary(rows)],
            f"largest relative errors over all trials and {where.num_ranks} ranks"
            + (f", rows {exchange_dtype}" if exchange_dtype else ""),
        )
        if notes := checks.setbacks(rows):
            console.show(notes, "not ok", STATUS_COLOURS)
    statuses = {row["status"] for row in rows}
    if "ok" not in statuses or statuses - ({"ok"} if strict else {"ok", "refused"}) or (every and registry.faults()):
        raise typer.Exit(1)


def _exactly(line: dict[str, Any]) -> dict[str, Any]:
    """Errors with digits enough to be compared with what is allowed."""
    return {key: f"{value:.3e}" if isinstance(value, float) else value for key, value in line.items()}


def _check_words(field: str, words: Iterable[str], known: Iterable[str]) -> None:
    for word in words:
        if word not in known:
            raise bad(field, word, f"must be one of {', '.join(known)}")
