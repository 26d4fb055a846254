"""Several nodes over one file system that shows them its files at different ages: only rank 0 looks, the others are
told, and how a job ended is told by Slurm's words on the node itself. On a real Slurm where there can be one."""

from __future__ import annotations

import datetime
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from harness.bench.checkpoint import Checkpoints
from harness.caches import CACHES, use_scratch
from harness.comm.agree import attempt, failed
from harness.comm.job import Job
from harness.errors import UserError
from harness.launch import tasks
from harness.sweep import script, spec, submit
from harness.sweep.folder import SweepFolder, deaths
from harness.sweep.sbatch import full
from harness.sweep.worker import failures
from harness.topology import Topology
from tests.sweep.conftest import (
    NODES,
    ON_TWO_RANKS,
    TIMED,
    all_done,
    frozen_with,
    go_on_in_second_start,
    held,
    settle,
    told,
    until,
)

ROOT = Path(__file__).parents[2]

#: what every rank but the first would see of the run folder: nothing, as if it had looked there just before
BLIND = (
    """        return {pair for pair, told in self.outcomes().items() if told[-1]}""",
    """        import os
        assert os.environ["SLURM_PROCID"] == "0", "this rank sees old files"
        return {pair for pair, told in self.outcomes().items() if told[-1]}""",
)
#: as NCCL's watchdog does it: a word, then SIGABRT, on one rank while the others wait for it
ABORTS = f"""{TIMED}            if (job.rank, rep, experiment.workload.seed) == (1, 1, 1):
                import os, sys
                sys.stderr.write("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(OpType=ALLTOALL)\\n")
                sys.stderr.flush()
                os.abort()
"""


@pytest.mark.long  # of ranks that fail, and of the script's answers, there are shorter tests
def test_a_rank_that_nccl_aborts_costs_its_cell_and_no_other(one_machine, sweep_file, tmp_path, monkeypatch):
    changes = {"harness/bench/store.py": BLIND, "harness/bench/race.py": (TIMED, ABORTS)}
    monkeypatch.setattr(submit, "freeze", frozen_with(changes))
    file = sweep_file("aborts", num_races=3, cells_per_job=3, **ON_TWO_RANKS)
    sweep = submit.submit(spec.load(file), tmp_path / "aborts", on="slurm")
    counts = settle(sweep)
    assert counts.pop("hung") == 1, sweep.cells()["reason"].tolist()
    all_done(counts, 2)
    (cell,) = (cell for cell in sweep.cells().to_dict("records") if cell["state"] == "hung")
    assert "killed 2 times while this race ran, the last time n1: task 1: Aborted" in cell["reason"]
    assert "Watchdog caught collective operation timeout" in cell["reason"]
    events = [event["did"] for event in sweep.folder.events(0)]
    assert events.count("start") == 3
    assert events.count("killed") == 2
    assert len(list(sweep.folder.run_dir.glob("rows-*.parquet"))) == 3  # what was finished did not run again


#: somebody else listens where the ranks of a job's first start would meet
TAKEN = f"""from __future__ import annotations
import os, random, socket, sys, time
PORTS = {tasks.PORTS}
{inspect.getsource(tasks.port)}
with socket.create_server(("", port({{**os.environ, "SLURM_STEP_ID": "0"}}))):
    open(sys.argv[1], "w").close()
    time.sleep(300)
"""


def test_a_warned_job_requeues_without_slurm_in_its_tasks(one_machine, sweep_file, tmp_path, monkeypatch):
    """As in a container: no ``scontrol`` there. And where the ranks of its first start meet, somebody else listens."""
    (tmp_path / "taken.py").write_text(TAKEN)
    listens, go = tmp_path / "listens", tmp_path / "go"
    file = sweep_file(
        "contained",
        python=f"env PATH={tmp_path} {sys.executable}",
        setup=[
            "export GLOO_SOCKET_IFNAME=eth0",
            f"[ -e {listens} ] || {sys.executable} -S {tmp_path}/taken.py {listens} &",
            f"until [ -e {listens} ]; do sleep 0.1; done",
        ],
        **ON_TWO_RANKS,
    )
    monkeypatch.setattr(submit, "freeze", frozen_with(held(0, go)))
    sweep = submit.submit(spec.load(file), tmp_path / "contained", on="slurm")
    until(lambda: "begin" in told(sweep), sweep)
    (number,) = sweep.folder.submissions()[0]["ids"].values()
    subprocess.run(["scancel", "--batch", "--signal=USR2", number], check=True)
    (end,) = go_on_in_second_start(sweep, go)
    assert end["did"] == "stop"
    all_done(settle(sweep), 1)
    events = told(sweep)
    assert (events.count("start"), events.count("stop")) == (2, 1)
    assert not {"failed", "error", "killed"} & set(events)
    log = (sweep.folder.submitit / f"{number}_0_log.err").read_text()
    assert "is taken; starting again" in log


