"""Which machine prices an experiment: by name, or the best one that is known of its cluster.

auto         profiled where the ledger has the cluster, else published, else data-sheet
profiled     what ``moebench profile`` found on it, but fits that were refused
published    the costs that come with it
data-sheet   the rates of its links and its device
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from harness import ledger
from harness.errors import bad, unknown
from harness.plan.machine import BY_NAME, Machine
from harness.specs import Cluster, Experiment
from harness.topology import Topology

AUTO, PROFILED, PUBLISHED, DATA_SHEET = BASES = ("auto", "profiled", "published", "data-sheet")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """``efficiency`` (share of the device's peak; None: by rows per expert) and ``links`` (None: ports) are for a
    data sheet alone."""

    basis: str = AUTO
    efficiency: float | None = None
    links: str | None = None

    def check(self) -> None:
        """``UserError`` for what no cluster has."""
        if self.basis not in BASES:
            raise unknown("--machine", self.basis, BASES, "machines")
        if self.links is not None and self.links not in BY_NAME:
            raise unknown("--links", self.links, BY_NAME, "links")
        if self.efficiency is not None and not 0 < self.efficiency <= 1:
            raise bad("--efficiency", self.efficiency, "must be a share of the device's peak, above 0 and at most 1")
        self._only_of_a_data_sheet(self.basis if self.basis != AUTO else DATA_SHEET)

    def _only_of_a_data_sheet(self, basis: str, cluster: str = "") -> None:
        for option, value in (("--efficiency", self.efficiency), ("--links", self.links)):
            if value is not None and basis != DATA_SHEET:
                here = f", and {cluster} is priced as {basis}" if cluster else ""
                raise bad(option, value, f"is of a data sheet{here}; add --machine data-sheet, or leave it out")

    def machine(self, experiment: Experiment, folder: Path = ledger.LEDGER) -> Machine:
        """For ``experiment``; ``UserError`` names what its cluster does not state. ``folder``: of the ledger."""
        cluster = experiment.cluster
        calibration = ledger.latest(cluster, folder) if self.basis in (AUTO, PROFILED) else None
        basis = self.basis
        if basis == AUTO:
            stated = cluster.collectives and (cluster.gemm or experiment.phase == "exchange")
            basis = PROFILED if calibration else PUBLISHED if stated else DATA_SHEET
        self._only_of_a_data_sheet(basis, cluster.name)
        if basis == PROFILED:
            calibration = calibration or ledger.profiled(cluster, folder)
            return Machine.profiled(cluster, calibration, experiment.compute)
        if basis == PUBLISHED:
            if not cluster.collectives:
                raise bad(f"cluster {cluster.name}.collectives", {}, f"none is stated; {_otherwise(cluster)}")
            return Machine.published(cluster)
        _check_rates(cluster)
        return Machine.data_sheet(cluster, self.efficiency, links=self.links or "ports")  # type: ignore[arg-type]


def fingerprint(machine: Machine) -> str:
    """Of all that its seconds depend on: 16 hex digits."""
    return hashlib.sha256(repr(machine).encode()).hexdigest()[:16]


def _check_rates(cluster: Cluster) -> None:
    """``UserError`` where a data sheet would take something for free that only was not written down."""
    topology = Topology(cluster.shape)
    for level, link in enumerate(cluster.levels):
        joins = topology.num_units(level) > (topology.num_units(level - 1) if level else 1)
        if joins and link.bandwidth_bytes_per_s is None:
            field = f"cluster {cluster.name}.levels.{level}.bandwidth_bytes_per_s"
            remedy = (
                f"level {link.name} has no rate; state that of one port of a {link.name}, one direction (.inf: free)"
            )
            raise bad(field, None, f"{remedy}, or {_otherwise(cluster)}")
    if cluster.device_flops_per_s is None:
        remedy = f"the device has no rate; state its peak, or {_otherwise(cluster)}"
        raise bad(f"cluster {cluster.name}.device_flops_per_s", None, remedy)


def _otherwise(cluster: Cluster) -> str:
    return f"measure it ({cluster.profile_command})"
