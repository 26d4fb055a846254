"""Sweep files and cluster files, checked whole before anything is submitted.

A sweep file is an experiments file (``harness.bench.suite``; or ``suite`` names one that comes with moebench, whose run
it fills) that may say ``slurm``, the cluster file it is written for, and ``cells_per_job``. In it, ``cluster: {nodes:
2}`` means two nodes of that Slurm cluster: the ranks are the job's tasks there. Any other cluster is made on one node
by the job itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from harness import presets
from harness.bench import suite as suites
from harness.bench.suite import Suite
from harness.errors import UserError, bad, unknown
from harness.layer import standin
from harness.specs import Cluster, Count, Spec
from harness.sweep import asked

ROOT = Path(__file__).parents[2]
SWEEPS = ROOT / "slurm" / "sweeps"
CLUSTERS = ROOT / "slurm" / "clusters"
_SWEEP_KEYS = ("name", "slurm", "suite", "cells_per_job", "defaults", "experiments")


class SlurmCluster(Spec):
    """How to ask one Slurm cluster for nodes, in the field names of submitit and Hydra's launcher, and what joins them.

    A job's number of nodes and tasks follows from its cells. ``python``: the command that a task is, where that is not
    this very interpreter but one in a container. ``interconnect``: a cluster of ``harness.specs`` whose outermost level
    is nodes; its size is the most that a cell may ask for.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    gres: str | None = None
    comment: str | None = None
    timeout_min: Count = 60
    cpus_per_task: Count | None = None
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    cpus_per_gpu: Count | None = None
    mem_gb: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    exclusive: bool | None = None
    setup: tuple[str, ...] = ()  # lines of the job's script before the command
    srun_args: tuple[str, ...] = ()
    python: str | None = None
    additional_parameters: dict[str, bool | int | float | str] = {}  # any other option of sbatch
    stderr_to_stdout: bool = False
    signal_delay_s: Count = 90  # the job is warned this long before its end, to requeue itself
    array_parallelism: Count = 8  # jobs of an array that run at once
    max_num_timeout: Annotated[int, Field(ge=0)] = 3  # requeues after time-outs
    max_restarts: Annotated[int, Field(ge=0)] = 2  # requeues after the job was killed
    max_array_size: Count = 1000
    cells_per_job: Count = 16
    interconnect: Cluster
    source: str = ""
    interpretation: str = ""


@dataclasses.dataclass(frozen=True)
class ClusterFile:
    """A cluster file, and where it says what."""

    path: Path
    cluster: SlurmCluster

    @property
    def name(self) -> str:
        return self.path.stem

    def line(self, field: str) -> str:
        """``file:line`` that states ``field``; the file where none does."""
        root = yaml.compose(self.path.read_text("utf-8"), Loader=yaml.SafeLoader)
        marks = {key.value: key.start_mark.line + 1 for key, _ in root.value} if root is not None else {}
        return f"{self.path}:{marks[field]}" if field in marks else str(self.path)


@dataclasses.dataclass(frozen=True)
class SweepFile:
    """A sweep that may be submitted."""

    path: Path
    suite: Suite
    slurm: ClusterFile
    cells_per_job: int

    @property
    def name(self) -> str:
        return self.suite.name

    def across_nodes(self, cluster: Cluster) -> bool:
        """Whether a cell's ranks are the tasks of a job, one or more nodes of it, and not made by a single task."""
        return cluster.digest == self.slurm.cluster.interconnect.resized(cluster.shape[0]).digest


def load_cluster(source: Path | str) -> ClusterFile:
    """The cluster file called ``source`` (of slurm/clusters) or at that path."""
    path = _find(source, CLUSTERS, "slurm cluster")
    data = _read(path)
    asked.check(data, path)
    _check_keys(data, SlurmCluster.model_fields, str(path), path)
    found = ClusterFile(path, SlurmCluster.parse(data, str(path)))
    _check_gpus(found)
    _check_sizes(found)
    return found


def load(source: Path | str, cluster: str = "") -> SweepFile:
    """The sweep called ``source`` (of slurm/sweeps) or at that path; ``cluster`` instead of the file's own."""
    path = _find(source, SWEEPS, "sweep")
    data = dict(_read(path))
    _check_keys(data, _SWEEP_KEYS, str(path), path)
    chosen = cluster or data.pop("slurm", None)
    if not isinstance(chosen, str):
        raise bad(f"{path}: slurm", chosen, "name a cluster file of slurm/clusters, or give --cluster")
    data.pop("slurm", None)
    beside = path.parent / chosen
    slurm = load_cluster(beside if not cluster and Path(chosen).suffix else chosen)
    cells_per_job = data.pop("cells_per_job", slurm.cluster.cells_per_job)
    if isinstance(cells_per_job, bool) or not isinstance(cells_per_job, int) or cells_per_job < 1:
        raise bad(f"{path}: cells_per_job", cells_per_job, "must be a whole number of at least 1")
    found = SweepFile(path, _suite(data, path, slurm), slurm, cells_per_job)
    for race in found.suite.races:
        if race.first.cluster.kind == "physical" and not found.across_nodes(race.first.cluster):
            name = race.first.cluster.name
            raise bad(
                f"{path}: cluster", name, f"is no part of {slurm.path}; write {{nodes: n}} for nodes of that cluster"
            )
        for each in race.experiments:
            if each.compute == "stand-in" and (reason := standin.refusal(each.cluster.device_type, each.cluster.gemm)):
                raise bad(f"{found.suite.entries.get(each.digest, path)}.compute", each.compute, reason)
    return found


