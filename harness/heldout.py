"""The ledger of errors: how far simulated times are from those that ran, on cells that nothing was fitted to.

    python -m harness.heldout                              the ledger: error by basis, phase and system
    python -m harness.heldout results/runs/judge-emulated  take a run in first

Costs of links, products and contention are the profile's. What the processor does beside (``harness.plan.host``) is
fitted on executed cells: of each system and shape on one routing (by the cell's digest), and tested on the others;
where there is one routing only, on ``flat``, and tested on the other systems. Fitted cells have no part in an error.
Nor have cells that are marked ``cpu_bound``: there cores decide that no simulated cluster has; they are counted.

Rows are kept in ``results/ledger/_errors.csv`` and fitted host time beside it in ``_host.json``; a cell of a run that
comes again replaces the one before, and others of that run stay. A ledger that another machine made serves too, and
says so.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness import ledger, outputs
from harness.bench import stats
from harness.bench.store import Store
from harness.errors import UserError, bad
from harness.plan.agreement import agreement
from harness.plan.choice import PROFILED
from harness.plan.graph import Timeline
from harness.plan.host import LINKS, Seconds, amount, beside, merged, unlayered
from harness.plan.machine import Machine
from harness.plan.profiled import Profiled
from harness.simulation import Simulation, simulate
from harness.specs import Experiment

ERRORS, HOSTS = "_errors.csv", "_host.json"  # no cluster is called so
REFERENCE = "flat"  # whose cells tell the host time of a shape that other systems ran under one routing only
NUMBERS = ["measured_s", "predicted_s"]
CELL = ["run", "race", "system", "options"]  # one row each
MAY_LACK = ["low_s", "high_s"]  # the interval of one repetition alone
PROBES, CLOSE = 4, 1e-3  # simulations in which host time is scaled to what ran, and when that is near enough


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One executed cell: ``measured`` its time, ``traces`` its timelines by direction. Of a training ``steps`` were
    timed behind ``warm`` others."""

    experiment: Experiment
    status: str
    measured: stats.Estimate
    traces: Mapping[str, Timeline]
    warm: int = 1
    steps: int = 1

    def simulated(self, machine: Machine, host: Mapping[str, float] | None = None) -> Simulation:
        """The same steps, with ``host`` time."""
        machine = dataclasses.replace(machine, host=dict(host or {}))
        return simulate(self.experiment, machine, steps=self.steps, warm=self.warm)

    @property
    def shape(self) -> str:
        return shape_of(self.experiment)

    @property
    def group(self) -> str:
        """What one fit holds for: a system with its options, at one shape."""
        return f"{self.shape} {self.experiment.system} {json.dumps(self.experiment.options, sort_keys=True)}"


def shape_of(experiment: Experiment) -> str:
    """What host time depends on beside the system."""
    e, tokens = experiment, experiment.workload.tokens_per_rank
    return f"{e.cluster.digest} {e.phase} {e.model.digest} {e.formats} {e.compute} {e.backward} {tokens}"


def cells_of(run: Path) -> list[Cell]:
    """Timed cells of a stored run whose clusters were profiled, in the order of their digests."""
    store = Store(run)
    rows = store.read(damaged="skip")
    rows = rows[(rows["metric"] == "time_s") & rows["status"].isin(["ok", "cpu_bound"])]
    experiments: dict[str, Any] = {}
    warmup: dict[str, int] = {}  # by race
    for record in store.records().values():
        experiments |= record["experiments"]
        warmup |= record.get("warmup", {})
    found = []
    for cell, data in experiments.items():
        here = rows[rows["cell"] == cell]
        if here.empty:
            continue
        direction = "total" if (here["direction"] == "total").any() else "forward"
        times = here[here["direction"] == direction]
        status = "cpu_bound" if (times["status"] == "cpu_bound").any() else "ok"
        experiment, steps = Experiment.model_validate(data), int(times["rep"].nunique())
        warm = max(1, warmup.get(experiment.race, 1))  # the first step is never timed
        found.append(Cell(experiment, status, stats.interval(times), store.trace(cell), warm, steps))
    return found


