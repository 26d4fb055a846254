"""Sweep and cluster files: what they expand to, and one line for whatever is wrong with them."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness.bench.store import STATUSES
from harness.errors import UserError
from harness.sweep import profile, script, spec, states, submit
from harness.sweep.folder import SweepFolder
from tests.sweep.conftest import ONE_RANK

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(path.stem for path in spec.SWEEPS.glob("*.yaml")))
def test_every_sweep_that_comes_with_moebench_is_accepted(name):
    loaded = spec.load(name)
    assert loaded.name == (name if name == "smoke" else f"{name}-emulated")  # the run that a paper's page reads
    parts = submit.parts(loaded, set())
    cells = sum(len(race.experiments) * race.launches for race in loaded.suite.races)
    assert sum(len(race.experiments) for part in parts for _, race in part.plan.tasks) == cells


@pytest.mark.parametrize("name", sorted(path.stem for path in spec.CLUSTERS.glob("*.yaml")))
def test_every_cluster_file_is_accepted(name):
    assert spec.load_cluster(name).cluster.interconnect.levels[0].name == "node"


def test_cells_are_grouped_by_what_they_need(sweep_file):
    loaded = spec.load(sweep_file("g", num_races=5, cells_per_job=4, cluster=[ONE_RANK, {"nodes": 2}], launches=2))
    parts = submit.parts(loaded, set())
    assert {(p.nodes, p.tasks_per_node) for p in parts} == {(1, 1), (2, 2)}
    assert all(len(p.plan.tasks) <= 4 and len(p.plan.launches) == 1 for p in parts)
    assert len(parts) == 2 * 2 * 2
    one = parts[0].plan.tasks[0]
    done = {(one[1].first.digest, one[0])}
    assert sum(len(p.plan.tasks) for p in submit.parts(loaded, done)) == 19


def test_on_this_machine_a_job_makes_emulated_nodes_itself_and_no_physical_ones(sweep_file, tmp_path):
    loaded = spec.load(sweep_file("here", cluster={"nodes": 2}))
    assert [(p.nodes, p.tasks_per_node) for p in submit.parts(loaded, set(), on="local")] == [(1, 1)]
    file = sweep_file("there", cluster={"nodes": 2})
    interconnect = loaded.slurm.cluster.interconnect.model_dump(mode="json")
    change(file, "cluster.yaml", interconnect=interconnect | {"kind": "physical", "device": "H100"})
    with pytest.raises(UserError, match=r"--on: 'local': cluster .* is nodes of .*cluster\.yaml; use slurm"):
        submit.submit(spec.load(file), tmp_path / "run", on="local")


def test_a_dry_run_shows_the_script_and_writes_nothing(sweep_file, tmp_path):
    loaded = spec.load(sweep_file("dry", num_races=3, cells_per_job=1, cluster={"nodes": 2}))
    (script,) = submit.scripts(loaded, tmp_path / "dry")
    for line in ("--array=0-2%3", "--nodes=2", "--ntasks-per-node=2", "--partition=normal", "--signal=B:USR2@30"):
        assert f"#SBATCH {line}" in script
    assert "export GLOO_SOCKET_IFNAME=eth0" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_dry_run_on_this_machine_lists_its_jobs(sweep_file, tmp_path):
    loaded = spec.load(sweep_file("dry-here", num_races=3, cells_per_job=2))
    rows = submit.listed(loaded, tmp_path / "dry", launches=2)
    assert [(row["job"], row["launch"], row["cluster"], row["cells"]) for row in rows] == [
        (0, 0, "one", 2),
        (1, 0, "one", 1),
        (2, 1, "one", 2),
        (3, 1, "one", 1),
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("example-gpu", f"{shlex.quote(sys.executable)} -u -m submitit"),
        ("example-pyxis", "--container-mounts=/shared:/shared .* /opt/conda/envs/moebench/bin/python -u -m submitit"),
        ("example-apptainer", "apptainer exec --nv --bind /shared .*sif /opt/.*/python -u -m submitit"),
    ],
)
def test_the_examples_as_sbatch_gets_them(tmp_path, name, task):
    slurm = spec.load_cluster(name)
    job = profile.job(slurm, 2, [], "local-m512-e16k2", tmp_path)
    (text,) = script.texts(SweepFolder(tmp_path / "run"), slurm.cluster, [submit.shape_of(job)])
    for line in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--signal=B:USR2@120"):
        assert f"#SBATCH {line}" in text
    command = text.strip().splitlines()[-1]
    assert re.search(f"^srun .*--distribution=block:block --cpu-bind=cores .*{task}", command)
    assert 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in text
    assert not re.search("module load|NCCL_SOCKET_IFNAME", text)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not list(tmp_path.iterdir())


def change(file: Path, name: str, /, **fields: object) -> None:
    path = file.parent / name
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sweep.yaml", {"experiments": []}, "experiments: \\[\\]: the sweep has no cells; list at least one"),
        ("sweep.yaml", {"throttle": 3}, "key: 'throttle': unknown; .*known keys are name, slurm"),
        ("sweep.yaml", {"cells_per_job": 0}, "cells_per_job: 0: must be a whole number"),
        ("sweep.yaml", {"name": "../x"}, "name: '../x': must be a word"),
        ("sweep.yaml", {"slurm": "one-machin"}, "slurm cluster: 'one-machin': unknown; did you mean 'one-machine'"),
        ("sweep.yaml", {"suite": "quick"}, "suite: 'quick': stands for defaults and experiments"),
        ("cluster.yaml", {"partitoin": "x"}, "key: 'partitoin': unknown; did you mean 'partition'\\?"),
        ("cluster.yaml", {"timeout_min": 0}, "cluster.yaml.timeout_min: 0"),
        (
            "cluster.yaml",
            {"gpus_per_node": 2},
            "interconnect.device: 'cpu': leaves the GPUs of gpus_per_node idle",
        ),
        ("cluster.yaml", {"gres": "gpu:a100:2"}, "interconnect.device: 'cpu': leaves the GPUs of gres idle; name"),
        (
            "cluster.yaml",
            {"additional_parameters": {"gpus-per-node": 2}},
            "interconnect.device: 'cpu': leaves the GPUs of gpus_per_node idle",
        ),
    ],
)
def test_bad_files(sweep_file, name, fields, message):
    file = sweep_file("bad")
    change(file, name, **fields)
    with pytest.raises(UserError, match=message):
        spec.load(file)


def test_stand_ins_on_gpus_are_refused_before_a_dry_run(sweep_file):
    file = sweep_file("standing", cluster={"nodes": 2}, compute="stand-in")
    interconnect = yaml.safe_load((file.parent / "cluster.yaml").read_text())["interconnect"]
    with pytest.raises(UserError, match=r"experiments\[0\]\S*: 'stand-in': stand-in compute needs the gemm constants"):
        spec.load(file)
    change(file, "cluster.yaml", interconnect=interconnect | {"kind": "physical", "device": "H100"})
    with pytest.raises(UserError, match="'stand-in': stand-in compute is for ranks that share a CPU; on a GPU give"):
        spec.load(file)


def test_every_state_is_well_open_or_failed():
    well = {"ok", "cpu_bound", "refused"}
    assert {*states.STATES} == well | {*states.OPEN, *states.FAILED, "unsubmitted", "cancelled"}
    assert {*STATUSES} - well <= {*states.FAILED}


def test_two_cells_with_one_identity(sweep_file):
    file = sweep_file("twice", system=["flat", "flat"])
    with pytest.raises(UserError, match=r"experiments\[0\]: .*is in this file twice \(identity [0-9a-f]{16}\)"):
        spec.load(file)


REAL = {"name": "real", "kind": "physical", "levels": [{"name": "node", "size": 2}, {"name": "gpu", "size": 4}]}


@pytest.mark.parametrize(("cluster", "message"), [({"nodes": 3}, "must be 1 to 2"), (REAL, "is no part of")])
def test_a_cluster_that_the_nodes_do_not_make(sweep_file, cluster, message):
    file = sweep_file("wrong", cluster=cluster)
    with pytest.raises(UserError, match=message):
        spec.load(file)


def test_slurms_commands_are_missing(sweep_file, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--on: 'slurm': sbatch, srun, .* not found; .*use --on local"):
        submit.submit(spec.load(sweep_file("none")), tmp_path / "none", on="slurm")


@pytest.mark.skipif(not shutil.which("unshare"), reason="unshare is not installed")
def test_results_on_a_read_only_disk(sweep_file, tmp_path):
    words = [
        sys.executable,
        "-m",
        "harness",
        "sweep",
        str(sweep_file("r")),
        "--on",
        "local",
        "--results",
        str(tmp_path),
    ]
    script = f'mount -t tmpfs -o ro tmpfs {tmp_path} && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *words]
    done = subprocess.run(inside, cwd=ROOT, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    assert done.returncode == 2, done.stderr
    assert "Read-only file system: choose a folder that you may write" in done.stderr


GPUS = {"gpus_per_node": 2, "interconnect": {**REAL, "device": "H100"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mem_gb": 4, "mem_per_cpu": "2GB"}, r"mem_gb and mem_per_cpu: .*Slurm takes one of them"),
        ({"mem_gb": 4, "additional_parameters": {"mem-per-cpu": "2G"}}, "Slurm takes one of them"),
        ({"mem_per_cpu": "2.5GB"}, r"mem_per_cpu: '2.5GB': Slurm takes whole numbers"),
        ({"mem_per_cpu": "1K"}, "at least 1M"),
        ({"mem_per_cpu": "0"}, "mem_per_cpu: '0'"),
        ({"additional_parameters": {"mem": "lots"}}, "mem: 'lots': Slurm takes whole numbers"),
        ({"mem_gb": 1e-6}, "mem_gb: 1e-06: is less than 1 MB, and 0 MB would be the whole node"),
        ({"mem_gb": float("nan")}, "mem_gb"),
        ({"additional_parameters": {"array": "0-3"}}, "array: '0-3': is moebench's own; it follows"),
        ({"additional_parameters": {"arr": "0-3"}}, "'arr': unknown; did you mean 'array'"),
        ({"additional_parameters": {"time": 3}}, "time: 3: is moebench's own; write timeout_min"),
        ({"additional_parameters": {"no-requeue": True}}, "write max_restarts"),
        ({"additional_parameters": {"nope": 1}}, "'nope': unknown; "),
        ({"additional_parameters": {"partition": "b"}}, "partition: 'b': is also said by partition"),
        ({"additional_parameters": {"mail_user": "a@b", "mail-user": "c@d"}}, "is also said by additional_parameters"),
        ({"additional_parameters": {"hold": "x"}}, "hold: 'x': is a switch"),
        ({"additional_parameters": {"contiguous": False}}, "write true, or leave it out"),
        ({"additional_parameters": {"reservation": True}}, "reservation: True: needs a value"),
        ({"additional_parameters": {"nice": False}}, "leave it out"),
        ({"additional_parameters": {"reservation": "a\n#SBATCH --array=1"}}, "must be one line of text"),
        ({"comment": "a\nb"}, "comment: .*must be one line of text"),
        ({"account": " "}, "account: ' ': must be one line of text"),
        ({"srun_args": ["--nod=3"]}, "srun_args: --nod: '3': is moebench's own"),
        ({"srun_args": ["-N", "3"]}, "srun_args: -N: '3': is moebench's own"),
        ({"signal_delay_s": 90, "timeout_min": 1}, "signal_delay_s: 90: must be at most 59"),
        ({"signal_delay_s": 70000, "timeout_min": 9999}, "must be at most 65535"),
        ({"cpus_per_gpu": 2}, "cpus_per_gpu: 2: of no GPUs"),
        ({**GPUS, "cpus_per_gpu": 2, "cpus_per_task": 2}, "Slurm takes it or cpus_per_task"),
        ({"mem_per_gpu": "2G"}, "mem_per_gpu: '2G': of no GPUs"),
    ],
)
def test_what_slurm_would_refuse_or_take_for_something_else(sweep_file, fields, message):
    file = sweep_file("asked")
    change(file, "cluster.yaml", **fields)
    with pytest.raises(UserError, match=message) as error:
        spec.load_cluster(file.parent / "cluster.yaml")
    assert "\n" not in str(error.value)


def test_what_is_asked_for_is_what_sbatch_reads(sweep_file, tmp_path):
    file = sweep_file("asked", cluster={"nodes": 2})
    more = {"mail-user": "a b@c", "hold": True, "exclusive": "user", "nice": 5}
    change(file, "cluster.yaml", exclusive=None, mem_gb=1.5, additional_parameters=more)
    (text,) = submit.scripts(spec.load(file), tmp_path / "run")
    asked = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"mem=1536MB", "mail-user='a b@c'", "hold", "exclusive=user", "nice=5"} <= asked
    change(file, "cluster.yaml", mem_gb=None, mem_per_cpu="2500M")
    (text,) = submit.scripts(spec.load(file), tmp_path / "run")
    assert "#SBATCH --mem-per-cpu=2500M\n" in text
    assert "--mem=" not in text
