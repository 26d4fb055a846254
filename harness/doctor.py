"""What this machine can do: every finding names what was found and, where something lacks, what brings it."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from harness import caches, devices, mask
from harness.errors import UserError

MIN_FREE_BYTES = 2 * 1024**3
IPROUTE = "apt-get install iproute2"
SHAPED_LINK = (
    "ip link add name left type veth peer name right"
    " && tc qdisc add dev left root tbf rate 400mbit burst 72kb latency 50ms"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """``state``: ok; missing = something optional is not there; broken = something required is not."""

    name: str
    state: Literal["ok", "missing", "broken"]
    found: str
    remedy: str = ""


def examine(results: Path = Path("results")) -> list[Finding]:
    """All findings, required things first. ``results``: folder whose disk must have room for a run."""
    findings = [_python(), _dependencies(), _torch(), _gpu(), *_packages(), _huggingface()]
    findings += [_tool("ip", IPROUTE), _tool("tc", IPROUTE), _tool("unshare", "apt-get install util-linux")]
    findings += [_namespaces(), _shaping(), _latency()]
    findings += [
        _disk(results),
        _caches(),
        _slurm(),
        _one_machine_slurm(),
        _tool("git", "apt-get install git", "no commit in the provenance of a run"),
    ]
    return findings


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _dependencies() -> Finding:
    """Every core dependency that the installed distribution declares."""
    try:
        declared = importlib.metadata.requires("moebench") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("dependencies", "broken", "moebench itself is not installed", "make setup")
    wanted = [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in declared if "extra ==" not in line]
    absent = [name for name in wanted if not _version(name)]
    if absent:
        return Finding("dependencies", "broken", f"not installed: {', '.join(absent)}", "make setup")
    return Finding("dependencies", "ok", f"all {len(wanted)}; submitit {_version('submitit')}")


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a broken install fails in many ways
        return Finding("torch", "broken", f"{type(error).__name__}: {error}", "make clean setup")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return Finding("torch", "broken", f"{torch.__version__} without gloo", "make clean setup")
    found = f"{torch.__version__}, gloo, {torch.get_num_threads()} threads"
    if torch.version.cuda is None:
        return Finding("torch", "ok", f"{found}; a CPU build")
    oldest = devices.MIN_DRIVER.get(int(torch.version.cuda.split(".")[0]))
    found += f"; built for CUDA {torch.version.cuda}" + (
        f", which needs an NVIDIA driver >= {oldest}" if oldest else ""
    )
    return Finding("torch", "ok", found)


def _gpu() -> Finding:
    """A driver that torch cannot use is broken; no driver is fine."""
    from harness.launch import gpus

    none_needed = "none needed: emulated and simulated experiments run on CPU"
    driver, given = devices.ask(), os.environ.get(devices.MASK)
    if not driver.found:
        return Finding("gpu", "missing", "no NVIDIA driver", none_needed)
    everything = devices.ask(devices.unmasked())
    here = f"driver {devices.version() or 'of unknown version'}"
    if driver.cuda:
        here += " for CUDA {}.{}".format(*driver.cuda)
    if everything.devices and not driver.devices and given in devices.HIDE_ALL:
        hidden = f"{here}: {devices.MASK}={given!r} hides this machine's {len(everything.devices)} GPUs"
        return Finding("gpu", "missing", hidden, f"unset {devices.MASK} to use them")
    try:
        mask.check(driver)
        why = gpus.unusable(everything)
    except UserError as error:
        return Finding("gpu", "broken", f"{here}: {error}", f"unset {devices.MASK}")
    except Exception as error:  # a broken torch, which has a finding of its own
        why = f"{type(error).__name__}: {error}", "make clean setup"
    if why:
        return Finding("gpu", "broken", f"{here}: {why[0]}", why[1])
    counts = collections.Counter(device.name for device in driver.devices)
    return Finding("gpu", "ok", f"{here}: " + ", ".join(f"{count} x {name}" for name, count in counts.items()))


def _caches() -> Finding:
    """Where compilers and plots keep their files."""
    if wrong := caches.not_writable():
        name, folder = next(iter(wrong.items()))
        return Finding("caches", "broken", f"{name}={folder} cannot be written", f"export {name}=a folder that can be")
    if moved := caches.without_a_place():
        found = f"{Path.home()} and the program's folder cannot be written: {', '.join(moved)} go to scratch every time"
        return Finding("caches", "missing", found, f"export them as folders that stay; now {tempfile.gettempdir()}")
    return Finding("caches", "ok", "can be written")


def _packages() -> list[Finding]:
    """Every real package that a system file wraps."""
    try:
        from harness.registry import faults, state, systems

        packages = [member for member in systems().values() if member.kind == "package"]
    except Exception as error:
        return [Finding("systems", "broken", f"{type(error).__name__}: {error}", "make setup")]
    findings = [Finding("systems", "broken", fault, "mend that file, or move it away") for fault in faults()]
    for package in packages:
        version, missing = state(package)
        if missing is None:
            findings.append(Finding(f"system {package.name}", "ok", version or "installed"))
        else:
            what, _, remedy = missing.partition("; ")
            findings.append(Finding(f"system {package.name}", "missing", what, _exact(remedy)))
    return findings


def _huggingface() -> Finding:
    version = _version("transformers")
    if version:
        return Finding("transformers", "ok", version)
    remedy = "pip install 'transformers>=4.56' safetensors accelerate"
    return Finding("transformers", "missing", "not installed; no routing from checkpoints", _exact(remedy))


def _tool(name: str, remedy: str, without: str = "no emulated cluster: ranks run unshaped") -> Finding:
    path = shutil.which(name)
    return Finding(name, "ok", path) if path else Finding(name, "missing", f"not found; {without}", remedy)


def _namespaces() -> Finding:
    remedy = "sysctl kernel.unprivileged_userns_clone=1, or a container with --security-opt seccomp=unconfined"
    return _try("namespaces", "true", "user, network, mount and process", remedy)


def _shaping() -> Finding:
    return _try("shaped link", SHAPED_LINK, "veth and tbf", f"{IPROUTE}; a kernel with veth and sch_tbf")


def _latency() -> Finding:
    remedy = "mknod /dev/net/tun c 10 200, and a kernel with tun; needed for latency on links only"
    return _try("latency device", "test -c /dev/net/tun && ip tuntap add dev t0 mode tap", "/dev/net/tun", remedy)


def _try(name: str, script: str, found: str, remedy: str) -> Finding:
    """Run ``script`` inside the namespaces that an emulated cluster lives in, which vanish with it."""
    from harness.launch.session import IN_NAMESPACES

    try:
        done = subprocess.run(
            [*IN_NAMESPACES, "sh", "-c", script], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return Finding(name, "missing", "unshare is not installed", "apt-get install util-linux")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, "missing", str(error), remedy)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return Finding(name, "missing", said[-1] if said else f"refused (exit {done.returncode})", remedy)
    return Finding(name, "ok", f"{found} works")


def _disk(results: Path) -> Finding:
    """Room and permission where runs are stored."""
    folder = results.resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("disk", "broken", f"{folder} is not writable", "run from a folder that you may write to")
    free = shutil.disk_usage(folder).free
    text = f"{free / 1024**3:.1f} GiB free at {folder}"
    if free < MIN_FREE_BYTES:
        return Finding("disk", "broken", text, f"free at least {MIN_FREE_BYTES // 1024**3} GiB")
    return Finding("disk", "ok", text)


def _slurm() -> Finding:
    absent = [name for name in ("sbatch", "srun", "sacct", "scancel") if not shutil.which(name)]
    if absent:
        return Finding("slurm", "missing", f"not found: {', '.join(absent)}", "none needed on one machine")
    try:
        done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("slurm", "missing", str(error), "none needed on one machine")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"sbatch ends with {done.returncode}"])[-1]
        return Finding("slurm", "missing", said, "run where a cluster is set up, or slurm/one-machine up")
    return Finding("slurm", "ok", done.stdout.strip())


def _one_machine_slurm() -> Finding:
    from harness.launch.slurm import refusal

    what, _, remedy = (refusal() or "").removeprefix("no one-machine Slurm: ").partition("; ")
    name = "one-machine slurm"
    return Finding(name, "missing", what, remedy) if what else Finding(name, "ok", "slurm/one-machine up")


def _exact(remedy: str) -> str:
    """The remedy with the pip of the interpreter that runs this, as one may paste it."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    return remedy.replace("pip install", f"{shlex.quote(str(python))} -m pip install")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