def compared(cells: list[Cell], folder: Path = ledger.LEDGER) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """A row a cell, and the host time that was fitted, by ``Cell.group`` and of ``REFERENCE`` by ``Cell.shape``."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    hosts: dict[str, dict[str, float]] = {}
    for name, members in groups.items():
        if len(members) > 1 or members[0].experiment.system == REFERENCE:
            hosts[name] = fitted(members[0], folder)
            if members[0].experiment.system == REFERENCE:
                hosts.setdefault(members[0].shape, hosts[name])
    rows = []
    for members in groups.values():
        for number, cell in enumerate(members):
            alone = len(members) == 1
            fit = number == 0 and (not alone or cell.experiment.system == REFERENCE)
            host = hosts.get(cell.group if not alone else cell.shape, {})
            rows.append(_row(cell, "fitted" if fit else "tested", host, folder))
    return pd.DataFrame(rows), hosts


def fitted(cell: Cell, folder: Path = ledger.LEDGER) -> dict[str, float]:
    """Host time with which the cell comes out as it ran: of each task what its trace has, and the rest as a share of
    what goes over links, where buffers are packed and sockets served; less of each where that is too much. None is left
    where the simulation without any is the slower one."""
    machine, wanted = machine_of(cell.experiment, folder), cell.measured.point
    plain = cell.simulated(machine)
    pairs = [(trace, plain.timelines[name]) for name, trace in cell.traces.items() if name in plain.timelines]
    parts: Seconds = merged([beside(*pair) for pair in pairs])
    start, full = _total(plain.samples), _total(cell.simulated(machine, parts).samples)
    if wanted <= start:
        return {}
    if full < wanted:
        if found := _scaled(cell, machine, dict(parts), {LINKS: (wanted - full) / full}, full):
            return found
        parts = merged([parts, _even(plain.timelines)]) if not any(parts.values()) else parts
    return _scaled(cell, machine, {}, parts, start)


def _scaled(cell: Cell, machine: Machine, kept: dict[str, float], more: Seconds, start: float) -> dict[str, float]:
    """``kept`` and so many times ``more`` that the cell comes out as it ran; ``start``: without these. Empty where
    these change nothing."""
    wanted, scale = cell.measured.point, 1.0
    for _ in range(PROBES):
        host = kept | {name: scale * seconds for name, seconds in more.items()}
        reached = _total(cell.simulated(machine, host).samples)
        if reached <= start:
            return {}
        scale *= (wanted - start) / (reached - start)
        if abs(reached / wanted - 1) < CLOSE:
            break
    return {name: seconds for name, seconds in (kept | {n: scale * s for n, s in more.items()}).items() if seconds}


def _even(timelines: Mapping[str, Timeline]) -> dict[str, float]:
    """Where nothing was traced: every task as much."""
    return {
        unlayered(task.name): 1e-3 / float(np.mean(amount(task.cost)))
        for timeline in timelines.values()
        for task in timeline.plan.tasks
    }


def machine_of(experiment: Experiment, folder: Path = ledger.LEDGER) -> Machine:
    return Machine.profiled(experiment.cluster, ledger.profiled(experiment.cluster, folder), experiment.compute)


def _total(samples: Mapping[str, Any]) -> float:
    return float(np.mean(samples["total" if "total" in samples else "forward"]))


def _row(cell: Cell, role: str, host: Mapping[str, float], folder: Path) -> dict[str, Any]:
    experiment = cell.experiment
    predicted = _total(cell.simulated(machine_of(experiment, folder), host).samples)
    options = json.dumps(experiment.options, sort_keys=True) if experiment.options else ""
    return {
        "basis": PROFILED,
        "phase": experiment.phase,
        "system": experiment.system,
        "options": options,
        "cluster": experiment.cluster.name,
        "model": experiment.model.name,
        "workload": experiment.workload.name,
        "compute": experiment.compute,
        "race": experiment.race,
        "status": cell.status,
        "role": role,
        "measured_s": cell.measured.point,
        "low_s": cell.measured.low,
        "high_s": cell.measured.high,
        "predicted_s": predicted,
    }


# --------------------------------------------------------------------------------------------------------- the ledger


def take_in(run: Path, folder: Path = ledger.LEDGER) -> pd.DataFrame:
    """Add a run's cells to the ledger; returns their rows. ``UserError`` where none of them can be compared."""
    if not run.is_dir():
        raise bad("run", str(run), "no such folder; name one of moebench run (results/runs/NAME)")
    cells = [cell for cell in cells_of(run) if ledger.latest(cell.experiment.cluster, folder) is not None]
    if not cells:
        raise bad("run", str(run), "has no timed cell on a profiled cluster; moebench profile NAME first")
    known, known_hosts = read(folder), read_hosts(folder)
    for name in (ERRORS, HOSTS):
        outputs.check(folder / name, "ledger", lambda path: True)  # which was read
    rows, hosts = compared(cells, folder)
    rows.insert(0, "run", run.name)
    rows.insert(1, "machine", machine_here())
    whole = _together(known, rows)
    with outputs.whole(folder / ERRORS) as file:
        whole.to_csv(file, index=False, float_format="%.6g")
    every = known_hosts | {name: {"run": run.name, "seconds": seconds} for name, seconds in hosts.items()}
    with outputs.whole(folder / HOSTS) as file:
        file.write(json.dumps(every, indent=0, sort_keys=True).encode())
    return rows


