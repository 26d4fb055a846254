"""``moebench profile``: measure one cluster, fit what a simulator needs, and add it to the ledger.

A profile has parts, each measured by itself on all ranks: here, by a session on this machine; by the tasks of a Slurm
job in ``harness.sweep.profile``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from harness import ledger
from harness.bench import contention, layer_cost, provenance
from harness.comm import profile as operations
from harness.launch import scratch
from harness.launch.session import open_session
from harness.ledger import Calibration, LayerFit
from harness.specs import Cluster
from harness.topology import check_size

TIMEOUT_S = 300.0
MODEL = "local-m512-e16k2"
PERSONAL = ("host", "job")  # of the provenance; the ledger is shared


@dataclasses.dataclass(frozen=True)
class Part:
    """``target``, "module:function" of (job, ``payload``), is collective; ``fit`` turns the answers of all ranks, and
    whether these have one clock, into fields of a ``Calibration``."""

    name: str  # operations, contention, or the system whose layer it is
    text: str
    target: str
    payload: dict[str, Any] | None
    fit: Callable[[list[Any], bool], dict[str, Any]]


def parts(cluster: Cluster, systems: Iterable[str] = (), model: str = MODEL) -> list[Part]:
    """Collectives and matrix products, contention, and of each of ``systems`` a layer of ``model``. ``UserError`` for
    an unknown system or model, or one that does not fit the ranks."""
    check_size(cluster.name, cluster.shape)

    def fit_operations(answers: list[Any], shared_clock: bool) -> dict[str, Any]:
        fits, products = operations.fit(answers, shared_clock)
        return {"fits": fits, "products": products}

    def fit_contention(answers: list[Any], _: bool) -> dict[str, Any]:
        slowdown, spread = contention.matrix(answers)
        return {"contention": slowdown, "contention_spread": spread}

    text = f"collectives and matrix products on {cluster.num_ranks} ranks of {cluster.name}"
    levels = {"levels": [level.name for level in cluster.levels]}
    return [
        Part("operations", text, "harness.comm.profile:measure", levels, fit_operations),
        Part("contention", "lanes side by side", "harness.bench.contention:measure", None, fit_contention),
        *(_layer(cluster, system, model) for system in systems),
    ]


def _layer(cluster: Cluster, system: str, model: str) -> Part:
    experiments = layer_cost.experiments(cluster, system, model)
    system = experiments[0].system  # a recipe by its one name
    payload = {"experiments": [experiment.model_dump(mode="json") for experiment in experiments]}

    def fit(answers: list[Any], shared_clock: bool) -> dict[str, Any]:
        found = layer_cost.fit(answers, shared_clock)
        return {"layers": {system: LayerFit(model=model, dtype=layer_cost.DTYPE, **found)}}

    return Part(system, f"a layer of {system}", "harness.bench.layer_cost:measure", payload, fit)


def calibration(
    cluster: Cluster,
    found: Iterable[Mapping[str, Any]],
    *,
    systems: Iterable[str],
    evidence: str,
    network: Mapping[str, Any],
    foreign_cores: float,
    duration_s: float,
) -> Calibration:
    """Of what the parts' fits have ``found``."""
    fields: dict[str, Any] = {"layers": {}}
    for each in found:
        fields |= {**each, "layers": fields["layers"] | dict(each.get("layers", {}))}
    facts = provenance.collect(systems)
    return Calibration(
        profiled=cluster,
        evidence=evidence,  # type: ignore[arg-type]
        network=dict(network),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        foreign_cores=foreign_cores,
        duration_s=round(duration_s, 1),
        provenance={key: value for key, value in facts.items() if key not in PERSONAL},
        **fields,
    )


def profile(
    cluster: Cluster,
    say: Callable[[str], None],
    systems: Iterable[str] = (),
    model: str = MODEL,
    folder: Path = ledger.LEDGER,
) -> tuple[Calibration, Path]:
    """All ``parts`` on ranks of this machine. The calibration, and the file of the ledger that it was added to."""
    ledger.check(cluster.name, folder)
    systems = list(systems)
    wanted = parts(cluster, systems, model)
    since = time.monotonic()
    with (
        scratch.logs("profile") as logs,
        open_session(cluster, log_dir=logs.path, preload=("harness.comm.profile",)) as session,
    ):
        others = _Others()
        found = []
        for part in wanted:
            say(part.text)
            found.append(part.fit(session.call(part.target, part.payload, timeout_s=TIMEOUT_S), True))
        made = calibration(
            cluster,
            found,
            systems=systems,
            evidence=session.evidence,
            network=session.network,
            foreign_cores=others.num_cores(),
            duration_s=time.monotonic() - since,
        )
    return made, ledger.record(made, folder)


def busy_s() -> float:
    """Seconds of this machine's cores that were not idle since it was started."""
    total = psutil.cpu_times()
    return float(sum(total) - total.idle - total.iowait - total.guest - total.guest_nice)


class _Others:
    """How many of this machine's cores other programs keep busy from now on."""

    def __init__(self) -> None:
        self._since, self._busy = time.monotonic(), self._busy_s()

    def num_cores(self) -> float:
        return max(0.0, (self._busy_s() - self._busy) / (time.monotonic() - self._since))

    @staticmethod
    def _busy_s() -> float:
        busy = busy_s()
        here = psutil.Process()
        for process in (here, *here.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                busy -= times.user + times.system
        return busy
