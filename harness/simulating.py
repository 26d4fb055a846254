"""``moebench simulate``: what the cells of an experiments file would take, into a store as ``moebench run`` fills.

Evidence is ``simulated``, the basis stands in every row, and a folder holds one machine for each cluster.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from harness.bench import dry, lock, provenance, run, tidy
from harness.bench.progress import columns
from harness.bench.store import SIMULATED, Store
from harness.bench.suite import Race, Suite
from harness.errors import OF_A_SYSTEM, Unplanned, UserError, bad, unplannable
from harness.placing import check_memory
from harness.plan.choice import Wanted, fingerprint
from harness.plan.graph import Timeline
from harness.plan.machine import Machine
from harness.routing.replay import check_replay
from harness.specs import Experiment

MOST_EVENTS = 50_000  # of the timelines of a cell
ONE_LAYER = {"num_layers": 1, "num_dense_layers": 0, "moe_every": 1}
Key = tuple[str, ...]  # of what shares a machine


def simulate_suite(
    suite: Suite,
    run_dir: Path,
    wanted: Wanted,
    *,
    steps: int = 1,
    warm: int | None = None,
    fresh: bool = False,
    show_progress: bool = True,
) -> dict[str, int]:
    """``steps`` of every cell of ``suite`` behind ``warm`` more (None: as many as ``suite`` says); finished cells are
    kept, unless ``fresh``. Number of cells by status. ``UserError`` where no cell has a machine, and for a folder that
    holds anything else."""
    wanted.check()
    _check_replays(suite, steps, warm)
    machines, lacks = machines_of(suite, wanted)
    store = Store(run_dir)
    older = run_dir.exists()
    store.prepare()
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock.held(run_dir))
        if older and fresh:
            run.put_aside(run_dir)
            store.prepare()
            stack.enter_context(lock.held(run_dir))
        store.refuse_other(simulated=True)
        settings = settings_of(suite, machines, steps, warm)
        check_same(store, settings)
        finished = store.finished()
        todo = [(race, each) for race in suite.races for each in race.experiments if (each.digest, 0) not in finished]
        write_records(store, suite, settings)
        for each in suite.bad:
            store.append(tidy.rows_of_simulation(each.experiment, run_dir.name, ("failed", each.reason)))
        num_steps = sum(steps + before(race, warm) for race, _ in todo)
        say = stack.enter_context(_shown(len(todo), num_steps, show_progress))
        for race, experiment in todo:
            say(f"{experiment.system}: {run.describe(race)}", 0)
            key = key_of(experiment)
            if key in lacks:
                outcome: Any = "failed", lacks[key]
            else:
                outcome = judged(experiment, machines[key], steps, before(race, warm), lambda text: say(text, -1))
            keep(store, experiment, outcome)
            say("", steps + before(race, warm))
    return run.summary(store, suite)


def before(race: Race, warm: int | None) -> int:
    """Steps that planners see before those that are priced."""
    return race.warmup if warm is None else warm


def _check_replay(experiment: Experiment, warm: int, steps: int) -> None:
    check_replay(experiment, warm + steps, f"{warm} warm-up, {steps} to simulate")


def _check_replays(suite: Suite, steps: int, warm: int | None) -> None:
    """``UserError`` where every replay of ``suite`` is over too early, and there is nothing else in it."""
    errors: list[UserError] = []
    for race in suite.races:
        for experiment in race.experiments:
            try:
                _check_replay(experiment, before(race, warm), steps)
            except UserError as error:
                errors.append(error)
    if errors and len(errors) == len(suite.experiments):
        raise errors[0]


def machines_of(suite: Suite, wanted: Wanted) -> tuple[dict[Key, Machine], dict[Key, str]]:
    """By ``key_of``: the machine, or why there is none; ``UserError`` where there is none at all."""
    machines: dict[Key, Machine] = {}
    lacks: dict[Key, str] = {}
    for experiment in suite.experiments:
        key = key_of(experiment)
        if key not in machines and key not in lacks:
            try:
                machines[key] = wanted.machine(experiment)
            except UserError as error:
                lacks[key] = str(error)
    if not machines:
        raise UserError(next(iter(lacks.values())))
    return machines, lacks


def key_of(experiment: Experiment) -> Key:
    """What decides which machine an experiment has."""
    return experiment.cluster.digest, experiment.compute, "exchange" if experiment.phase == "exchange" else ""


def judged(experiment: Experiment, machine: Machine, steps: int, warm: int, progress: Callable[[str], None]) -> Any:
    """The judge's answer, or status and reason of a cell that has none."""
    from harness import heldout
    from harness.simulation import simulate

    try:
        _check_replay(experiment, warm, steps)
        if refused := refusal(experiment):
            return "refused", refused
        machine, error = heldout.known(experiment, machine)
        found = simulate(experiment, machine, steps=steps, warm=warm, progress=progress)
        return dataclasses.replace(found, heldout_error=error)
    except Unplanned as error:
        return "refused", str(error)
    except UserError as error:
        return "failed", str(error)
    except OF_A_SYSTEM as error:
        return "failed", unplannable(experiment.system, error)


def refusal(experiment: Experiment) -> str | None:
    """Why its system would not run it, or its ranks not hold it; a package that is not installed here is planned all
    the same."""
    if refused := dry.refusal(experiment, installed=True):
        return refused
    model = experiment.model
    try:
        if experiment.phase != "exchange":
            whole = model.model_copy(update=ONE_LAYER) if experiment.phase == "layer" else model
            groups = experiment.groups
            holders = experiment.cluster.num_ranks if groups is None else groups.size
            check_memory(whole, experiment.cluster, 1, holders, experiment.dtype)
    except UserError as error:
        return str(error)
    return None