def read(folder: Path = ledger.LEDGER) -> pd.DataFrame:
    """All rows; an empty frame where there are none. ``UserError`` for a damaged file."""
    path = folder / ERRORS
    try:
        rows = pd.read_csv(path, keep_default_na=False)
        rows[[*NUMBERS, *MAY_LACK]] = rows[[*NUMBERS, *MAY_LACK]].apply(pd.to_numeric)
        if not (np.isfinite(rows[NUMBERS]) & (rows[NUMBERS] > 0)).all(axis=None):
            raise ValueError("a time is no positive number")
        if missing := {"run", "machine", "role", "status", "phase", "system", "race"} - set(rows.columns):
            raise ValueError(f"lacks {min(missing)}")
        return rows
    except FileNotFoundError:
        return pd.DataFrame()
    except (OSError, ValueError, KeyError) as error:
        raise bad("ledger of errors", str(path), f"is damaged ({error}); restore it or move it away") from None


def read_hosts(folder: Path = ledger.LEDGER) -> dict[str, Any]:
    """Fitted host time by ``Cell.group`` or ``Cell.shape``."""
    path = folder / HOSTS
    try:
        found = json.loads(path.read_text("utf-8"))
        for each in found.values():
            if not isinstance(each["run"], str) or not all(0 <= s < np.inf for s in each["seconds"].values()):
                raise ValueError("holds no seconds by task")
        return dict(found)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise bad("ledger of host time", str(path), f"is damaged ({error}); restore it or move it away") from None