def _suite(data: dict[str, Any], path: Path, slurm: ClusterFile) -> Suite:
    own = data.pop("suite", None)
    if own is not None:
        if "experiments" in data or "defaults" in data:
            raise bad(f"{path}: suite", own, "stands for defaults and experiments; leave one or the other out")
        if not isinstance(own, str):
            raise bad(f"{path}: suite", own, "must be the name of a suite, or a YAML file of experiments")
        found = suites.load(path.parent / own if presets.is_file(own) else own)
        return dataclasses.replace(found, name=suites.checked_name(f"{path}: name", data.get("name", found.name)))
    if not data.get("experiments"):
        raise bad(f"{path}: experiments", data.get("experiments"), "the sweep has no cells; list at least one")
    for index, entry in enumerate([data.get("defaults"), *data["experiments"]]):
        if isinstance(entry, Mapping) and "cluster" in entry:
            here = f"{path}: {f'experiments[{index - 1}]' if index else 'defaults'}.cluster"
            entry["cluster"] = _allocated(entry["cluster"], here, slurm)  # type: ignore[index]
    return suites.from_data(data, str(path), folder=path.parent, distinct=True, physical=True)


def _allocated(value: Any, here: str, slurm: ClusterFile) -> Any:
    """``{nodes: n}`` as the cluster that it means."""
    if isinstance(value, list):
        return [_allocated(each, here, slurm) for each in value]
    if not isinstance(value, Mapping) or set(value) != {"nodes"}:
        return value
    nodes, known = value["nodes"], slurm.cluster.interconnect
    if isinstance(nodes, bool) or not isinstance(nodes, int) or not 1 <= nodes <= known.shape[0]:
        raise bad(f"{here}.nodes", nodes, f"must be 1 to {known.shape[0]}, the nodes that {slurm.path} describes")
    return known.resized(nodes).model_dump(mode="json")


def _find(source: Path | str, folder: Path, what: str) -> Path:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise bad(f"{what} file", str(path), "no such file")
        return path.resolve()
    known = sorted(each.stem for each in folder.glob("*.yaml"))
    if str(source) not in known:
        raise unknown(what, str(source), known, f"{what}s")
    return folder / f"{source}.yaml"


def _read(path: Path) -> Mapping[str, Any]:
    data = presets.read_yaml(path, "file")
    if not isinstance(data, Mapping):
        raise bad(str(path), data, "must be a mapping")
    return data


def _check_keys(data: Mapping[str, Any], known: Iterable[str], here: str, path: Path) -> None:
    for key in data:
        if key not in known:
            raise unknown(f"{here}: key", str(key), known, "keys")


def _check_sizes(file: ClusterFile) -> None:
    """By Slurm's rules for what is asked, wherever the file says it."""
    fields = file.cluster.model_dump(exclude={"additional_parameters", "interconnect"})
    more = {key.replace("-", "_"): value for key, value in file.cluster.additional_parameters.items()}
    asked.check_sizes({**fields, "mem": fields.pop("mem_gb"), **more}, file.path)


def _check_gpus(file: ClusterFile) -> None:
    """Refuse to have GPUs paid for that no rank would use."""
    words: dict[str, Any] = {key.replace("-", "_"): value for key, value in file.cluster.additional_parameters.items()}
    words |= {"gpus_per_node": file.cluster.gpus_per_node or words.get("gpus_per_node", 0)}
    words |= {"gres": file.cluster.gres} if "gpu" in (file.cluster.gres or "") else {}
    for field in ("gpus_per_node", "gpus", "gpus_per_socket", "gres"):
        if words.get(field) and file.cluster.interconnect.device == "cpu":
            remedy = f"leaves the GPUs of {field} idle; name the GPU (H100, say), or ask for none"
            raise bad(f"{file.path}: interconnect.device", "cpu", remedy)


def place_of(error: str, slurm: ClusterFile) -> UserError:
    """What Slurm refused, in its own words, with the line that had asked for it."""
    lines = [line.strip() for line in error.splitlines() if "sbatch: error:" in line]
    said = "; ".join(line.partition("sbatch: error:")[2].strip() for line in lines) or " ".join(error.split())[-300:]
    named = [
        field for field in ("partition", "account", "qos", "constraint", "gres", "nodelist") if field in said.lower()
    ]
    stated = [field for field in named if getattr(slurm.cluster, field, None)]
    stated = stated or [f for f in ("partition", "account") if named and getattr(slurm.cluster, f)]
    where = ", ".join(slurm.line(field) for field in stated) or str(slurm.path)
    return UserError(f"{where}: Slurm refuses the job: {said}")
