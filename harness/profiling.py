"""``moebench profile``: measure one cluster, fit what a simulator needs, and add it to the ledger."""

from __future__ import annotations

import contextlib
import datetime
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from harness import ledger
from harness.bench import contention, layer_cost, provenance
from harness.comm import profile as operations
from harness.launch.session import open_session
from harness.ledger import Calibration, LayerFit
from harness.specs import Cluster

TIMEOUT_S = 300.0
MODEL = "local-m512-e16k2"
PERSONAL = ("host", "job")  # of the provenance; the ledger is shared


def profile(
    cluster: Cluster,
    say: Callable[[str], None],
    systems: Iterable[str] = (),
    model: str = MODEL,
    folder: Path = ledger.LEDGER,
) -> tuple[Calibration, Path]:
    """Measure collectives, matrix products and contention on ``cluster``, and of each of ``systems`` a layer of
    ``model``. The calibration, and the file of the ledger that it was added to."""
    ledger.history(cluster.name, folder)  # a damaged one is found before anything is measured
    layers = {name: layer_cost.experiments(cluster, name, model) for name in systems}
    since = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="moebench-profile-") as logs,
        open_session(cluster, log_dir=Path(logs), preload=("harness.comm.profile",)) as session,
    ):
        others = _Others()
        say(f"collectives and matrix products on {cluster.num_ranks} ranks of {cluster.name}")
        payload = {"levels": [level.name for level in cluster.levels]}
        fits, products = operations.fit(session.call("harness.comm.profile:measure", payload, timeout_s=TIMEOUT_S))
        say("lanes side by side")
        slowdown, spread = contention.matrix(session.call("harness.bench.contention:measure", timeout_s=TIMEOUT_S))
        costs = {}
        for name, experiments in layers.items():
            say(f"a layer of {name}")
            data = {"experiments": [experiment.model_dump(mode="json") for experiment in experiments]}
            found = layer_cost.fit(session.call("harness.bench.layer_cost:measure", data, timeout_s=TIMEOUT_S))
            costs[name] = LayerFit(model=model, dtype=layer_cost.DTYPE, **found)
        foreign_cores = others.num_cores()
        evidence, network = session.evidence, dict(session.network)
    facts = provenance.collect(layers)
    calibration = Calibration(
        profiled=cluster,
        evidence=evidence,
        network=network,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        foreign_cores=foreign_cores,
        duration_s=round(time.monotonic() - since, 1),
        provenance={key: value for key, value in facts.items() if key not in PERSONAL},
        fits=fits,
        products=products,
        contention=slowdown,
        contention_spread=spread,
        layers=costs,
    )
    return calibration, ledger.record(calibration, folder)


class _Others:
    """How many of this machine's cores other programs keep busy from now on."""

    def __init__(self) -> None:
        self._since, self._busy = time.monotonic(), self._busy_s()

    def num_cores(self) -> float:
        return max(0.0, (self._busy_s() - self._busy) / (time.monotonic() - self._since))

    @staticmethod
    def _busy_s() -> float:
        total = psutil.cpu_times()
        busy = sum(total) - total.idle - total.iowait - total.guest - total.guest_nice
        here = psutil.Process()
        for process in (here, *here.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                busy -= times.user + times.system
        return float(busy)