def _together(known: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``known`` with ``rows`` for those of the same cells."""
    whole = pd.concat([known, rows])
    return whole.drop_duplicates([name for name in CELL if name in whole], keep="last", ignore_index=True)


def read_all(folder: Path = ledger.LEDGER) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Rows and host time of ``folder`` and, of what it does not know, of the ledger that ships."""
    rows, hosts = pd.DataFrame(), dict[str, Any]()
    for place in reversed(ledger.places(folder)):
        found = read(place)
        rows, hosts = _together(rows, found) if len(found) else rows, hosts | read_hosts(place)
    return rows, hosts


def machine_here() -> str:
    """What tells one computer from another in the ledger, without naming it."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """By basis, phase and system (``all``: of the phase, of everything): tested cells, those left out because cores
    decided, mean, 95th percentile and largest of the absolute error, bias, Kendall's tau over pairs of a race whose
    measured intervals do not overlap, and how many these are."""
    found: list[dict[str, Any]] = []
    if rows.empty:
        return pd.DataFrame(found)
    parts = [(("all", "all"), rows)]
    parts += [((str(phase), "all"), here) for phase, here in rows.groupby("phase", sort=False)]
    parts += [((str(p), str(s)), here) for (p, s), here in rows.groupby(["phase", "system"], sort=False)]
    for (phase, system), here in parts:
        clean = here[here["status"] == "ok"]
        tested = clean[clean["role"] == "tested"]
        met = agreement(tested) if len(tested) else None
        tau, pairs = ordered(clean)
        found.append(
            {
                "phase": phase,
                "system": system,
                "tested": len(tested),
                "cpu_bound": int((here["status"] == "cpu_bound").sum()),
                "mean": met.mean_error if met else np.nan,
                "p95": met.p95_error if met else np.nan,
                "largest": met.largest_error if met else np.nan,
                "bias": met.bias if met else np.nan,
                "tau": tau if system == "all" else np.nan,
                "pairs": pairs if system == "all" else 0,
            }
        )
    return pd.DataFrame(found)


def ordered(rows: pd.DataFrame) -> tuple[float, int]:
    """Kendall's tau over the pairs of every race that are really different, averaged by pairs; and their number."""
    agree, pairs = 0, 0
    for _, race in rows.groupby("race"):
        cells = race.to_dict("records")
        for i, one in enumerate(cells):
            for other in cells[i + 1 :]:
                if one["low_s"] > other["high_s"] or other["low_s"] > one["high_s"]:
                    same = (one["measured_s"] < other["measured_s"]) == (one["predicted_s"] < other["predicted_s"])
                    agree, pairs = agree + (1 if same else -1), pairs + 1
    return (agree / pairs if pairs else np.nan), pairs


def known(experiment: Experiment, machine: Machine, folder: Path = ledger.LEDGER) -> tuple[Machine, float | None]:
    """``machine`` with what the ledger knows of the experiment's host time, said in its basis; and the mean absolute
    error of the system in this phase on tested cells, None where there are none. Machines that no profile is behind
    stay as they are."""
    if not isinstance(machine.links, Profiled):
        return machine, None
    rows, hosts = _read_once(folder, _stamps(folder))
    asked = Cell(experiment, "", stats.Estimate(0, 0, 0, 0, 0), {})
    name = next((name for name in (asked.group, asked.shape) if name in hosts), None)
    if name is None:
        basis = f"{machine.basis}; extrapolated: nothing of this shape has run"
        machine = dataclasses.replace(machine, basis=basis)
    else:
        host = {str(task): float(seconds) for task, seconds in hosts[name]["seconds"].items()}
        machine = dataclasses.replace(machine, host=host, basis=f"{machine.basis}; host time of {hosts[name]['run']}")
    if rows.empty:
        return machine, None
    here = rows[(rows["phase"] == experiment.phase) & (rows["system"] == experiment.system)]
    here = here[(here["role"] == "tested") & (here["status"] == "ok")]
    return machine, agreement(here).mean_error if len(here) else None


def _stamps(folder: Path) -> tuple[Any, ...]:
    """Of all files that are read; of one that is not there, None."""
    found: list[Any] = []
    for path in (place / name for place in ledger.places(folder) for name in (ERRORS, HOSTS)):
        try:
            found.append(outputs.stamp(path))
        except OSError:
            found.append(None)
    return tuple(found)


@functools.lru_cache(maxsize=4)
def _read_once(folder: Path, stamps: tuple[Any, ...]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """As they are since ``stamps``."""
    return read_all(folder)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & {*arguments}:
        sys.stdout.write(__doc__ or "")
        return 0
    try:
        for run in arguments:
            rows = take_in(Path(run))
            sys.stderr.write(f"{run}: {len(rows)} cells taken in\n")
        rows, _ = read_all()
        if rows.empty:
            raise UserError("ledger of errors: empty; python -m harness.heldout results/runs/NAME takes a run in")
        table = summary(rows)
        for column in ("mean", "p95", "largest", "bias"):
            table[column] = table[column].map(lambda value: "" if value != value else f"{100 * value:.1f} %")
        table["tau"] = table["tau"].map(lambda value: "" if value != value else f"{value:.2f}")
        sys.stdout.write(table.to_string(index=False) + "\n")
        made = sorted(set(rows["machine"]))
        if made != [machine_here()]:
            sys.stdout.write(f"of {', '.join(made)}; on this machine ({machine_here()}) extrapolated\n")
    except UserError as error:
        sys.stderr.write(f"heldout: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