@pytest.mark.long
def test_ranks_of_a_node_that_do_not_follow_one_another(one_machine, sweep_file, tmp_path):
    file = sweep_file("cyclic", cluster={"nodes": 2}, srun_args=["--distribution=cyclic"])
    sweep = submit.submit(spec.load(file), tmp_path / "cyclic", on="slurm")
    assert settle(sweep) == {"crashed": 1}
    (cell,) = sweep.cells().to_dict("records")
    assert "ranks in their order: '1 on n0, 1 on n1, 1 on n0, 1 on n1': ranks of a node must follow" in cell["reason"]
    assert [event["did"] for event in sweep.folder.events(0)] == ["error"] * 4  # once, on each rank


LIMITED = """#!/bin/sh
# the real sbatch, and as of an association that may have 3 jobs in the queue
eval script=\\${{$#}}
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
if [ $(($(squeue -h -r -n limited | wc -l) + ${{last:-0}} + 1)) -gt 3 ]; then
    echo 'sbatch: error: {limit}' >&2
    echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)" >&2
    exit 1
fi
exec {sbatch} "$@"
"""


def test_a_limit_of_jobs_in_the_queue_is_a_full_queue(one_machine, sweep_file, tmp_path, monkeypatch):
    path = subprocess.run(["which", "sbatch"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "sbatch").write_text(LIMITED.format(limit="AssocMaxSubmitJobLimit", sbatch=path))
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    loaded = spec.load(sweep_file("limited", num_races=5, cells_per_job=1, setup=["sleep 60"]))
    words = r"queue of Slurm is full \(AssocMaxSubmitJobLimit\): 3 of 5 jobs are in it; moebench resume limited"
    with pytest.raises(UserError, match=words):
        submit.submit(loaded, tmp_path / "limited", on="slurm")
    sweep = submit.Sweep.attach(tmp_path / "limited")
    submit.cancel(sweep)
    assert sweep.counts()["unsubmitted"] == 2


@pytest.mark.parametrize(
    "word",
    [
        "AssocGrpSubmitJobsLimit",
        "QOSMaxSubmitJobPerUserLimit",
        "QOSMaxSubmitJobPerAccountLimit",
        "QOSGrpSubmitJobsLimit",
    ],
)
def test_slurms_words_for_a_limit(word):
    assert full(f"sbatch: error: {word}\nsbatch: error: Batch job submission failed: Job violates policy") == word
    assert full("sbatch: error: QOSMaxWallDurationPerJobLimit") == ""


# ------------------------------------------------------------------------------------------------------ without a Slurm


def restored(rank: int, folder: str, out: str) -> None:
    """Rank 1 still sees the folder as it was before the training had a checkpoint."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters())
    own = Checkpoints(Path(folder) / "whole", 1, Job(Topology((1, 2))))
    own.save(3, module, optimizer, [], None)
    if rank == 1:
        own.folder = Path(folder) / "old"
        (own.folder / "step-3").mkdir(parents=True)
        for name in ("rank-1.pt", "rank-1.sum"):
            (own.folder / "step-3" / name).write_bytes((Path(folder) / "whole/step-3" / name).read_bytes())
    (Path(out) / str(rank)).write_text(str(own.restore(module, optimizer, [], None)))


def test_all_ranks_go_on_from_the_checkpoint_that_rank_0_sees(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    processes.start_processes(restored, (str(tmp_path), str(tmp_path)), nprocs=2, start_method="fork")
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["3", "3"]


def lone(rank: int, folder: str) -> None:
    """Rank 1 fails where rank 0 waits for it in a collective."""
    patience = datetime.timedelta(seconds=20)  # of rank 0, if nobody ends rank 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=patience)
    tasks.LOST_S = 0.5
    watch = tasks.Watch()
    job = Job(Topology((1, 2)), failing=watch.failing, recovered=watch.recovered, log_path="its.err")
    watch.job, watch.task = job, ("race", 0)

    def give_up(end: tasks.RaceFailure) -> None:
        (Path(folder) / "said").write_text(f"{end.race} {end.failure}")
        os._exit(75)

    watch.give_up = give_up
    _, error = attempt(job, lambda: 1 / 0)  # on all alike: they go on
    assert failed(job, error)
    job.phase("building")
    if rank == 0:
        dist.barrier()
    _, error = attempt(job, lambda: int("bad day"))
    failed(job, error)


def test_a_task_that_fails_alone_ends_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pytest.raises(processes.ProcessExitedException, match="process 1 terminated with exit code 75"):
        processes.start_processes(lone, (str(tmp_path),), nprocs=2, start_method="fork")
    said = (tmp_path / "said").read_text()
    words = "race rank 1 raised in phase 'building': ValueError: invalid literal for int() with base 10: 'bad day', at "
    assert said.startswith(words)
    assert said.endswith("in <lambda> (log: its.err)")


BEGIN = {"did": "begin", "race": "a", "launch": 0}
FAILED = {
    "did": "failed",
    "race": "a",
    "launch": 0,
    "rank": 1,
    "phase": "p",
    "kind": "raised",
    "why": "w",
    "since": 9.0,
}


def test_what_ended_an_attempt_explains_it_whatever_the_nodes_clocks_say():
    failed = FAILED | {"attempt": 1}
    alone = [{"did": "start"}, BEGIN, {"did": "start"}, failed]  # its node's clock is behind or ahead: never mind
    assert failures(alone, {("a", 0): ["x"]}) == {("a", 0): {"x": ("failed", "rank 1 in 'p': w")}}
    assert deaths(alone) == {}
    for did, died in (("killed", {("a", 0): ["n1: task 2: Killed"]}), ("stop", {})):
        ended = [{"did": "start"}, BEGIN, {"did": did, "why": "n1: task 2: Killed"}, {"did": "start"}, failed]
        assert failures(ended, {("a", 0): ["x"]}) == {}
        assert deaths(ended) == died


def test_a_task_starts_without_what_its_cells_may_never_need():
    """Every rank of every start reads its modules from the file system that all share."""
    slow = {"pandas", "scipy", "networkx", "matplotlib", "numba", "torch._dynamo", "harness.profiling"}
    code = "import submitit.core._submit, harness.sweep.worker, harness.launch.tasks; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not slow & set(done.stdout.split())


def test_every_start_of_a_job_meets_elsewhere():
    starts = [{"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(n), "SLURM_STEP_ID": str(s)} for n in "01" for s in "01"]
    ports = {tasks.port(each) for each in starts}
    assert len(ports) == 4
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < max(low, 32768)


@pytest.mark.parametrize(
    ("hosts", "said"),
    [("abab", "1 on a, 1 on b, 1 on a, 1 on b"), ("aaab", "3 on a, 1 on b"), ("aaaa", "4 on a")],
)
def test_hosts_that_are_not_the_nodes(hosts, said):
    tasks.check_hosts("aabb", NODES)
    with pytest.raises(UserError, match=f"'{said}': ranks of a node must follow one another, 2 a node; srun"):
        tasks.check_hosts(hosts, NODES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpus_per_task": 1}, "gpus_per_task: 1: gives each task a GPU in a cgroup of its own.*write gpus_per_node"),
        ({"srun_args": ["--gpus-per-task=1"]}, "--gpus-per-task: '1': gives each task .* NVLink is lost"),
        ({"srun_args": ["--gpus-per-t=1"]}, "--gpus-per-t: '1': gives each task"),
        ({"setup": ["export SLURM_GPUS_PER_TASK=1"]}, "setup: 'export SLURM_GPUS_PER_TASK=1': gives each task"),
        ({"srun_args": ["--gpu-bind", "single:1"]}, "--gpu-bind: 'single:1': gives each task"),
        ({"additional_parameters": {"ntasks-per-gpu": 1}}, "additional_parameters.ntasks-per-gpu: 1: gives each"),
        (
            {"additional_parameters": {"signal": "USR2@60"}},
            "additional_parameters.signal: .*: is moebench's own; write",
        ),
    ],
)
def test_options_that_spoil_the_times_or_follow_from_the_cells(sweep_file, fields, message):
    file = sweep_file("bad", **fields)
    with pytest.raises(UserError, match=f"cluster.yaml: .*{message}"):
        spec.load(file)
    spec.load(sweep_file("good", srun_args=["--gpu-bind=none"]))


SAID = {
    "again": ("srun: error: n0: task 1: Exited with exit code 75\nsrun: error: n1: tasks 2-3: Terminated", 143),
    "own error": ("srun: error: n0: task 1: Exited with exit code 1\nsrun: error: n1: tasks 2-3: Killed", 137),
    "killed": ("srun: error: n1: task 2: Killed\nsrun: error: n0: task 1: Exited with exit code 75", 137),
    "in a container": ("srun: error: n1: task 2: Exited with exit code 134", 134),
    "no launch": ("srun: error: Task launch for StepId=1.0 failed on node n1: Communication connection failure", 1),
    "bad option": ("srun: unrecognized option '--x'", 1),
}


def run_script(tmp_path: Path, srun: str, **fields: object) -> tuple[int, str, str]:
    """A job's script with ``srun``, and a scontrol that writes down its orders: status, orders, what it said."""
    folder, tools = SweepFolder(tmp_path / "run"), tmp_path / "tools"
    folder.submitit.mkdir(parents=True)
    tools.mkdir()
    (tools / "srun").write_text(f"#!/bin/sh\n{srun}\n")
    asked = tmp_path / "asked"
    (tools / "scontrol").write_text(f'#!/bin/sh\n[ $1 = show ] && echo JobState=RUNNING || echo "$@" >> {asked}\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (text,) = script.texts(folder, spec.SlurmCluster(interconnect=NODES, **fields), [(2, 2)])  # type: ignore[arg-type]
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True)
    return done.returncode, asked.read_text().strip() if asked.exists() else "", done.stderr


@pytest.mark.parametrize(
    ("words", "starts", "asked", "status"),
    [
        ("again", 2, "", 0),
        ("own error", 1, "", 137),
        ("killed", 1, "requeue 7", 137),
        ("in a container", 1, "requeue 7", 134),
        ("no launch", 1, "requeue 7", 1),
        ("bad option", 1, "", 1),
    ],
)
def test_what_the_script_makes_of_sruns_words(tmp_path, words, starts, asked, status):
    """Where srun fails once with these words."""
    said, code = SAID[words]
    once = f"echo x >> {tmp_path}/starts; [ $(wc -l < {tmp_path}/starts) = 1 ] || exit 0"
    found = run_script(tmp_path, f"{once}\ncat >&2 << 'END'\n{said}\nEND\nexit {code}")
    assert found[:2] == (status, asked)
    assert len((tmp_path / "starts").read_text().split()) == starts
    assert [end["did"] for end in SweepFolder(tmp_path / "run").ends("7")] == (["killed"] if asked else [])


@pytest.mark.parametrize(
    ("fields", "asked", "notes", "said"),
    [
        ({"timeout_min": 1}, "requeue 7", ["requeued before its time limit"], ""),
        ({"timeout_min": 60}, "requeue 7", ["requeued for another job"], ""),
        ({"timeout_min": 1, "max_num_timeout": 0}, "", [], "timed-out too many times"),
    ],
)
def test_what_the_script_makes_of_a_warning(tmp_path, fields, asked, notes, said):
    status, found, stderr = run_script(tmp_path, "kill -USR2 $PPID; sleep 0.3", **fields)
    assert (status, found) == (0, asked)
    assert [end["why"] for end in SweepFolder(tmp_path / "run").ends("7")] == notes
    assert said in stderr


def test_caches_lie_on_the_node(tmp_path, monkeypatch):
    for variable in CACHES:
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", "/proc")  # read-only
    moved = use_scratch(everything=True)
    (own,) = tmp_path.glob("moebench-caches-*")
    assert "TRITON_CACHE_DIR" not in moved
    assert own.stat().st_mode & 0o777 == 0o700
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert os.environ["NUMBA_CACHE_DIR"] == str(own / "numba")


FULL_SCRATCH = """
mount -t tmpfs -o size=64k tmpfs {scratch} && TMPDIR={scratch} exec {python} -c '
from harness.caches import use_scratch
from harness.errors import UserError
try:
    use_scratch(everything=True)
except UserError as error:
    print(error)
'
"""


def test_a_full_scratch_is_one_line(tmp_path):
    words = FULL_SCRATCH.format(scratch=tmp_path, python=sys.executable)
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no mount here: {done.stderr.strip()}")
    (line,) = done.stdout.splitlines()
    assert "No space left on device; free it, or export TMPDIR" in line
    assert line.startswith("TMPDIR on ")
