"""A real Slurm on one machine, its virtual nodes joined by the shaped links of an emulated cluster.

    eval "$(slurm/one-machine up)"      # needs root, and Debian's slurmctld, slurmd, slurm-client and munge
    slurm/one-machine down

Each node of the cluster is a network namespace with a slurmd in it: what a job's tasks send each other crosses the
links that ``harness.launch.network`` shapes, and Slurm's own messages take a second, unshaped network. One process, the
keeper, is pid 1 of a namespace that holds the daemons and all jobs: when it ends, the kernel ends and removes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import presets
from harness.errors import UserError
from harness.launch import network, scratch
from harness.launch.kernel import die_with_parent, use_batch_scheduling
from harness.specs import Cluster

CLUSTER = "emulated-2x4"
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
SYSTEM_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname")
START_S = 30.0
#: beside slurm.conf: the facts of the network that joins the nodes, for the provenance of what runs on them
NETWORK_FACTS = "network.json"
#: the daemons' own paths: sbin is not on everybody's PATH
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
# 22.05 has no sqlite back end for accounting: without slurmdbd a job's end is known to slurmctld alone, which keeps it
SACCT = """\
    #!/bin/sh
    # submitit asks sacct how jobs ended; this Slurm has no accounting daemon, but its controller remembers for a day
    ids=$(printf '%s\\n' "$@" | grep -A1 -e '^-j$' | grep -v -e '^-' | paste -s -d , -)
    echo 'JobID|State|NodeList'
    squeue --noheader --array --states=all --format='%i|%T|%N' ${ids:+--jobs=$ids} 2>/dev/null | sed 's/ *|/|/g'
"""
CONFIGURATION = """\
    ClusterName=moebench
    SlurmctldHost={host}({address})
    SlurmctldPort={port}
    SlurmUser={user}
    SlurmdUser={user}
    AuthType=auth/munge
    AuthInfo=socket={state}/munge.socket,cred_expire=5
    CryptoType=crypto/munge
    StateSaveLocation={state}/ctld
    SlurmdSpoolDir={state}/spool-%n
    SlurmctldPidFile={state}/slurmctld.pid
    SlurmdPidFile={state}/slurmd-%n.pid
    SlurmctldLogFile={state}/slurmctld.log
    SlurmdLogFile={state}/slurmd-%n.log
    SlurmctldDebug=info
    SwitchType=switch/none
    MpiDefault=none
    ProctrackType=proctrack/linuxproc
    TaskPlugin=task/none
    JobAcctGatherType=jobacct_gather/none
    AccountingStorageType=accounting_storage/none
    SelectType=select/cons_tres
    SelectTypeParameters=CR_Core
    SchedulerType=sched/backfill
    SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0,default_queue_depth=1000
    SlurmctldParameters=preempt_send_user_signal
    SlurmdParameters=config_overrides
    PreemptType=preempt/partition_prio
    PreemptMode=REQUEUE
    FirstJobId={first_job}
    MaxJobCount={max_jobs}
    MaxArraySize=5000
    EnforcePartLimits=ALL
    MinJobAge=86400
    ReturnToService=2
    KillWait=2
    InactiveLimit=0
    Waittime=0
    SlurmdTimeout=60
    MessageTimeout=20
    RebootProgram=/bin/true
    {nodes}
    PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
    PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
    PartitionName=closed Nodes=ALL MaxTime=INFINITE State=UP AllowAccounts=nobody
"""


class NoSlurm(RuntimeError):
    """A Slurm cannot be had here; the message is one line with the remedy."""


@dataclass(frozen=True)
class Slurm:
    """A Slurm that runs. ``environment``: what a process needs so that sbatch and its like reach it."""

    state: Path

    @property
    def environment(self) -> dict[str, str]:
        first = f"{self.state / 'bin'}{os.pathsep}"
        path = os.environ.get("PATH", "").removeprefix(first)
        return {"SLURM_CONF": str(self.state / "slurm.conf"), "PATH": first + path}

    def exports(self) -> str:
        """Lines for a shell."""
        return "\n".join(f"export {key}={shlex.quote(value)}" for key, value in self.environment.items())

    def down(self) -> None:
        """End it with all its jobs; nothing is left but the folder's logs, which go too."""
        pid = self.state / "keeper.pid"
        with contextlib.suppress(OSError, ValueError):
            number = int(pid.read_text())
            with contextlib.suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)  # unshare; the kernel ends what it had started
            deadline = time.monotonic() + 10
            while _alive(number) and time.monotonic() < deadline:
                time.sleep(0.02)
        shutil.rmtree(self.state, ignore_errors=True)


