"""Where a number comes from: enough to run it again, and no user's name or home."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness
from harness import registry

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
        "devices": devices(),
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
            found[name] = registry.system(name).version()
    return found


def cpu_model() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def devices() -> list[dict[str, str]]:
    """GPUs and their driver, asked of nvidia-smi so that CUDA stays untouched in this process."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line]
    return [{"name": row[0], "driver": row[-1]} for row in rows]


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
