"""Where a number comes from: enough to run it again, and no user's name or home.

Of a run on GPUs also the devices, the driver and its libraries, and in what conditions (clocks, power, what holds the
clocks back) the devices were before and after.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness
from harness import devices, registry

_ROOT = Path(harness.__file__).parents[1]
FROZEN = _ROOT / "frozen.json"  # in a tree that a sweep has frozen: the git state of what it is a copy of
_PACKAGES = ("torch", "numpy", "pandas", "pyarrow", "scipy")


def collect(systems: Iterable[str]) -> dict[str, Any]:
    """Facts about this machine, this code and the packages that ``systems`` stand for."""
    return {
        "git": git_state(),
        "versions": versions(systems),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "host": socket.gethostname(),
        "cpu": cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **_gpus(),
        "job": {key: os.environ[key] for key in ("SUBMITIT_LOCAL_JOB_ID", "SLURM_JOB_ID") if key in os.environ},
    }


def git_state() -> dict[str, Any]:
    """Commit and, for a changed tree, a hash of the difference; empty outside of a repository."""
    if FROZEN.exists():
        return dict(json.loads(FROZEN.read_text()))
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    diff = (_git("diff", "HEAD") or "") + (_git("status", "--porcelain") or "")
    return {
        "commit": commit.strip(),
        "dirty": bool(diff.strip()),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff.strip() else None,
    }


def versions(systems: Iterable[str]) -> dict[str, str | None]:
    """Of moebench, of the libraries that compute, and of each system's package (None: absent or native)."""
    found: dict[str, str | None] = {"moebench": harness.__version__}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    for name in sorted(set(systems)):
        if registry.system(name).kind == "package":
            found[name] = registry.state(registry.system(name))[0]
    return found


def cpu_model() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def conditions() -> list[dict[str, str]]:
    """Of this job's GPUs, now; none where there is no driver or no nvidia-smi to ask."""
    driver = devices.ask()
    return _own(devices.conditions(), driver) if driver.devices else []


def _gpus() -> dict[str, Any]:
    """``devices``, ``cuda`` (driver, libraries, topology, environment) and ``conditions`` before the run."""
    driver = devices.ask()
    if not driver.found:
        return {"devices": [], "cuda": {}}
    listed, now, joined = devices.facts(), devices.conditions(), devices.topology()
    cuda: dict[str, Any] = {"driver": devices.version() or "absent", "nvidia_smi": "there" if listed else "absent"}
    cuda |= {
        "supports": "{}.{}".format(*driver.cuda) if driver.cuda else "unknown",
        "error": driver.error,
        **_libraries(),
    }
    cuda |= {"topology": joined or "absent", "environment": _environment()}
    own = _own(listed, driver) or [
        {
            "name": device.name,
            "uuid": device.uuid,
            "compute_cap": "{}.{}".format(*device.capability),
            "memory.total": str(device.memory_bytes >> 20),
        }
        for device in driver.devices
    ]
    return {"devices": own, "cuda": cuda, "conditions": {"before": _own(now, driver)}}


def _own(listed: list[dict[str, str]], driver: devices.Driver) -> list[dict[str, str]]:
    """Of all the GPUs that nvidia-smi lists, those that this job sees, in its order."""
    by_uuid = {row.get("uuid"): row for row in listed}
    return [by_uuid[device.uuid] for device in driver.devices if device.uuid in by_uuid]


def _libraries() -> dict[str, str]:
    import torch

    nccl = torch.cuda.nccl.version() if torch.version.cuda and torch.distributed.is_nccl_available() else None
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return {
        "torch_built_for": torch.version.cuda or "cpu",
        "cudnn": str(cudnn or "absent"),
        "nccl": ".".join(map(str, nccl)) if nccl else "absent",
    }


_SETTINGS = re.compile(r"(NCCL|TORCH_NCCL|CUDA|TORCH_CUDA|PYTORCH|NVIDIA)_")


def _environment() -> dict[str, str]:
    """Variables that change how CUDA and NCCL work, the home folder left out of their values."""
    home = str(Path.home())
    return {name: value.replace(home, "~") for name, value in sorted(os.environ.items()) if _SETTINGS.match(name)}


def command_line() -> list[str]:
    """argv with the program's folder left out."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