def refusal() -> str | None:
    """Why there can be no Slurm here, in one line with the remedy; None if nothing speaks against it."""
    if absent := [tool for tool in SYSTEM_TOOLS if not shutil.which(tool, path=SEARCH)]:
        return f"no one-machine Slurm: {', '.join(absent)} not found; apt-get install iproute2 util-linux"
    if absent := [tool for tool in TOOLS if not shutil.which(tool, path=SEARCH)]:
        return f"no one-machine Slurm: {', '.join(absent)} not found; {PACKAGES}"
    if os.geteuid():
        return "no one-machine Slurm: its daemons and networks need root; run it as root, in a container if you like"
    return None


def up(cluster: Cluster | str = CLUSTER, *, max_jobs: int = 10000, bound: bool = True) -> Slurm:
    """Start a Slurm whose nodes and links are those of an emulated cluster; a node has a CPU for each of its ranks.

    ``bound``: it ends with this process, however that ends. ``max_jobs``: the queue is full beyond them. Raises
    ``NoSlurm``.
    """
    if reason := refusal():
        raise NoSlurm(reason)
    spec = presets.cluster(cluster) if isinstance(cluster, str) else cluster
    if spec.kind != "emulated":
        raise NoSlurm(f"cluster {spec.name} is {spec.kind}: virtual nodes need an emulated one, as {CLUSTER}")
    if any(level.ports > 1 or level.ranks_per_port for level in spec.levels):
        raise NoSlurm(f"cluster {spec.name}: virtual nodes are alike and have one port, as those of {CLUSTER}")
    scratch.sweep("/tmp")
    state = Path(tempfile.mkdtemp(prefix="moebench-slurm-", dir="/tmp"))  # short: a socket's path has 108 characters
    state.chmod(0o755)
    (state / "wanted.json").write_text(json.dumps({"cluster": spec.model_dump(mode="json"), "max_jobs": max_jobs}))
    script = f'mount -t tmpfs tmpfs /run && exec "$@" > {state}/keeper.log 2>&1'
    keeper = [sys.executable, "-m", "harness.launch.slurm", "keep", str(state)]
    process = subprocess.Popen(
        ["unshare", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", *keeper],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(state / "unshare.log").open("wb"),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": SEARCH},
        start_new_session=True,
        preexec_fn=die_with_parent if bound else None,
    )
    (state / "keeper.pid").write_text(str(process.pid))
    slurm, deadline = Slurm(state), time.monotonic() + START_S
    while not (state / "ready").exists():
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            why = _last_line(state / "keeper.log") or _last_line(state / "unshare.log") or "no message"
            slurm.down()
            raise NoSlurm(f"no one-machine Slurm: {why if ended else f'not ready within {START_S:g} s; {why}'}")
        time.sleep(0.02)
    return slurm


@contextlib.contextmanager
def running(cluster: Cluster | str = CLUSTER, *, max_jobs: int = 10000) -> Iterator[Slurm]:
    """A Slurm for the length of a with statement, which every command started meanwhile reaches."""
    slurm = up(cluster, max_jobs=max_jobs)
    before = {key: os.environ.get(key) for key in slurm.environment}
    os.environ.update(slurm.environment)
    try:
        yield slurm
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)
        slurm.down()


# ---------------------------------------------------------------------------------------------- inside the namespaces


