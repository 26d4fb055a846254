"""Synthetic runs that follow the store's schema exactly. Their numbers are made up and exist in these tests only."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness import presets
from harness.bench.store import COLUMNS, SCHEMA_VERSION, Store
from harness.specs import Experiment

#: made-up seconds of one exchange of each system, and of the bytes that it sends over the node link
SECONDS = {"megatron": 1.6, "flat": 1.4, "hiermoe-hd2": 0.37, "tutel": 1.42}
BYTES = {"megatron": 67e6, "flat": 67e6, "hiermoe-hd2": 16.8e6, "tutel": 67e6}


class RunMaker:
    """Appends made-up cells to the store in ``path``."""

    def __init__(self, path: Path):
        self.path = path
        self.store = Store(path)
        self.store.prepare()
        self.random = np.random.default_rng(0)
        self.experiments: dict[str, dict[str, Any]] = {}
        self.certificates: dict[str, dict[str, Any]] = {}

    def base(self, experiment: Experiment, launch: int) -> dict[str, Any]:
        """Columns that all rows of one cell and launch share."""
        self.experiments[experiment.digest] = experiment.model_dump(mode="json")
        return {
            "run": self.path.name, "launch": launch, "race": experiment.race, "cell": experiment.digest,
            "system": experiment.system, "phase": experiment.phase, "model": experiment.model.name,
            "cluster": experiment.cluster.name, "workload": experiment.workload.name, "dtype": experiment.dtype,
            "wire": experiment.wire, "evidence": "emulated",
            "network": "shaped" if experiment.cluster.kind == "emulated" else "unshaped", "compute": "real",
            "direction": "", "level": "", "unit": "", "rep": -1, "rank": -1, "status": "ok", "reason": "",
            "time_utc": "2026-01-01T00:00:00+00:00", "schema_version": SCHEMA_VERSION,
        }  # fmt: skip

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
        for _, part in frame.groupby("launch"):
            self.store.append(part)

    def timed(self, experiment: Experiment, seconds: float, *, launches: int = 3, reps: int = 4, noise: float = 0.01,
              skew: float = 1.0, node_bytes: float = 0.0, status: str = "ok", reason: str = "") -> None:  # fmt: skip
        """A cell with times, bytes, speed of light and max/mean."""
        rows = []
        directions = {"forward": 0.45, "backward": 0.55, "total": 1.0}
        for launch in range(launches):
            base = self.base(experiment, launch) | {"status": status, "reason": reason}
            for direction, share in directions.items():
                for rep in range(reps):
                    value = seconds * share * float(np.exp(noise * self.random.standard_normal()))
                    rows.append(
                        {**base, "metric": "time_s", "direction": direction, "value": value, "unit": "s", "rep": rep}
                    )
                light = {"metric": "speed_of_light_s", "value": node_bytes / 2 / 50e6 * share, "unit": "s"}
                rows += [{**base, **light, "direction": direction}] if node_bytes else []
                line = {"direction": direction, "level": "node", "unit": "bytes"}
                planned = node_bytes * share
                rows += [{**base, **line, "metric": "bytes_planned", "value": planned}] if node_bytes else []
                for rep in range(reps) if node_bytes and direction != "total" else ():  # interfaces know no total
                    rows.append({**base, **line, "metric": "bytes_counted", "value": planned * 1.031, "rep": rep})
            for level, excess in (("expert", 1.5), ("rank", 1.0), ("node", 0.2), ("link", 0.3)):
                value = 1 + (skew - 1) * excess
                rows.append({**base, "metric": "max_over_mean", "level": level, "value": value, "unit": "1"})
        self.append(rows)
        self.certificates[experiment.race] = {
            "digest": f"{abs(hash(experiment.workload.name)):016x}"[:16],
            "tokens": [2048] * experiment.cluster.num_ranks,
            "max_over_mean": {"expert": 1 + (skew - 1) * 1.5, "rank": skew, "node": 1.0, "link": 1.0},
            "num_empty_experts": 0,
        }

    def trained(self, experiment: Experiment, seconds: float, *, steps: int = 20, apart: float = 0.0) -> None:
        """A train_step cell: losses and times."""
        self.timed(experiment, seconds, launches=2)
        rows = []
        for launch in range(2):
            for step in range(steps):
                loss = 5.5 * float(np.exp(-step / 15)) * (1 + apart * step)
                line = {"metric": "loss", "value": loss, "unit": "nats", "rep": step}
                rows.append({**self.base(experiment, launch), **line})
        self.append(rows)

    def without_time(self, experiment: Experiment, status: str, reason: str, launches: int = 1) -> None:
        """A cell that only says why it has no time."""
        line = {"metric": "status", "value": float("nan"), "status": status, "reason": reason}
        self.append({**self.base(experiment, launch), **line} for launch in range(launches))

    def write_records(self, **more: Any) -> None:
        record = {
            "experiments": self.experiments, "certificates": self.certificates,
            "network": {"shaped": True, "rate": "400 Mbit/s", "congestion_control": "cubic"},
            "versions": {"python": "3.11", "torch": "2.13.0"}, "git": {"commit": "0" * 40, "diff": ""},
            "host": "synthetic", **more,
        }  # fmt: skip
        self.store.write_record("launch-0", record)


def experiment(system: str, workload: str = "balanced-2048", cluster: str = "emulated-2x4",
               model: str = "local-m1024-e64k8", phase: str = "exchange", **fields: Any) -> Experiment:  # fmt: skip
    """A real experiment of presets, so that races and digests are the real ones."""
    return Experiment(
        model=presets.model(model), cluster=presets.cluster(cluster), workload=presets.workload(workload),
        system=system, phase=phase, **fields,
    )  # fmt: skip


def fill(maker: RunMaker) -> None:
    """Everything that a page can show."""
    for workload, skew in (("balanced-2048", 1.0), ("zipf-2", 2.0), ("zipf-4", 4.0)):
        for cluster in ("emulated-2x4", "local-8"):
            for system, seconds in SECONDS.items():
                cell = experiment(system, workload, cluster)
                if cluster == "local-8":
                    overloaded = {"status": "cpu_bound", "reason": "1.9 of 2 cores in use; the limit is 1.5"}
                    maker.timed(cell, 0.1 + seconds / 50, skew=skew, launches=1, noise=0.05, **overloaded)
                else:
                    maker.timed(cell, seconds * skew**0.3, skew=skew, node_bytes=BYTES[system])
    for system, seconds in SECONDS.items():
        train = experiment(system, "balanced-512", "local-2", "gpt-tiny-moe", "train_step", dtype="float32")
        maker.trained(train, seconds / 10, apart=1e-7 if system == "tutel" else 0.0)
    hostile = '<script>alert("reason")</script> & no CUDA'
    maker.without_time(experiment("deepspeed"), "refused", hostile)
    maker.without_time(experiment("deepspeed", "zipf-2"), "hung", "rank 3 sat in dispatch for 60 s")
    maker.timed(experiment("tutel", options={"two_dh": True}), 1.3, node_bytes=BYTES["tutel"])
    maker.write_records()