def keep(store: Store, experiment: Experiment, outcome: Any) -> None:
    """What the judge said of a cell, and its timelines; or why it could not be kept."""
    try:
        rows = tidy.rows_of_simulation(experiment, store.path.name, outcome)
    except OF_A_SYSTEM as error:  # its bytes are planned there
        outcome = "failed", unplannable(experiment.system, error)
        rows = tidy.rows_of_simulation(experiment, store.path.name, outcome)
    if not isinstance(outcome, tuple) and outcome.timelines:
        store.write_trace(experiment.digest, {name: _first_ranks(each) for name, each in outcome.timelines.items()})
    store.append(rows)


def _first_ranks(timeline: Timeline) -> Timeline:
    """Of so many ranks that a browser opens it."""
    most = max(1, MOST_EVENTS // max(1, len(timeline.plan.tasks)))
    start, end = (np.asarray(each).reshape(len(timeline.plan.tasks), -1) for each in (timeline.start_s, timeline.end_s))
    return Timeline(timeline.plan, start[:, :most], end[:, :most])


# -------------------------------------------------------------------------------------------------------- the records


def settings_of(
    suite: Suite, machines: Mapping[Key, Machine], steps: int, warm: int | None
) -> dict[str, dict[str, Any]]:
    """By cluster (digest and wire): what its simulation rests on."""
    found: dict[str, dict[str, Any]] = {}
    for race, experiment in ((each, one) for each in suite.races for one in each.experiments):
        if machine := machines.get(key_of(experiment)):
            place = found.setdefault(_place(experiment), {"steps": steps, "warm_up": [], "machines": {}})
            place["warm_up"] = sorted({*place["warm_up"], before(race, warm)})
            place["machines"][" ".join(filter(None, key_of(experiment)[1:]))] = {
                "basis": machine.basis,
                "fingerprint": fingerprint(machine),
            }
    return found


def check_same(store: Store, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """``UserError`` if the folder holds another simulation of one of the clusters."""
    for record in store.records().values():
        known = record.get("simulation") or {}
        now = settings.get(str(known.get("place")))
        if now is None:
            continue
        same = all(known.get(key) == now[key] for key in ("steps", "warm_up"))
        shared = set(known["machines"]) & set(now["machines"])
        if not same or any(known["machines"][key] != now["machines"][key] for key in shared):
            text = "; ".join(dict.fromkeys(each["basis"] for each in known["machines"].values()))
            text += f", {known['steps']} steps after {str(known['warm_up']).strip('[]')}"
            remedy = f"holds a simulation on another machine or of other steps ({text})"
            raise bad("run", store.path.name, f"{remedy}; take another --name, or --fresh")


def write_records(store: Store, suite: Suite, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Of every cluster and wire, as of a launch: enough to simulate it again."""
    places: dict[str, list[Race]] = collections.defaultdict(list)
    for race in suite.races:
        places[_place(race.first)].append(race)
    for place, races in places.items():
        first = races[0].first
        each = run.Plan(first.cluster, first.wire, tuple((0, race) for race in races))
        record = run.record_of_launch(each, 0, races, SIMULATED, {"network": tidy.MODELLED}, provenance.command_line())
        record["simulation"] = {"place": place, **settings.get(place, {"machines": {}, "steps": 0, "warm_up": []})}
        store.write_record(f"simulated-{first.cluster.name}-{first.wire}-{first.cluster.digest}", record)


def _place(experiment: Experiment) -> str:
    return f"{experiment.cluster.digest} {experiment.wire}"


@contextlib.contextmanager
def _shown(num_cells: int, num_steps: int, show: bool) -> Iterator[Callable[[str, int], None]]:
    """A bar with the time that remains, on stderr, moved on by step; what has no time is told at the end. What it
    yields takes a text, and how far to move on (-1: the text is for a terminal alone)."""
    console = Console(stderr=True, quiet=not show)
    if not num_cells:
        console.print("every cell of this file is simulated already; --fresh begins again", highlight=False)
    with Progress(*columns(), console=console, disable=not (show and num_cells)) as bar:
        task = bar.add_task("planning", total=num_steps)

        def say(text: str, done: int) -> None:
            if done == -1 and not console.is_terminal:
                return
            if text and not console.is_terminal:
                console.print(text, markup=False, highlight=False, soft_wrap=True)
            elif text:
                bar.update(task, description=text)
            if done > 0:
                bar.advance(task, done)

        yield say


# -------------------------------------------------------------------------------------------------------- the answers


def times(run_dir: Path, cells: Sequence[str]) -> list[dict[str, Any]]:
    """Of ``cells`` (digests), a row each, the shortest time of a race first."""
    rows = Store(run_dir).read(damaged="skip")
    rows = rows[(rows["metric"] == "time_s") & rows["cell"].isin(list(cells))]
    order = {cell: at for at, cell in enumerate(cells)}
    found = []
    for cell, here in rows.groupby("cell"):
        directions = set(here["direction"])
        main = next(each for each in ("total", "forward", "backward", "") if each in directions)
        first = here[here["direction"] == main].iloc[0]
        names = ("phase", "model", "cluster", "workload", "dtype", "system", "race", "evidence", "basis")
        error = first["heldout_error"]
        row = {name: first[name] for name in names} | {"cell": cell, "direction": main}
        row["heldout_error"] = None if error != error else error
        row["time_s"] = float(here[here["direction"] == main]["value"].mean())
        found.append(row)
    first_of = {row["race"]: min(order[r["cell"]] for r in found if r["race"] == row["race"]) for row in found}
    return sorted(found, key=lambda row: (first_of[row["race"]], row["time_s"]))


__all__ = ["simulate_suite", "times"]