def keep(state: Path) -> None:
    """Pid 1: makes the networks, starts the daemons, reaps whatever ends, until it is killed."""
    scratch.hold(state)
    wanted = json.loads((state / "wanted.json").read_text())
    cluster = Cluster.model_validate(wanted["cluster"])
    facts = {"scheduler": use_batch_scheduling()}
    built = network.build(cluster)
    namespaces = built.of_ranks[:: cluster.shape[-1]]  # of nodes
    addresses = _join_management(namespaces)
    for folder in ("ctld", "bin", *(f"spool-n{i}" for i in range(cluster.num_nodes))):
        (state / folder).mkdir()
    (state / "slurm.conf").write_text(_configuration(state, cluster, addresses, wanted["max_jobs"]))
    (state / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{network.address(i)} n{i}\n" for i in range(cluster.num_nodes))
    )
    sacct = state / "bin" / "sacct"
    sacct.write_text(textwrap.dedent(SACCT))
    sacct.chmod(0o755)
    os.environ["SLURM_CONF"] = str(state / "slurm.conf")
    _start_munged(state)
    _start(["slurmctld", "-D"], state)
    daemons = []
    for index, name in enumerate(namespaces):
        inside = f"hostname n{index}; mount --bind {state}/hosts /etc/hosts; exec slurmd -D -N n{index}"
        daemons.append(
            _start(["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "sh", "-c", inside], state)
        )
    (state / NETWORK_FACTS).write_text(
        json.dumps({"cluster": cluster.model_dump(mode="json"), "facts": facts | built.facts, "daemons": daemons})
    )
    _await_nodes(cluster.num_nodes)
    (state / "ready").touch()
    while True:
        os.wait()  # also the orphans of jobs, which are pid 1's to reap


def _join_management(nodes: list[str]) -> list[str]:
    """A second network for Slurm's own messages, and this machine on it: the controller's address, then the nodes'.

    Its bridge lives in a namespace of its own, so that this machine's end of the cable goes when the keeper goes.
    """
    taken = {each["ifname"] for each in json.loads(_output(["ip", "-j", "link"]))}
    number = next(i for i in range(100) if f"moeslurm{i}" not in taken)
    addresses = [f"10.{150 + number}.{i // 250}.{i % 250 + 1}" for i in range(len(nodes) + 1)]
    commands = ["netns add management", f"link add moeslurm{number} type veth peer name host netns management"]
    inside = ["link add name bridge type bridge", "link set bridge up", "link set host master bridge up"]
    for index, name in enumerate(nodes):
        commands.append(f"link add manage netns {name} type veth peer name port{index} netns management")
        inside.append(f"link set port{index} master bridge up")
    commands += [f"addr add {addresses[0]}/16 dev moeslurm{number}", f"link set moeslurm{number} up"]
    _ip([], commands)
    _ip(["-n", "management"], inside)
    for name, address in zip(nodes, addresses[1:], strict=True):
        _ip(["-n", name], [f"addr add {address}/16 dev manage", "link set manage up"])
    return addresses


def _configuration(state: Path, cluster: Cluster, addresses: list[str], max_jobs: int) -> str:
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    nodes = "\n".join(
        f"NodeName=n{i} NodeAddr={address} CPUs={cluster.shape[-1]} RealMemory={memory_mb} State=UNKNOWN"
        for i, address in enumerate(addresses[1:])
    )
    return textwrap.dedent(CONFIGURATION).format(
        host=socket.gethostname().split(".")[0],
        address=addresses[0],
        port=port,
        user="root",
        state=state,
        first_job=int(time.time()) % 50_000_000 + 1000,  # no two Slurms give a job the same number
        max_jobs=max_jobs,
        nodes=nodes,
    )


def _start_munged(state: Path) -> None:
    key = state / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    places = {"key-file": key, "socket": state / "munge.socket"}
    places |= {name: state / f"munge.{name.split('-')[0]}" for name in ("log-file", "pid-file", "seed-file")}
    _start(["munged", "--foreground", "--force", *(f"--{key}={path}" for key, path in places.items())], state)
    deadline = time.monotonic() + 10
    while not (state / "munge.socket").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def _start(command: list[str], state: Path) -> int:
    """Returns its process."""
    with (state / "daemons.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True).pid


def _await_nodes(num_nodes: int) -> None:
    deadline, states = time.monotonic() + START_S, ""
    while time.monotonic() < deadline:
        done = subprocess.run(["sinfo", "-h", "-N", "-p", "normal", "-o", "%T"], capture_output=True, text=True)
        states = done.stdout
        if states.split() == ["idle"] * num_nodes:
            return
        time.sleep(0.05)
    raise RuntimeError(f"nodes are {' '.join(states.split()) or 'unknown'}; see the logs beside this one")


def _ip(options: list[str], commands: list[str]) -> None:
    lines = "".join(f"{command}\n" for command in commands)
    subprocess.run(["ip", *options, "-batch", "-"], input=lines, text=True, check=True)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def main(words: list[str]) -> None:
    """``up [CLUSTER]``, ``down`` (of the Slurm that SLURM_CONF names), ``keep STATE`` (the keeper itself)."""
    match words:
        case ["up", *cluster] if len(cluster) < 2:
            try:
                print(up(*cluster, bound=False).exports())
            except (NoSlurm, UserError) as error:
                sys.exit(str(error))
        case ["down"]:
            state = Path(os.environ.get("SLURM_CONF", "")).parent
            if not (state / "keeper.pid").exists():
                sys.exit("SLURM_CONF names no one-machine Slurm; export what `slurm/one-machine up` printed")
            Slurm(state).down()
        case ["keep", state]:
            keep(Path(state))
        case _:
            sys.exit("usage: slurm/one-machine up [CLUSTER] | down")


if __name__ == "__main__":
    main(sys.argv[1:])
