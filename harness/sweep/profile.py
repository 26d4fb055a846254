"""A profile over the nodes of a Slurm cluster: one job whose tasks are the ranks, submitted, frozen, requeued and
followed as any sweep is. Its cells are the parts of the profile and, last, what is added to the ledger.

Every part that is finished is kept, whatever ends the job; one that fails, or that a node's death ends twice, is told
and left out. A layer may be left out of a calibration, but without collectives and products there is none.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import TypeAdapter

from harness import ledger, profiling
from harness.bench import tidy
from harness.bench.run import stamp_of
from harness.bench.store import BLANK, Store
from harness.errors import UserError, bad
from harness.launch.allocation import report
from harness.specs import Cluster
from harness.sweep.folder import SweepFolder, Task
from harness.sweep.spec import ClusterFile

if TYPE_CHECKING:
    from harness.launch.tasks import World

LEDGER = "ledger"  # the last part: nothing is measured
NEEDED = "operations"


def job(slurm: ClusterFile, nodes: int | None, systems: Sequence[str], model: str, folder: Path) -> dict[str, Any]:
    """What the one job of a profile over ``nodes`` (by default all) is to do; it is added to the ledger in ``folder``.
    ``UserError`` for whatever is known to be wrong before it starts."""
    known = slurm.cluster.interconnect
    if nodes is not None and not 1 <= nodes <= known.shape[0]:
        raise bad("--nodes", nodes, f"must be 1 to {known.shape[0]}, the nodes that {slurm.path} describes")
    cluster = known.resized(nodes or known.shape[0])
    ledger.check(cluster.name, folder)
    names = [part.name for part in profiling.parts(cluster, systems, model)]
    tasks = [[0, {"digest": _digest(cluster, name, model), "part": name}] for name in [*names, LEDGER]]
    wanted = {"systems": list(systems), "model": model, "ledger": str(folder.resolve())}
    return {
        "cluster": cluster.model_dump(mode="json"),
        "wire": "recv_first",
        "across": True,
        "profile": wanted,
        "tasks": tasks,
    }


def cells(job: Mapping[str, Any]) -> list[list[Any]]:
    """As ``harness.sweep.states.COLUMNS``."""
    cluster, model = job["cluster"]["name"], job["profile"]["model"]
    return [
        [each["digest"], 0, each["digest"], each["part"], "profile", model, cluster, ""] for _, each in job["tasks"]
    ]


def run(
    world: World,
    folder: SweepFolder,
    job: Mapping[str, Any],
    tasks: Sequence[Task],
    known: Mapping[Task, Mapping[str, tuple[str, str]]],
) -> None:
    """Collective: those ``tasks`` of ``job`` that are left. ``known``: which of them have failed. Rank 0 keeps what is
    found. Raises ``RaceFailure``."""
    from harness.launch import tasks as across

    across.use_wire(world, job["wire"])
    cluster, wanted = Cluster.model_validate(job["cluster"]), job["profile"]
    parts = {_digest(cluster, part.name, wanted["model"]): part for part in _parts(cluster, wanted)}
    keeper = _Keeper(world, folder, job, cluster) if world.job.rank == 0 else None
    for digest, part in parts.items():
        if (digest, 0) not in tasks:
            continue
        if keeper:
            keeper.begin(digest, part.text)
        status, reason = known.get((digest, 0), {}).get(digest, ("ok", ""))
        answers: list[Any] = []
        neighbours, since = _Neighbours(), time.monotonic()
        if status == "ok":
            world.watch.task = digest, 0
            world.job.phase(part.text)
            try:
                answers = across.gathered(world, (_measure(world, part), neighbours.seen()))
            except UserError as error:  # all ranks alike: the system is absent, or refuses
                status, reason = "refused", str(error)
            except Exception as error:
                failure = across.failure_of(world.job, error)
                raise across.RaceFailure(digest, 0, time.time(), failure) from error
        if keeper:
            keeper.end(digest, part, answers, status, reason, time.monotonic() - since)
    if keeper:
        keeper.record()
    across.leave()


def rows(
    part: Mapping[str, Any],
    setting: tidy.Setting,
    cluster: Cluster,
    *,
    took_s: float = float("nan"),
    status: str = "ok",
    reason: str = "",
) -> pd.DataFrame:
    """Of the store: how long a part took, or why there is none."""
    row: dict[str, Any] = dict(BLANK)
    row |= {"run": setting.run, "launch": setting.launch, "race": part["digest"], "cell": part["digest"]}
    row |= {"system": part["part"], "phase": "profile", "cluster": cluster.name, "compute": "real"}
    row |= {"evidence": setting.evidence, "network": str(setting.network["network"]), "rep": -1, "rank": -1}
    row |= {"metric": "time_s" if status == "ok" else "status", "value": took_s, "unit": "s" if status == "ok" else ""}
    row |= {"status": status, "reason": reason, "time_utc": tidy.now_utc(), "schema_version": tidy.SCHEMA_VERSION}
    return pd.DataFrame([row])


class _Keeper:
    """What rank 0 writes down."""

    def __init__(self, world: World, folder: SweepFolder, job: Mapping[str, Any], cluster: Cluster):
        self.world, self.folder, self.job, self.cluster = world, folder, job, cluster
        self.store = Store(folder.run_dir)
        self.setting = tidy.Setting(folder.name, 0, world.evidence, world.network)

    def begin(self, digest: str, text: str) -> None:
        report({"did": "begin", "text": text, **stamp_of(digest, 0)})

    def end(
        self, digest: str, part: profiling.Part, answers: list[Any], status: str, reason: str, took_s: float
    ) -> None:
        """A part is over."""
        if status == "ok":
            shared_clock = self.world.job.shared_clock
            found = part.fit([answer for answer, _ in answers], shared_clock)
            kept = {"found": TypeAdapter(Any).dump_python(found, mode="json"), "took_s": took_s}
            kept["foreign_cores"] = _foreign_cores([seen for _, seen in answers], shared_clock)
            kept |= {"evidence": self.world.evidence, "network": self.world.network, "part": part.name}
            self.folder.write(f"profile/{digest}.json", kept)
        self._store({"digest": digest, "part": part.name}, status, reason, took_s)

    def record(self) -> None:
        """Add to the ledger what there is, unless just that is there already."""
        task = next(each for _, each in self.job["tasks"] if each["part"] == LEDGER)
        kept = {p.stem: self.folder.read(f"profile/{p.name}") for p in (self.folder.path / "profile").glob("*.json")}
        path = self.folder.path / "calibration.json"
        if path.exists() and self.folder.read(path.name)["parts"] == sorted(kept):
            return
        self.begin(task["digest"], "adding the calibration to the ledger")
        since = time.monotonic()
        try:
            if NEEDED not in [each["part"] for each in kept.values()]:
                raise UserError(f"no calibration without {NEEDED}, which have no result; moebench resume tries again")
            added = self._calibration(list(kept.values()))
            where = ledger.record(added, Path(self.job["profile"]["ledger"]))
        except UserError as error:
            self._store(task, "failed", str(error), 0.0)
            return
        data = {"parts": sorted(kept), "ledger": str(where), "calibration": added.model_dump(mode="json")}
        self.folder.write("calibration.json", data)
        self._store(task, "ok", "", time.monotonic() - since)

    def _calibration(self, kept: list[dict[str, Any]]) -> ledger.Calibration:
        of_operations = next(each for each in kept if each["part"] == NEEDED)
        return profiling.calibration(
            self.cluster,
            [each["found"] for each in kept],
            systems=self.job["profile"]["systems"],
            evidence=of_operations["evidence"],
            network=of_operations["network"],
            foreign_cores=max(each["foreign_cores"] for each in kept),
            duration_s=sum(each["took_s"] for each in kept),
        )

    def _store(self, task: Mapping[str, Any], status: str, reason: str, took_s: float) -> None:
        self.store.append(rows(task, self.setting, self.cluster, took_s=took_s, status=status, reason=reason))
        report({"did": "race", **stamp_of(task["digest"], 0)})


class _Neighbours:
    """From now on: how busy this rank's machine is, and how much of that is this rank."""

    def __init__(self) -> None:
        self._begin = self._now()

    def seen(self) -> tuple[str, float, float, float]:
        """Machine, seconds that passed, of its cores those that were busy, of this rank's."""
        passed, busy, own = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return os.uname().nodename, passed, busy, own

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.monotonic(), profiling.busy_s(), time.process_time()


def _foreign_cores(seen: Sequence[tuple[str, float, float, float]], shared_clock: bool) -> float:
    """Cores that other programs kept busy, on the machine where they kept most. Ranks with one clock share one machine,
    whatever their namespaces call it."""
    machines: dict[str, list[tuple[float, float, float]]] = {}
    for host, *times in seen:
        machines.setdefault("" if shared_clock else host, []).append((times[0], times[1], times[2]))
    return max(max(0.0, (of[0][1] - sum(own for *_, own in of)) / of[0][0]) for of in machines.values())


def _measure(world: World, part: profiling.Part) -> Any:
    module, name = part.target.split(":")
    return getattr(importlib.import_module(module), name)(world.job, part.payload)


def _parts(cluster: Cluster, wanted: Mapping[str, Any]) -> list[profiling.Part]:
    return profiling.parts(cluster, wanted["systems"], wanted["model"])


def _digest(cluster: Cluster, name: str, model: str) -> str:
    return hashlib.sha256(f"{cluster.digest} {name} {model}".encode()).hexdigest()[:16]


def run_name(slurm: ClusterFile) -> str:
    """Of a profile that is submitted now."""
    return f"{slurm.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
